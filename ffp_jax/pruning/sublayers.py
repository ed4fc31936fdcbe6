"""The prunable sublayers of a model: their units, their unit costs.

Modules are ordered attention of layer 0..L-1, then FFN of layer 0..L-1, in
every array with a trailing S = 2L.
"""

from typing import NamedTuple

import numpy as np

from ffp_jax.errors import RequestError
from ffp_jax.models.decoder import ModelConfig


class Sublayers(NamedTuple):
  """What may be removed and what it saves; NumPy int64 arrays of shape [S].

  `fixed` counts the parameters of attention and FFN that no removal touches
  (the biases of the output projections). `resources` holds the costs besides
  parameters that have a budget too, see resources.py.
  """

  units: np.ndarray  # units in the dense sublayer
  unit_cost: np.ndarray  # parameters of one unit
  step: np.ndarray  # counts are multiples of this, or all units
  floor: np.ndarray  # fewest units a sublayer may keep
  fixed: int
  resources: tuple = ()

  @property
  def total(self) -> int:
    """Parameters of the prunable sublayers, the sparsity's denominator."""
    return int(self.units @ self.unit_cost) + self.fixed

  @property
  def layers(self) -> int:
    return len(self.units) // 2

  def kept_cost(self, counts) -> int:
    """Parameters that counts [S] keep in the prunable sublayers."""
    counts = np.asarray(counts, np.int64)
    return int(counts @ self.unit_cost) + self.fixed

  def sparsity(self, counts) -> float:
    """Removed over prunable parameters."""
    return 1.0 - self.kept_cost(counts) / self.total

  def limit(self, sparsity: float) -> int:
    """Parameters that may be kept at a sparsity, `fixed` included."""
    return int(np.floor((1.0 - sparsity) * self.total + 1e-6))


def attention_unit_cost(config: ModelConfig) -> int:
  """Q, K, V and output weights of one group, with its Q, K, V biases."""
  query = config.heads_per_group * config.head_size
  inputs = query + 2 * config.head_size
  bias = inputs if config.qkv_bias else 0
  return config.width * (inputs + query) + bias


def ffn_unit_cost(config: ModelConfig) -> int:
  """Input column(s) with bias and output row of one hidden channel."""
  inputs = 2 if config.gated else 1
  bias = inputs if config.ffn_bias else 0
  return config.width * (inputs + 1) + bias


def find_sublayers(
  config: ModelConfig, *, round_heads: int, round_ffn: int
) -> Sublayers:
  """The sublayers of a dense model.

  Args:
    config: a dense model.
    round_heads: attention groups are kept in multiples of this.
    round_ffn: FFN channels are kept in multiples of this.

  Returns:
    Sublayers with S = 2 * config.layers.
  """
  L = config.layers
  per_layer = (config.out_bias + config.ffn_bias) * config.width

  def both(attention, ffn):
    return np.repeat(np.array([attention, ffn], np.int64), L)

  units = both(config.groups, config.ffn)
  step = np.minimum(both(round_heads, round_ffn), units)
  return Sublayers(
    units=units,
    unit_cost=both(attention_unit_cost(config), ffn_unit_cost(config)),
    step=step,
    floor=step,
    fixed=L * per_layer,
  )


def check_reachable(sublayers, config):
  """Refuses a sparsity that the floors, or the lowest ratio, rule out.

  Raises:
    RequestError: with the largest sparsity within reach.
  """
  sparsity = config.budget.sparsity
  if sublayers.limit(sparsity) < sublayers.kept_cost(sublayers.floor):
    most = sublayers.sparsity(sublayers.floor)
    raise RequestError(
      f'budget.sparsity: {sparsity} is out of reach; the floors of '
      f'{config.budget.round_heads} group(s) and {config.budget.round_ffn} '
      f'channels a layer leave at most {most:.4f}'
    )
  min_ratio = config.search.min_ratio
  lowest = (
    np.maximum(min_ratio * sublayers.units, sublayers.floor)
    @ sublayers.unit_cost
  )
  if lowest + sublayers.fixed > sublayers.limit(sparsity):
    raise RequestError(
      f'search.min_ratio: {min_ratio} keeps more than sparsity {sparsity} '
      'allows; lower it'
    )
  lowest = np.maximum(min_ratio * sublayers.units, sublayers.floor)
  for resource in sublayers.resources:
    least = resource.kept(lowest) / resource.kept(sublayers.units)
    if least > 1.0 - resource.removed:
      raise RequestError(
        f'budget.{resource.name}: {resource.removed} is out of reach; the '
        f'floors and search.min_ratio leave at most {1.0 - least:.4f}'
      )
