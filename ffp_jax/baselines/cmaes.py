"""Separable CMA-ES over the priorities."""

from collections.abc import Iterator

import numpy as np

from ffp_jax.baselines.problem import Problem


def cmaes(
  problem: Problem, seed: int, *, std: float = 0.5, rows: int = 2
) -> Iterator[np.ndarray]:
  """Runs a diagonal CMA-ES (Ros and Hansen, PPSN 2008) of the package cma.

  All candidates of a generation are scored on the same new rows.

  Args:
    problem: scores the candidates.
    seed: seeds all draws.
    std: initial standard deviation of a priority.
    rows: rows of reward text per generation.

  Yields:
    The mean of the distribution, as counts [S], before each generation.
  """
  import cma  # optional

  rng = np.random.default_rng(seed)
  search = cma.CMAEvolutionStrategy(
    np.array(problem.start_S, np.float64),
    std,
    {
      'CMA_diagonal': True,
      'randn': lambda *shape: rng.standard_normal(shape),
      'seed': np.nan,  # leaves NumPy's global generator alone
      'verbose': -10,
    },
  )
  while True:
    yield problem.project(search.mean)
    priorities = search.ask()
    counts = [problem.project(priority_S) for priority_S in priorities]
    losses = problem.score(counts, problem.draw(rng, rows))
    search.tell(priorities, np.minimum(losses, 1e9).tolist())
