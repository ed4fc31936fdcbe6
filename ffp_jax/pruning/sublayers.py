"""The prunable sublayers of a model: their units, and the cost of a unit.

Every array with a trailing axis of S = 2L sublayers holds the attention of
layers 0..L-1 first, and then the FFN of layers 0..L-1.
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ffp_jax.errors import RequestError
from ffp_jax.models.decoder import ModelConfig


class Sublayers(NamedTuple):
  """The units that may be removed, and their parameters.

  Attributes:
    units: units of the dense sublayers, int64 [S].
    unit_cost: parameters of one unit, int64 [S].
    step: counts are multiples of this, or all units; int64 [S].
    floor: fewest units that a sublayer may keep, int64 [S].
    fixed: parameters of attention and FFN that every allocation keeps, which
      are the biases of the output projections.
    resources: costs besides parameters that have a budget, each a
      `resources.Resource`.
  """

  units: np.ndarray
  unit_cost: np.ndarray
  step: np.ndarray
  floor: np.ndarray
  fixed: int
  resources: tuple = ()

  @property
  def total(self) -> int:
    """Number of prunable parameters: the denominator of the sparsity."""
    return int(self.units @ self.unit_cost) + self.fixed

  @property
  def layers(self) -> int:
    """Number of layers, L."""
    return len(self.units) // 2

  def kept_cost(self, counts: np.ndarray) -> int:
    """Returns the parameters that counts [S] keep, `fixed` included."""
    counts = np.asarray(counts, np.int64)
    return int(counts @ self.unit_cost) + self.fixed

  def sparsity(self, counts: np.ndarray) -> float:
    """Returns the share of the prunable parameters that counts [S] remove."""
    return 1.0 - self.kept_cost(counts) / self.total

  def limit(self, sparsity: float) -> int:
    """Returns the most parameters to keep at a sparsity, `fixed` included."""
    return int(np.floor((1.0 - sparsity) * self.total + 1e-6))


def attention_unit_cost(config: ModelConfig) -> int:
  """Returns the parameters of one group: Q, K, V with biases, and output."""
  query = config.heads_per_group * config.head_size
  inputs = query + 2 * config.head_size
  bias = inputs if config.qkv_bias else 0
  return config.width * (inputs + query) + bias


def ffn_unit_cost(config: ModelConfig) -> int:
  """Returns the parameters of one channel: inputs with biases, and output."""
  inputs = 2 if config.gated else 1
  bias = inputs if config.ffn_bias else 0
  return config.width * (inputs + 1) + bias


def find_sublayers(
  config: ModelConfig, *, round_heads: int, round_ffn: int, floor: int
) -> Sublayers:
  """Returns the prunable sublayers of a dense model.

  Args:
    config: of the dense model.
    round_heads: attention groups are kept in multiples of this.
    round_ffn: FFN channels are kept in multiples of this.
    floor: such multiples that every sublayer keeps at least; 0 for none.

  Returns:
    `Sublayers` with S = 2 * config.layers.
  """
  L = config.layers
  per_layer = (config.out_bias + config.ffn_bias) * config.width

  def per_sublayer(attention, ffn):
    return np.repeat(np.array([attention, ffn], np.int64), L)

  units = per_sublayer(config.groups, config.ffn)
  step = np.minimum(per_sublayer(round_heads, round_ffn), units)
  return Sublayers(
    units=units,
    unit_cost=per_sublayer(attention_unit_cost(config), ffn_unit_cost(config)),
    step=step,
    floor=np.minimum(floor * step, units),
    fixed=L * per_layer,
  )


def check_reachable(sublayers: Sublayers, config: ConfigDict) -> None:
  """Checks that the configured budgets can be met.

  Raises:
    RequestError: the floors or `search.min_ratio` keep too much; it names the
      largest sparsity within reach.
  """
  sparsity = config.budget.sparsity
  if sublayers.limit(sparsity) < sublayers.kept_cost(sublayers.floor):
    most = sublayers.sparsity(sublayers.floor)
    raise RequestError(
      f'budget.sparsity: {sparsity} is out of reach; the floors of '
      f'{sublayers.floor[0]} group(s) and {sublayers.floor[-1]} '
      f'channels a layer leave at most {most:.4f}'
    )
  min_ratio = config.search.min_ratio
  lowest_S = np.maximum(min_ratio * sublayers.units, sublayers.floor)
  lowest_cost = lowest_S @ sublayers.unit_cost + sublayers.fixed
  if lowest_cost > sublayers.limit(sparsity):
    raise RequestError(
      f'search.min_ratio: {min_ratio} keeps more than sparsity {sparsity} '
      'allows; lower it'
    )
  for resource in sublayers.resources:
    lowest = resource.kept(lowest_S) / resource.kept(sublayers.units)
    if lowest > 1.0 - resource.removed:
      raise RequestError(
        f'budget.{resource.name}: {resource.removed} is out of reach; the '
        f'floors and search.min_ratio leave at most {1.0 - lowest:.4f}'
      )
