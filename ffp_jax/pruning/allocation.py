"""Maps priorities to counts for the sublayers of one model at one sparsity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import projection
from ffp_jax.pruning.sublayers import Sublayers


class DeviceSublayers(NamedTuple):
  """`Sublayers` as device arrays, with the ranks of their units.

  K is the number of budgets: the parameters, then `Sublayers.resources`.
  """

  rank: Masks  # from `masks.rank_all`
  share_KxS: jax.Array  # share of each sublayer in each removable cost
  floor_ratio_S: jax.Array  # smallest ratio of each sublayer
  units_S: jax.Array  # int32, units of the dense sublayers


class Target(NamedTuple):
  """One sparsity, and the budgets that it sets."""

  sparsity: jax.Array  # scalar
  keep_K: jax.Array  # share of each removable cost to keep


def to_device(sublayers: Sublayers, rank: Masks) -> DeviceSublayers:
  """Puts sublayers, and the ranks of their units, on the device."""
  cost_KxS, _ = _budgets(sublayers, 0.0)
  removable_KxS = cost_KxS * sublayers.units
  share_KxS = removable_KxS / removable_KxS.sum(-1, keepdims=True)
  return DeviceSublayers(
    rank=rank,
    share_KxS=jnp.asarray(share_KxS, jnp.float32),
    floor_ratio_S=jnp.asarray(sublayers.floor / sublayers.units, jnp.float32),
    units_S=jnp.asarray(sublayers.units, jnp.int32),
  )


def make_target(sublayers: Sublayers, sparsity: float) -> Target:
  """Returns the parameter budget of a sparsity, and the other budgets."""
  cost_KxS, limit_K = _budgets(sublayers, sparsity)
  keep_K = limit_K / (cost_KxS @ sublayers.units)
  return Target(jnp.float32(sparsity), jnp.asarray(keep_K, jnp.float32))


def _budgets(
  sublayers: Sublayers, sparsity: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (cost of one unit [K,S], largest cost of all units [K]), int64."""
  budgets = [(sublayers.unit_cost, sublayers.limit(sparsity) - sublayers.fixed)]
  for resource in sublayers.resources:
    limit = resource.limit(sublayers.units) - resource.fixed
    budgets.append((resource.unit_cost, limit))
  costs, limits = zip(
    *(
      projection.integer_costs(cost, limit, sublayers.units)
      for cost, limit in budgets
    ),
    strict=True,
  )
  return np.array(costs), np.array(limits)


def project(
  priority_S: jax.Array | np.ndarray,
  target: Target,
  device_sublayers: DeviceSublayers,
  *,
  min_ratio: float,
  repair: str = 'project',
) -> jax.Array:
  """Maps priorities to ratios [S] that meet every budget of the sublayers.

  Args:
    priority_S: finite numbers, [S].
    target: the sparsity and its budgets.
    device_sublayers: the prunable sublayers.
    min_ratio: smallest ratio that a priority can ask for.
    repair: 'project' for `projection.project`, 'cut' for `projection.cut`.
  """
  return {'project': projection.project, 'cut': projection.cut}[repair](
    priority_S,
    target.keep_K,
    share_KxS=device_sublayers.share_KxS,
    floor_S=device_sublayers.floor_ratio_S,
    min_ratio=min_ratio,
  )


_project = jax.jit(project, static_argnames=('min_ratio', 'repair'))


def priorities_to_counts(
  priority_S: jax.Array | np.ndarray,
  sparsity: float,
  sublayers: Sublayers,
  device_sublayers: DeviceSublayers,
  *,
  min_ratio: float,
  repair: str = 'project',
) -> np.ndarray:
  """Maps priorities [S] to counts, int64 [S], that meet every budget.

  Not for use inside jit: the rounding runs on the host. See `project` for the
  arguments.
  """
  ratio_S = _project(
    jnp.asarray(priority_S, jnp.float32),
    make_target(sublayers, sparsity),
    device_sublayers,
    min_ratio=min_ratio,
    repair=repair,
  )
  return round_ratios(ratio_S, sparsity, sublayers)


def round_ratios(
  ratio_S: jax.Array | np.ndarray, sparsity: float, sublayers: Sublayers
) -> np.ndarray:
  """Applies `projection.round_to_counts` to the ratios of the sublayers."""
  cost_KxS, limit_K = _budgets(sublayers, sparsity)
  return projection.round_to_counts(
    ratio_S,
    limit_K,
    units_S=sublayers.units,
    cost_KxS=cost_KxS,
    step_S=sublayers.step,
    floor_S=sublayers.floor,
  )
