"""The curriculum: the sparsity and the reward text of every step."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict


class Stage(NamedTuple):
  """Consecutive steps of the search with the same sparsity and text length."""

  sparsity: float
  steps: int
  rows: int  # rows of `search.context` tokens that each candidate is scored on


def stages(config: ConfigDict) -> list[Stage]:
  """Returns the stages configured in `config.search`.

  The last one has the target sparsity.
  """
  c = config.search
  zipped = zip(c.sparsity_shares, c.steps, c.rows, strict=True)
  return [Stage(config.budget.sparsity * s, n, r) for s, n, r in zipped]


def staircase(steps: Iterable[tuple[float, int]]) -> dict:
  """Groups equal consecutive steps into stages.

  Args:
    steps: (share of the target sparsity, rows of reward text) of each step.

  Returns:
    The `sparsity_shares`, `rows` and `steps` of `config.search`.
  """
  groups = [(*key, len([*same])) for key, same in itertools.groupby(steps)]
  shares, rows, counts = zip(*groups, strict=True)
  return {'sparsity_shares': shares, 'rows': rows, 'steps': counts}


def published(
  steps: int, episodes: int, *, stairs: int, first: float, full: int, rows: int
) -> dict:
  """Returns the published curriculum.

  The sparsity climbs to the target in equal stairs. The share of the reward
  text grows from `first` to 1 with the cube of the episode; the number of rows
  is rounded down to a power of two, because each one has to be compiled.

  Args:
    steps: number of steps of the search.
    episodes: proposals per step.
    stairs: number of stairs of the sparsity.
    first: share of the reward text that the first step is scored on.
    full: number of episodes after which the whole text is used.
    rows: rows of the whole text.

  Returns:
    The `sparsity_shares`, `rows` and `steps` of `config.search`.
  """

  def rows_at(step):
    share = first + (1.0 - first) * min(1.0, step * episodes / full) ** 3
    power_of_two = 2 ** int(np.log2(max(1.0, share * rows)))
    return rows if share == 1.0 else power_of_two

  return staircase(
    ((1 + step * stairs // steps) / stairs, rows_at(step))
    for step in range(steps)
  )


def boundaries(stages: list[Stage]) -> list[int]:
  """Returns the number of steps taken when each stage ends."""
  return np.cumsum([stage.steps for stage in stages]).tolist()


def stage_at(stages: list[Stage], step: int) -> tuple[int, Stage, bool]:
  """Returns (index, stage, whether `step` is the stage's first) of a step."""
  ends = boundaries(stages)
  index = int(np.searchsorted(ends, step, side='right'))
  return index, stages[index], step == ends[index] - stages[index].steps


def reward_rows(
  rows_RxT: np.ndarray, step: int, rows: int, seed: int
) -> np.ndarray:
  """Returns the reward rows of a step, [rows,T].

  The text is passed over in a new random order each time; a pass ends when
  fewer than `rows` rows are left, so a step never holds a row twice. The rows
  depend on the arguments alone, so that a search can resume at any step.

  Args:
    rows_RxT: the whole reward text, or anything with a leading axis of rows.
    step: number of the step, from 0.
    rows: number of rows to return, at most R, as config.py checks.
    seed: of the run.
  """
  steps_per_pass = len(rows_RxT) // rows
  order = np.random.default_rng((seed, step // steps_per_pass)).permutation(
    len(rows_RxT)
  )
  start = step % steps_per_pass * rows
  return rows_RxT[order[start : start + rows]]
