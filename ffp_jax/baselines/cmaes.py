"""Separable CMA-ES over the priorities."""

import numpy as np

from ffp_jax.baselines.problem import Problem


def cmaes(problem: Problem, seed: int, *, std: float, rows: int):
  """A diagonal CMA-ES (Ros and Hansen, PPSN 2008) by the package cma.

  All candidates of a generation are scored on the same new rows; the
  incumbent is the mean of the distribution.

  Args:
    problem: what scores.
    seed: of the draws.
    std: of a priority, at first.
    rows: of reward text, a generation.
  """
  import cma  # optional

  source = np.random.default_rng(seed)
  search = cma.CMAEvolutionStrategy(
    np.array(problem.start_S, np.float64),
    std,
    {
      'CMA_diagonal': True,
      'randn': lambda *shape: source.standard_normal(shape),
      'seed': np.nan,  # leaves NumPy's global generator alone
      'verbose': -10,
    },
  )
  while True:
    yield problem.project(search.mean)
    priority = search.ask()
    counts = [problem.project(row) for row in priority]
    losses = problem.score(counts, problem.draw(source, rows))
    search.tell(priority, np.minimum(losses, 1e9).tolist())
