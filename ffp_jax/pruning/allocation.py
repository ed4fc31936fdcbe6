"""Priorities to counts on the sublayers of one model, at one sparsity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import projection
from ffp_jax.pruning.sublayers import Sublayers


class DeviceSublayers(NamedTuple):
  """`Sublayers` as the arrays that run on the device, and the units' ranks.

  K is the number of budgets: the parameters, then `Sublayers.resources`.
  """

  rank: Masks
  share_KxS: jax.Array
  floor_ratio_S: jax.Array
  units_S: jax.Array


class Target(NamedTuple):
  """One sparsity, as the step takes it."""

  sparsity: jax.Array
  keep_K: jax.Array  # share of the removable cost


def to_device(sublayers: Sublayers, rank: Masks) -> DeviceSublayers:
  """Puts `sublayers` and ranks on the device."""
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
  """The budget of a sparsity, and those of the other resources."""
  cost_KxS, limit_K = _budgets(sublayers, sparsity)
  keep_K = limit_K / (cost_KxS @ sublayers.units)
  return Target(jnp.float32(sparsity), jnp.asarray(keep_K, jnp.float32))


def _budgets(
  sublayers: Sublayers, sparsity: float
) -> tuple[np.ndarray, np.ndarray]:
  """(cost of one unit [K,S], what units may cost [K]), int64."""
  budgets = [(sublayers.unit_cost, sublayers.limit(sparsity) - sublayers.fixed)]
  for resource in sublayers.resources:
    limit = resource.limit(sublayers.units) - resource.fixed
    budgets.append((resource.unit_cost, limit))
  costs, limits = zip(
    *(
      projection.integers(cost, limit, sublayers.units)
      for cost, limit in budgets
    ),
    strict=True,
  )
  return np.array(costs), np.array(limits)


def project(
  priority_S,
  target: Target,
  device_sublayers: DeviceSublayers,
  *,
  min_ratio,
  repair='project',
):
  """Priorities to ratios [S] that meet the budget of these sublayers.

  Args:
    priority_S: any finite numbers.
    target: the budget.
    device_sublayers: what may be removed.
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
  priority_S,
  sparsity,
  sublayers: Sublayers,
  device_sublayers: DeviceSublayers,
  *,
  min_ratio,
  repair='project',
):
  """Priorities to counts, int64 [S], every budget met; on the host."""
  priority_S, goal = (
    jnp.asarray(priority_S, jnp.float32),
    make_target(sublayers, sparsity),
  )
  ratio_S = _project(
    priority_S, goal, device_sublayers, min_ratio=min_ratio, repair=repair
  )
  return round_ratios(ratio_S, sparsity, sublayers)


def round_ratios(ratio_S, sparsity, sublayers: Sublayers) -> np.ndarray:
  """`projection.round_to_counts` on these sublayers."""
  cost_KxS, limit_K = _budgets(sublayers, sparsity)
  return projection.round_to_counts(
    ratio_S,
    limit_K,
    units_S=sublayers.units,
    cost_KxS=cost_KxS,
    step_S=sublayers.step,
    floor_S=sublayers.floor,
  )
