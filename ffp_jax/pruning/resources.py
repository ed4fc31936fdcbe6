"""What units cost besides parameters: FLOPs, KV cache, measured time.

Each is linear in the counts, as the parameters are, so that one projection
meets all budgets at once.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from ffp_jax.errors import RequestError
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning.sublayers import (
  Sublayers,
  attention_unit_cost,
  ffn_unit_cost,
)


class Resource(NamedTuple):
  """A cost of the units, and how much of it has to go."""

  name: str
  unit_cost: np.ndarray  # of one unit, float64 [S], 0 where there is none
  fixed: float  # of the prunable sublayers, which no removal touches
  removed: float  # share of the whole that has to go, in (0, 1)

  def kept(self, counts) -> float:
    """What counts [S] cost."""
    return float(np.asarray(counts) @ self.unit_cost) + self.fixed

  def limit(self, units) -> float:
    """What may be kept of sublayers of so many units [S]."""
    return (1.0 - self.removed) * self.kept(units)


def from_config(
  config, model: ModelConfig, sublayers: Sublayers
) -> tuple[Resource, ...]:
  """The budgets that `config.budget` sets besides the parameters.

  Raises:
    RequestError: there is no latency table, or it doesn't fit the model.
  """
  b = config.budget
  found = []
  if b.flops:
    cost = _flops(model, b.flops_context)
    found.append(Resource('flops', _both(model, *cost), 0.0, b.flops))
  if b.kv_cache:
    # Key and value of a group at a position; bytes and batch cancel out.
    cost = _both(model, 2.0 * model.head_size, 0.0)
    found.append(Resource('kv_cache', cost, 0.0, b.kv_cache))
  if b.latency:
    found.append(_latency(b.latency_table, sublayers, b.latency))
  return tuple(found)


def _both(model, attention, ffn) -> np.ndarray:
  return np.repeat(np.array([attention, ffn], np.float64), model.layers)


def _flops(model: ModelConfig, context: int) -> tuple[float, float]:
  """FLOPs of one unit and token, mean over a context's positions.

  Two for every weight; and for every earlier position, itself included, two
  for each number of its key and two for each of its value.
  """
  width = model.heads_per_group * model.head_size
  seen = (context + 1) / 2
  if model.window:
    first = min(model.window, context)
    seen = first - first * (first - 1) / 2 / context
  attention = 2.0 * attention_unit_cost(model) + 4.0 * width * seen
  return attention, 2.0 * ffn_unit_cost(model)


def _latency(name: str, sublayers: Sublayers, removed: float) -> Resource:
  """Milliseconds measured by the user, under a line for each sublayer.

  A sublayer's line goes through its dense point and lies on or above the
  others, so that what the line promises the table keeps.
  """
  path = pathlib.Path(name).expanduser()
  try:
    table = json.loads(path.read_text())
    curves = [
      sorted((int(count), float(ms)) for count, ms in table[kind].items())
      for kind in ('attention', 'ffn')
    ]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise RequestError(
      f'budget.latency_table: {name!r} must be a JSON file like '
      '{"attention": {"1": 0.2, "2": 0.3}, "ffn": {"512": 0.4, ...}}, '
      f'milliseconds by count ({type(error).__name__}: {error})'
    ) from error
  slopes, starts = [], []
  dense_counts = sublayers.units[:: sublayers.layers]
  for kind, points, units in zip(
    ('attention', 'ffn'), curves, dense_counts, strict=True
  ):
    if len(points) < 2 or points[-1][0] != units:
      raise RequestError(
        f'budget.latency_table: {kind} needs two counts or more, the largest '
        f'of them {units}, that of the dense model'
      )
    *others, (_, dense) = points
    slope = min((dense - ms) / (units - count) for count, ms in others)
    slopes.append(max(slope, 0.0))
    starts.append(dense - slopes[-1] * units)
  cost = np.repeat(np.array(slopes), sublayers.layers)
  return Resource('latency', cost, sublayers.layers * sum(starts), removed)
