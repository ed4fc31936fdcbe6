"""Budgets besides the parameters: FLOPs, key/value cache, measured time.

Each cost is linear in the counts, as the parameters are, so that one projection
meets all budgets at once.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ffp_jax.errors import RequestError
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning.sublayers import (
  Sublayers,
  attention_unit_cost,
  ffn_unit_cost,
)


class Resource(NamedTuple):
  """A cost of the prunable sublayers, and the share of it to remove.

  Attributes:
    name: its key in `config.budget`.
    unit_cost: cost of one unit, float64 [S]; 0 where a unit has none.
    fixed: cost of the prunable sublayers that every allocation keeps.
    removed: share of the whole cost to remove, in (0, 1).
  """

  name: str
  unit_cost: np.ndarray
  fixed: float
  removed: float

  def kept(self, counts: np.ndarray) -> float:
    """Returns the cost of counts [S], `fixed` included."""
    return float(np.asarray(counts) @ self.unit_cost) + self.fixed

  def limit(self, units: np.ndarray) -> float:
    """Returns the largest cost to keep of dense sublayers of `units` [S]."""
    return (1.0 - self.removed) * self.kept(units)


def from_config(
  config: ConfigDict, model: ModelConfig, sublayers: Sublayers
) -> tuple[Resource, ...]:
  """Returns the budgets in `config.budget` besides that of the parameters.

  Raises:
    RequestError: the latency table cannot be read, or does not fit the model.
  """
  b = config.budget
  resources = []
  if b.flops:
    unit_costs = _flops(model, b.flops_context)
    resources.append(
      Resource('flops', _per_sublayer(model, *unit_costs), 0.0, b.flops)
    )
  if b.kv_cache:
    # A group's key and value at a position; bytes and batch cancel out.
    cost = _per_sublayer(model, 2.0 * model.head_size, 0.0)
    resources.append(Resource('kv_cache', cost, 0.0, b.kv_cache))
  if b.latency:
    resources.append(_latency(b.latency_table, sublayers, b.latency))
  return tuple(resources)


def _per_sublayer(
  model: ModelConfig, attention: float, ffn: float
) -> np.ndarray:
  """Repeats the cost of a group and of a channel for every layer, [S]."""
  return np.repeat(np.array([attention, ffn], np.float64), model.layers)


def _flops(model: ModelConfig, context: int) -> tuple[float, float]:
  """Returns the FLOPs per token of one group and of one channel.

  Every weight takes two. In attention every visible position, the token itself
  included, takes two more for each number of its key and of its value, for
  each query head; the number of visible positions is the mean over a context.
  """
  width = model.heads_per_group * model.head_size
  visible = (context + 1) / 2
  if model.window:
    window = min(model.window, context)
    visible = window - window * (window - 1) / 2 / context
  attention = 2.0 * attention_unit_cost(model) + 4.0 * width * visible
  return attention, 2.0 * ffn_unit_cost(model)


def _latency(name: str, sublayers: Sublayers, removed: float) -> Resource:
  """Returns a budget of the milliseconds in a user's table.

  The cost of a sublayer is a line through the time of the dense one that lies
  on or above all other times, so that a budget met by the line is met by the
  table too. What the line has at 0 units counts even where none is left.

  Args:
    name: path of the table, a JSON file.
    sublayers: of the dense model.
    removed: share of the time to remove.

  Raises:
    RequestError: the table cannot be read, or does not fit the model.
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
  slopes, intercepts = [], []
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
    intercepts.append(dense - slopes[-1] * units)
  cost = np.repeat(np.array(slopes), sublayers.layers)
  return Resource('latency', cost, sublayers.layers * sum(intercepts), removed)
