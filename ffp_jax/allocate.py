"""Priorities to counts on the modules of one model, at one sparsity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ffp_jax import budget
from ffp_jax.model import Masks
from ffp_jax.sites import Sites


class Modules(NamedTuple):
  """`Sites` as the arrays that run on the device, and the units' ranks."""

  rank: Masks
  share_S: jax.Array
  floor_ratio_S: jax.Array
  units_S: jax.Array
  cost_S: jax.Array
  step_S: jax.Array
  floor_S: jax.Array


class Target(NamedTuple):
  """One sparsity, in the forms that the step needs."""

  sparsity: jax.Array
  keep: jax.Array  # share of the removable cost
  limit: jax.Array  # in units of `Sites.scale`, from `budget.wrap`


def modules(sites: Sites, rank: Masks) -> Modules:
  """Puts `sites` and the ranks of the units on the device."""
  removable = sites.units * sites.unit_cost
  return Modules(
    rank=rank,
    share_S=jnp.asarray(removable / removable.sum(), jnp.float32),
    floor_ratio_S=jnp.asarray(sites.floor / sites.units, jnp.float32),
    units_S=jnp.asarray(sites.units, jnp.int32),
    cost_S=jnp.asarray(budget.wrap(sites.unit_cost // sites.scale)),
    step_S=jnp.asarray(sites.step, jnp.int32),
    floor_S=jnp.asarray(sites.floor, jnp.int32),
  )


def target(sites: Sites, sparsity: float) -> Target:
  """The budget of a sparsity."""
  limit = sites.limit(sparsity) - sites.fixed
  removable = sites.total - sites.fixed
  return Target(
    jnp.float32(sparsity),
    jnp.float32(limit / removable),
    jnp.asarray(budget.wrap(limit // sites.scale)),
  )


def counts_of(priority_S, target: Target, modules: Modules, *, low):
  """Priorities to counts [S], the budget met."""
  ratio_S = project(priority_S, target, modules, low=low)
  return counts(ratio_S, target, modules)


def project(priority_S, target: Target, modules: Modules, *, low):
  """`budget.project` on these modules."""
  return budget.project(
    priority_S,
    target.keep,
    share_S=modules.share_S,
    floor_S=modules.floor_ratio_S,
    low=low,
  )


def counts(ratio_S, target: Target, modules: Modules):
  """`budget.to_counts` on these modules."""
  return budget.to_counts(
    ratio_S,
    target.limit,
    units_S=modules.units_S,
    cost_S=modules.cost_S,
    step_S=modules.step_S,
    floor_S=modules.floor_S,
  )
