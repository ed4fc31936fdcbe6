"""Searches that propose, compare on the same rows and keep the best."""

import numpy as np

from ffp_jax.baselines.problem import Problem

_MOST_CHANGES = 10  # levels that one offspring may change, as EvoPress has it


def select(problem: Problem, source, counts, parent, *, survivors, rows):
  """The best of some candidates and the incumbent, by several stages.

  Multi-step selection (EvoPress, arXiv 2410.14649, algorithm 1): stage i
  scores what is left on rows[i] new rows and keeps survivors[i]. The
  incumbent joins the last stage, so that it is only replaced on the most
  text.

  Args:
    problem: what scores.
    source: a NumPy Generator, draws the rows.
    counts: candidates, each [S].
    parent: the incumbent [S].
    survivors: of each stage; the last is 1.
    rows: reward rows of each stage.

  Returns:
    Counts [S].
  """
  left = list(counts)
  for i, (keep, size) in enumerate(zip(survivors, rows, strict=True)):
    if i == len(survivors) - 1:
      left.append(parent)
    losses = problem.score(left, problem.draw(source, size))
    left = [left[n] for n in np.argsort(losses, kind='stable')[:keep]]
  return left[0]


def random(problem: Problem, seed: int, *, std, candidates, survivors, rows):
  """Priorities drawn around the start, `candidates` at a time."""
  source = np.random.default_rng(seed)
  best = problem.project(problem.start_S)
  while True:
    yield best
    noise = source.normal(0.0, std, (candidates, len(problem.start_S)))
    drawn = [problem.project(problem.start_S + row) for row in noise]
    best = select(problem, source, drawn, best, survivors=survivors, rows=rows)


def evopress(problem: Problem, seed: int, *, level, offspring, survivors, rows):
  """EvoPress: level switches and multi-step selection (arXiv 2410.14649).

  A level is the share `level` of a sublayer's units, at least one rounding
  step. One parent; each offspring raises one to three sublayers by a level
  and lowers others until the budget is met again, the variant of algorithm
  1 for sublayers of different sizes in the authors' code. Departs in the
  start, which all searches share, and in that what a switch leaves over is
  spent by the shared rounding.
  """
  source = np.random.default_rng(seed)
  sublayers = problem.sublayers
  step_S = np.maximum(1, np.round(level * sublayers.units / sublayers.step))
  level_S = (step_S * sublayers.step).astype(np.int64)
  parent = problem.project(problem.start_S)
  while True:
    yield parent
    born = {}
    for _ in range(100 * offspring):  # more than enough, if there are any
      child = _switched(problem, source, parent, level_S)
      if child is not None and not np.array_equal(child, parent):
        born[tuple(child)] = child
      if len(born) == offspring:
        break
    if not born:
      return
    parent = select(
      problem, source, born.values(), parent, survivors=survivors, rows=rows
    )


def _switched(problem, source, parent_S, level_S):
  """A mutant of the same budget, None where there were too many changes."""
  sublayers, count_S = problem.sublayers, np.array(parent_S, np.int64)
  raises = int(min(source.integers(1, 4, 2)))  # few are likelier
  for _ in range(raises):
    open_S = np.flatnonzero(count_S < sublayers.units)
    if not len(open_S):
      return None
    s = source.choice(open_S)
    count_S[s] = min(count_S[s] + level_S[s], sublayers.units[s])
  changes = raises
  while count_S @ sublayers.unit_cost > problem.limit:
    changes += 1
    open_S = np.flatnonzero(count_S > sublayers.floor)
    if changes > _MOST_CHANGES or not len(open_S):
      return None
    s = source.choice(open_S)
    count_S[s] = max(count_S[s] - level_S[s], sublayers.floor[s])
  return problem.fit(count_S / sublayers.units)


def eas(
  problem: Problem,
  seed: int,
  *,
  population,
  parents,
  mutation,
  rows,
):
  """Mutation and crossover of ratios (EAS, arXiv 2409.17372).

  A generation is one half mutants of the `parents` best so far, each sublayer
  redrawn with probability `mutation`, one half crossovers that take every
  sublayer from either of two. Departs in that the genes are priorities, so
  that the projection repairs every child instead of rejecting those that
  miss the budget, that redrawn genes lie around the shared start, and that
  the order of the units is the shared ranking's.
  """
  source = np.random.default_rng(seed)
  size = len(problem.start_S)
  text = problem.draw(source, rows)  # one text, as the best are kept for ever

  def redrawn(gene_S):
    fresh_S = problem.start_S + source.logistic(size=size)
    return np.where(source.random(size) < mutation, fresh_S, gene_S)

  def crossed(pool):
    a, b = (pool[source.integers(len(pool))] for _ in range(2))
    return np.where(source.random(size) < 0.5, a, b)

  start = problem.project(problem.start_S)
  yield start
  genes = [problem.start_S]
  losses = problem.score([start], text)
  while True:
    half = population // 2
    born = [redrawn(genes[source.integers(len(genes))]) for _ in range(half)]
    born += [crossed(genes) for _ in range(population - half)]
    new = problem.score([problem.project(gene) for gene in born], text)
    genes, losses = genes + born, np.concatenate([losses, new])
    order = np.argsort(losses, kind='stable')[:parents]
    genes, losses = [genes[i] for i in order], losses[order]
    yield problem.project(genes[0])
