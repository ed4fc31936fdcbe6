"""FastForward Pruning: this package's search, and the search as published.

Source of both: arXiv 2511.18977.
"""

import math
from collections.abc import Iterator, Sequence

import ml_collections
import numpy as np

from ffp_jax import config as config_lib
from ffp_jax.baselines.problem import Problem
from ffp_jax.pruning import curriculum, search


def shipped(
  problem: Problem, seed: int, *, config: ml_collections.ConfigDict
) -> Iterator[np.ndarray]:
  """Runs this package's search, with as many steps as the budget pays for.

  The stages keep their shares of the steps. The finalists are re-scored on
  the whole reward text, as in `prune.rescore`, if that leaves as many steps
  as are configured.

  Args:
    problem: scores the candidates and the finalists.
    seed: seeds the search.
    config: of a run of `prune.py`; its seed, sparsity and steps are not used.

  Yields:
    The start, the policy's mean after each step, and the best finalist, as
    counts [S].
  """
  config = config.copy_and_resolve_references()
  config.seed, config.budget.sparsity = seed, problem.sparsity
  prior = config.search.attention_prior
  yield problem.project(search.initial_priorities(problem.sublayers, prior))
  if config_lib.refits(config):
    problem = problem.refit()
  reward_tokens = problem.rows_RxT.size
  room = problem.left - reward_tokens  # the dense model's loss
  spare = room - (1 + config.search.finalists) * reward_tokens
  enough = _tokens(config, curriculum.stages(config))
  config.search.steps = _affordable_steps(
    config, spare if spare >= enough else room
  )
  if not sum(config.search.steps):
    return
  finalists_MxS = np.empty((0, len(problem.sublayers.units)))
  for state in _search(problem, config):
    finalists_MxS = search.finalists(config, problem.sublayers, state)
    yield problem.project(finalists_MxS[0])
  counts = [problem.project(priority_S) for priority_S in finalists_MxS]
  counts = list({tuple(count_S): count_S for count_S in counts}.values())
  yield counts[np.argmin(problem.score(counts, problem.rows_RxT))]


def _search(
  problem: Problem, config: ml_collections.ConfigDict
) -> Iterator[search.SearchState]:
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
  for stage in curriculum.stages(config):
    for _ in range(stage.steps):
      problem.charge(_tokens(config, [stage._replace(steps=1)]))
      yield next(steps)[0]


def _affordable_steps(
  config: ml_collections.ConfigDict, tokens: int
) -> tuple[int, ...]:
  """Returns the steps of each stage, scaled to what `tokens` pay for.

  What rounding leaves over goes to the last stage.
  """
  stages = curriculum.stages(config)
  scale = max(0, tokens) / _tokens(config, stages)
  scaled = [stage._replace(steps=int(scale * stage.steps)) for stage in stages]
  rest = max(0, tokens) - _tokens(config, scaled)
  *steps, last = (stage.steps for stage in scaled)
  return *steps, last + rest // _tokens(config, [stages[-1]._replace(steps=1)])


def _tokens(
  config: ml_collections.ConfigDict, stages: Sequence[curriculum.Stage]
) -> int:
  """Returns the tokens that the steps of some stages evaluate."""
  return search.search_cost(config, stages)['tokens_evaluated']


def published(
  problem: Problem,
  seed: int,
  *,
  config: ml_collections.ConfigDict,
  stairs: int = 4,
  first_share: float = 0.05,
  repair: str = 'cut',
) -> Iterator[np.ndarray]:
  """Runs the published search, `config.PUBLISHED`, as far as the budget goes.

  The sparsity climbs to the target in equal stairs, and the share of the
  reward text rises with the cube of the progress, both over the budget of
  tokens instead of episodes.

  Args:
    problem: scores the candidates.
    seed: seeds the search.
    config: of a run of `prune.py`, for what is not published.
    stairs: number of equal steps in which the sparsity rises.
    first_share: share of the reward text at first.
    repair: how proposals meet the budget, see `allocation.project`.

  Yields:
    The start, then after each step the best proposal so far of the last
    stair, or before it the policy's mean, as counts [S].
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
  states = _search(problem, config)
  for (share, _), state in zip(plan, states, strict=True):
    mean_S, *best = search.finalists(config, problem.sublayers, state)
    best_S = best[0] if best and share == 1.0 else mean_S
    yield problem.project(best_S, repair)


def _stairs(
  problem: Problem, candidates: int, stairs: int, first_share: float
) -> list[tuple[float, int]]:
  """Plans the steps that the budget pays for.

  No step takes more than half of a stair's tokens, so that a small budget
  reaches the last stair too.

  Returns:
    (share of the sparsity, rows of reward text) of each step.
  """
  rows, context = problem.rows_RxT.shape
  row_tokens = candidates * context
  room = problem.left - problem.rows_RxT.size  # the dense model's loss
  most = max(1, room // (2 * stairs * row_tokens))
  used, plan = 0, []
  while True:
    progress = used / max(1, room)
    share = first_share + (1.0 - first_share) * progress**3
    count = min(most, math.ceil(share * rows))
    used += count * row_tokens
    if used > room:
      return plan
    plan.append((min(stairs, 1 + int(progress * stairs)) / stairs, count))
