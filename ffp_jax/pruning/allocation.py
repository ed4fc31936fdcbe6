"""Priorities to counts on the modules of one model, at one sparsity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import projection
from ffp_jax.pruning.sublayers import Sites


class Modules(NamedTuple):
  """`Sites` as the arrays that run on the device, and the units' ranks.

  K is the number of budgets: the parameters, then `Sites.resources`.
  """

  rank: Masks
  share_KxS: jax.Array
  floor_ratio_S: jax.Array
  units_S: jax.Array


class Target(NamedTuple):
  """One sparsity, as the step takes it."""

  sparsity: jax.Array
  keep_K: jax.Array  # share of the removable cost


def modules(sites: Sites, rank: Masks) -> Modules:
  """Puts `sites` and ranks on the device."""
  cost_KxS, _ = _budgets(sites, 0.0)
  removable_KxS = cost_KxS * sites.units
  share_KxS = removable_KxS / removable_KxS.sum(-1, keepdims=True)
  return Modules(
    rank=rank,
    share_KxS=jnp.asarray(share_KxS, jnp.float32),
    floor_ratio_S=jnp.asarray(sites.floor / sites.units, jnp.float32),
    units_S=jnp.asarray(sites.units, jnp.int32),
  )


def target(sites: Sites, sparsity: float) -> Target:
  """The budget of a sparsity, and those of the other resources."""
  cost_KxS, limit_K = _budgets(sites, sparsity)
  keep_K = limit_K / (cost_KxS @ sites.units)
  return Target(jnp.float32(sparsity), jnp.asarray(keep_K, jnp.float32))


def _budgets(sites: Sites, sparsity: float) -> tuple[np.ndarray, np.ndarray]:
  """(cost of one unit [K,S], what units may cost [K]), int64."""
  budgets = [(sites.unit_cost, sites.limit(sparsity) - sites.fixed)]
  for resource in sites.resources:
    limit = resource.limit(sites.units) - resource.fixed
    budgets.append((resource.unit_cost, limit))
  costs, limits = zip(
    *(projection.integers(cost, limit, sites.units) for cost, limit in budgets),
    strict=True,
  )
  return np.array(costs), np.array(limits)


def project(
  priority_S, target: Target, modules: Modules, *, low, repair='project'
):
  """Priorities to ratios [S] that meet the budget of these modules.

  Args:
    priority_S: any finite numbers.
    target: the budget.
    modules: what may be removed.
    low: smallest ratio that a priority can ask for.
    repair: 'project' for `projection.project`, 'cut' for `projection.cut`.
  """
  return {'project': projection.project, 'cut': projection.cut}[repair](
    priority_S,
    target.keep_K,
    share_KxS=modules.share_KxS,
    floor_S=modules.floor_ratio_S,
    low=low,
  )


_project = jax.jit(project, static_argnames=('low', 'repair'))


def counts_of(
  priority_S, sparsity, sites: Sites, modules: Modules, *, low, repair='project'
):
  """Priorities to counts, int64 [S], every budget met; on the host."""
  priority_S, goal = (
    jnp.asarray(priority_S, jnp.float32),
    target(sites, sparsity),
  )
  ratio_S = _project(priority_S, goal, modules, low=low, repair=repair)
  return counts(ratio_S, sparsity, sites)


def counts(ratio_S, sparsity, sites: Sites) -> np.ndarray:
  """`projection.to_counts` on these modules."""
  cost_KxS, limit_K = _budgets(sites, sparsity)
  return projection.to_counts(
    ratio_S,
    limit_K,
    units_S=sites.units,
    cost_KxS=cost_KxS,
    step_S=sites.step,
    floor_S=sites.floor,
  )
