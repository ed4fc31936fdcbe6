"""Searches that propose, compare on the same rows and keep the best."""

from collections.abc import Iterable, Iterator

import numpy as np

from ffp_jax.baselines.problem import Problem

_MAX_CHANGES = 10  # levels that one offspring may change, as in EvoPress


def select(
  problem: Problem,
  rng: np.random.Generator,
  counts: Iterable[np.ndarray],
  parent: np.ndarray,
  *,
  survivors: tuple[int, ...],
  rows: tuple[int, ...],
) -> np.ndarray:
  """Returns the best of some candidates and the incumbent, in several stages.

  Multi-step selection (EvoPress, arXiv 2410.14649, algorithm 1): stage i
  scores the remaining candidates on rows[i] new rows and keeps survivors[i].
  The incumbent joins the last stage, so that it is only replaced on the most
  text.

  Args:
    problem: scores the candidates.
    rng: draws the rows.
    counts: candidates, each [S].
    parent: the incumbent [S].
    survivors: candidates that each stage keeps; the last is 1.
    rows: rows of reward text of each stage.

  Returns:
    Counts [S].
  """
  left = list(counts)
  for i, (keep, size) in enumerate(zip(survivors, rows, strict=True)):
    if i == len(survivors) - 1:
      left.append(parent)
    losses = problem.score(left, problem.draw(rng, size))
    left = [left[n] for n in np.argsort(losses, kind='stable')[:keep]]
  return left[0]


def random(
  problem: Problem,
  seed: int,
  *,
  std: float = 0.5,
  candidates: int = 8,
  survivors: tuple[int, ...] = (2, 1),
  rows: tuple[int, ...] = (1, 4),
) -> Iterator[np.ndarray]:
  """Draws priorities around the start, always from the same distribution.

  Args:
    problem: scores the candidates.
    seed: seeds all draws.
    std: standard deviation of a priority.
    candidates: draws per round.
    survivors: see `select`.
    rows: see `select`.

  Yields:
    The best counts [S] so far, before each round.
  """
  rng = np.random.default_rng(seed)
  best = problem.project(problem.start_S)
  while True:
    yield best
    noise = rng.normal(0.0, std, (candidates, len(problem.start_S)))
    drawn = [problem.project(problem.start_S + row) for row in noise]
    best = select(problem, rng, drawn, best, survivors=survivors, rows=rows)


def evopress(
  problem: Problem,
  seed: int,
  *,
  level: float = 0.1,
  offspring: int = 8,
  survivors: tuple[int, ...] = (2, 1),
  rows: tuple[int, ...] = (1, 4),
) -> Iterator[np.ndarray]:
  """Runs EvoPress: level switches and multi-step selection (2410.14649).

  Each offspring of the one parent raises one to three sublayers by a level
  and lowers others until the budget is met again: the variant of algorithm 1
  for sublayers of different sizes in the authors' code. Departs from it in
  the start, which all searches share, and in that the shared rounding spends
  what a switch leaves over.

  Args:
    problem: scores the candidates.
    seed: seeds all draws.
    level: units of a level as a share of the sublayer's units; a level is at
      least one rounding step.
    offspring: different candidates per generation.
    survivors: see `select`.
    rows: see `select`.

  Yields:
    The parent's counts [S], before each generation; ends where no switch
    leads to another allocation.
  """
  rng = np.random.default_rng(seed)
  sublayers = problem.sublayers
  step_S = np.maximum(1, np.round(level * sublayers.units / sublayers.step))
  level_S = (step_S * sublayers.step).astype(np.int64)
  parent = problem.project(problem.start_S)
  while True:
    yield parent
    children = {}
    for _ in range(100 * offspring):  # ample if there are any
      child = _switch_levels(problem, rng, parent, level_S)
      if child is not None and not np.array_equal(child, parent):
        children[tuple(child)] = child
      if len(children) == offspring:
        break
    if not children:
      return
    parent = select(
      problem, rng, children.values(), parent, survivors=survivors, rows=rows
    )


def _switch_levels(
  problem: Problem,
  rng: np.random.Generator,
  parent_S: np.ndarray,
  level_S: np.ndarray,
) -> np.ndarray | None:
  """Returns a mutant of the same budget, None after too many changes."""
  sublayers, count_S = problem.sublayers, np.array(parent_S, np.int64)
  raises = int(min(rng.integers(1, 4, 2)))  # favours few
  for _ in range(raises):
    open_S = np.flatnonzero(count_S < sublayers.units)
    if not len(open_S):
      return None
    s = rng.choice(open_S)
    count_S[s] = min(count_S[s] + level_S[s], sublayers.units[s])
  changes = raises
  while count_S @ sublayers.unit_cost > problem.limit:
    changes += 1
    open_S = np.flatnonzero(count_S > sublayers.floor)
    if changes > _MAX_CHANGES or not len(open_S):
      return None
    s = rng.choice(open_S)
    count_S[s] = max(count_S[s] - level_S[s], sublayers.floor[s])
  return problem.round_ratios(count_S / sublayers.units)


def eas(
  problem: Problem,
  seed: int,
  *,
  population: int = 8,
  parents: int = 4,
  mutation: float = 0.2,
  rows: int = 8,
) -> Iterator[np.ndarray]:
  """Runs mutation and crossover of ratios (EAS, arXiv 2409.17372).

  Half of a generation are mutants, each of one of the best so far; half are
  crossovers, which take every sublayer from one of two of them. Departs from
  the paper in that the genes are priorities, so that the projection repairs
  every child instead of rejecting those that miss the budget, that redrawn
  genes lie around the shared start, and that the order of the units is the
  shared ranking's.

  Args:
    problem: scores the candidates.
    seed: seeds all draws.
    population: children per generation.
    parents: number of the best that are kept for the next generation.
    mutation: probability that a mutant's sublayer is redrawn.
    rows: rows of reward text, the same for all generations.

  Yields:
    The best counts [S] so far, first and after each generation.
  """
  rng = np.random.default_rng(seed)
  size = len(problem.start_S)
  # One text for all, as the losses of the best are kept.
  text = problem.draw(rng, rows)

  def mutate(gene_S):
    fresh_S = problem.start_S + rng.logistic(size=size)
    return np.where(rng.random(size) < mutation, fresh_S, gene_S)

  def cross(pool):
    a, b = (pool[rng.integers(len(pool))] for _ in range(2))
    return np.where(rng.random(size) < 0.5, a, b)

  start = problem.project(problem.start_S)
  yield start
  genes = [problem.start_S]
  losses = problem.score([start], text)
  while True:
    half = population // 2
    children = [mutate(genes[rng.integers(len(genes))]) for _ in range(half)]
    children += [cross(genes) for _ in range(population - half)]
    new = problem.score([problem.project(gene) for gene in children], text)
    genes, losses = genes + children, np.concatenate([losses, new])
    order = np.argsort(losses, kind='stable')[:parents]
    genes, losses = [genes[i] for i in order], losses[order]
    yield problem.project(genes[0])
