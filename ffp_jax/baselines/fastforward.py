"""FastForward Pruning: as this package has it, and as its authors published.

Source of both: arXiv 2511.18977.
"""

import math

import numpy as np

from ffp_jax import config as config_lib
from ffp_jax.baselines.problem import Problem
from ffp_jax.pruning import curriculum, search


def shipped(problem: Problem, seed: int, *, config):
  """`search.steps` with the numbers of steps that the budget pays for.

  The shares of the stages stay; the finalists are re-scored on the whole
  reward text, as in `prune.rescore`, where that leaves as many steps as are
  configured. Until then the incumbent is the policy's mean.

  Args:
    problem: what scores.
    seed: of the search.
    config: of a run of `prune.py`; its seed, sparsity and steps are not used.
  """
  config = config.copy_and_resolve_references()
  config.seed, config.budget.sparsity = seed, problem.sparsity
  prior = config.search.attention_prior
  yield problem.project(search.initial_priorities(problem.sublayers, prior))
  if config_lib.refits(config):
    problem = problem.refit()
  whole = problem.rows_RxT.size
  room = problem.left - whole
  spare = room - (1 + config.search.finalists) * whole
  enough = search.search_cost(config, curriculum.stages(config))[
    'tokens_evaluated'
  ]
  config.search.steps = _affordable(config, spare if spare >= enough else room)
  if not sum(config.search.steps):
    return
  for state in _searched(problem, config):
    found = search.finalists(config, problem.sublayers, state)
    yield problem.project(found[0])
  counts = list({tuple(c): c for c in map(problem.project, found)}.values())
  yield counts[np.argmin(problem.score(counts, problem.rows_RxT))]


def _searched(problem: Problem, config):
  """Yields the state after each step, which is charged before it is taken."""
  dense = problem.losses([problem.sublayers.units], problem.rows_RxT)[0]
  steps = search.steps(
    config,
    problem.sublayers,
    problem.device_sublayers,
    problem.nll,
    problem.params,
    search.RewardText(problem.rows_RxT, dense),
    search.initial_state(config, problem.sublayers),
  )
  for tokens in _costs(config):
    problem.charge(tokens)
    yield next(steps)[0]


def _affordable(config, tokens: int) -> tuple[int, ...]:
  """The configured steps, scaled to what `tokens` pay for.

  What is left by rounding goes to the last stage.
  """

  def cost(stages):
    return search.search_cost(config, stages)['tokens_evaluated']

  plan = curriculum.stages(config)
  scale = max(0, tokens) / cost(plan)
  scaled = [stage._replace(steps=int(scale * stage.steps)) for stage in plan]
  rest = max(0, tokens) - cost(scaled)
  *steps, last = (stage.steps for stage in scaled)
  return *steps, last + rest // cost([plan[-1]._replace(steps=1)])


def _costs(config) -> list[int]:
  """Tokens of each step."""
  out = []
  for stage in curriculum.stages(config):
    one = [stage._replace(steps=1)]
    out += stage.steps * [search.search_cost(config, one)['tokens_evaluated']]
  return out


def published(
  problem: Problem,
  seed: int,
  *,
  config,
  stairs: int,
  first_share: float,
  repair: str,
):
  """The search as published, `config.PUBLISHED`, at what the budget pays for.

  The sparsity climbs to the target in equal stairs, the share of the reward
  text from `first_share` to all along a cube, both over the budget of tokens
  instead of episodes. The answer is the best proposal of the last stage,
  before the last stair the policy's mean.

  Args:
    problem: what scores.
    seed: of the search.
    config: of a run of `prune.py`, for what isn't published.
    stairs: of the sparsity.
    first_share: of the reward text at first.
    repair: how proposals meet the budget, see `allocation.project`.
  """
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(config_lib.PUBLISHED)
  config.seed, config.budget.sparsity = seed, problem.sparsity
  config.search.repair = repair
  yield problem.project(
    search.initial_priorities(problem.sublayers, 0.0), repair
  )
  plan = _stairs(problem, config.search.candidates, stairs, first_share)
  if not plan:
    return
  config.search.update(curriculum.staircase(plan))
  states = _searched(problem, config)
  for (share, _), state in zip(plan, states, strict=True):
    mean_S, *best = search.finalists(config, problem.sublayers, state)
    best_S = best[0] if best and share == 1.0 else mean_S
    yield problem.project(best_S, repair)


def _stairs(problem, candidates, stairs, first_share) -> list:
  """(share of the sparsity, rows) of the steps that the budget pays for.

  No step takes more than half a stair's tokens, so that a small budget gets
  to the last stair too.
  """
  rows, context = problem.rows_RxT.shape
  each = candidates * context
  room = problem.left - problem.rows_RxT.size  # the dense model's loss
  most = max(1, room // (2 * stairs * each))
  used, plan = 0, []
  while True:
    progress = used / max(1, room)
    share = first_share + (1.0 - first_share) * progress**3
    count = min(most, math.ceil(share * rows))
    used += count * each
    if used > room:
      return plan
    plan.append((min(stairs, 1 + int(progress * stairs)) / stairs, count))
