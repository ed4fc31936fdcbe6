"""Priorities to counts on the modules of one model, at one sparsity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax import budget
from ffp_jax.model import Masks
from ffp_jax.sites import Sites


class Modules(NamedTuple):
  """`Sites` as the arrays that run on the device, and the units' ranks.

  K is the number of budgets: the parameters, then `Sites.resources`.
  """

  rank: Masks
  share_KxS: jax.Array
  floor_ratio_S: jax.Array
  units_S: jax.Array
  cost_KxS: jax.Array
  step_S: jax.Array
  floor_S: jax.Array


class Target(NamedTuple):
  """One sparsity, in the forms that the step needs."""

  sparsity: jax.Array
  keep_K: jax.Array  # share of the removable cost
  limit_K: jax.Array  # in the unit of cost_KxS


def modules(sites: Sites, rank: Masks) -> Modules:
  """Puts `sites` and ranks on the device."""
  cost_KxS = np.array([cost_S for cost_S, _ in _budgets(sites, 0.0)])
  removable_KxS = cost_KxS * sites.units
  share_KxS = removable_KxS / removable_KxS.sum(-1, keepdims=True)
  return Modules(
    rank=rank,
    share_KxS=jnp.asarray(share_KxS, jnp.float32),
    floor_ratio_S=jnp.asarray(sites.floor / sites.units, jnp.float32),
    units_S=jnp.asarray(sites.units, jnp.int32),
    cost_KxS=jnp.asarray(budget.wrap(cost_KxS)),
    step_S=jnp.asarray(sites.step, jnp.int32),
    floor_S=jnp.asarray(sites.floor, jnp.int32),
  )


def target(sites: Sites, sparsity: float) -> Target:
  """The budget of a sparsity, and those of the other resources."""
  found = _budgets(sites, sparsity)
  keep_K = [limit / (cost_S @ sites.units) for cost_S, limit in found]
  return Target(
    jnp.float32(sparsity),
    jnp.asarray(keep_K, jnp.float32),
    jnp.asarray(budget.wrap([limit for _, limit in found])),
  )


def _budgets(sites: Sites, sparsity: float) -> list[tuple[np.ndarray, int]]:
  """(cost of one unit [S], what units may cost) in integers, a budget each."""
  limit = sites.limit(sparsity) - sites.fixed
  # Alone, the parameters are counted exactly however many they are.
  if not sites.resources:
    return [(sites.unit_cost // sites.scale, limit // sites.scale)]
  others = [
    (resource.unit_cost, resource.limit(sites.units) - resource.fixed)
    for resource in sites.resources
  ]
  return [
    budget.integers(cost_S, limit, sites.units)
    for cost_S, limit in [(sites.unit_cost, limit), *others]
  ]


def counts_of(priority_S, target: Target, modules: Modules, *, low):
  """Priorities to counts [S], the budget met."""
  ratio_S = project(priority_S, target, modules, low=low)
  return counts(ratio_S, target, modules)


def project(priority_S, target: Target, modules: Modules, *, low):
  """`budget.project` on these modules."""
  return budget.project(
    priority_S,
    target.keep_K,
    share_KxS=modules.share_KxS,
    floor_S=modules.floor_ratio_S,
    low=low,
  )


def counts(ratio_S, target: Target, modules: Modules):
  """`budget.to_counts` on these modules."""
  return budget.to_counts(
    ratio_S,
    target.limit_K,
    units_S=modules.units_S,
    cost_KxS=modules.cost_KxS,
    step_S=modules.step_S,
    floor_S=modules.floor_S,
  )
