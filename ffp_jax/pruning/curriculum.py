"""The curriculum: which sparsity and which reward text at which step."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Stage(NamedTuple):
  """A stretch of the search at one sparsity and one fidelity."""

  sparsity: float
  steps: int
  rows: int  # reward windows of the search's context, a candidate


def stages(config) -> list[Stage]:
  """The stages that `config.search` asks for; the last has the target."""
  c = config.search
  zipped = zip(c.sparsity_shares, c.steps, c.rows, strict=True)
  return [Stage(config.budget.sparsity * s, n, r) for s, n, r in zipped]


def staircase(steps: Iterable[tuple[float, int]]) -> dict:
  """Groups steps into stages, as `config.search` names them.

  Args:
    steps: of each, (share of the target sparsity, rows of reward text).
  """
  groups = [(*key, len([*same])) for key, same in itertools.groupby(steps)]
  shares, rows, counts = zip(*groups, strict=True)
  return {'sparsity_shares': shares, 'rows': rows, 'steps': counts}


def published(
  steps: int, episodes: int, *, stairs: int, first: float, full: int, rows: int
) -> dict:
  """Returns the published curriculum, as `config.search` names it.

  The sparsity climbs to the target in equal stairs. The share of the reward
  text grows from `first` to all along a cube; rows are rounded down to a
  power of two, as every number of them is compiled.

  Args:
    steps: of the search.
    episodes: proposals a step.
    stairs: of the sparsity.
    first: share of the reward text at first.
    full: episodes after which all of it is used.
    rows: of all of it.
  """

  def rows_at(step):
    share = first + (1.0 - first) * min(1.0, step * episodes / full) ** 3
    some = 2 ** int(np.log2(max(1.0, share * rows)))
    return rows if share == 1.0 else some

  return staircase(
    ((1 + step * stairs // steps) / stairs, rows_at(step))
    for step in range(steps)
  )


def boundaries(plan: list[Stage]) -> list[int]:
  """How many steps have been taken when each stage ends."""
  return np.cumsum([stage.steps for stage in plan]).tolist()


def stage_at(plan: list[Stage], step: int) -> tuple[int, Stage, bool]:
  """The stage of a step: its index, itself, whether the step is its first."""
  after = boundaries(plan)
  index = int(np.searchsorted(after, step, side='right'))
  return index, plan[index], step == after[index] - plan[index].steps


def reward_rows(rows_RxT, step: int, rows: int, seed: int) -> np.ndarray:
  """The reward rows of a step, [rows,T], known from step and seed.

  Goes through the text in a new order on each pass; a pass ends when fewer
  than `rows` rows are left, so a step never holds a row twice. `rows` is at
  most R, as config.py makes sure.
  """
  steps = len(rows_RxT) // rows
  order = np.random.default_rng((seed, step // steps)).permutation(
    len(rows_RxT)
  )
  at = step % steps * rows
  return rows_RxT[order[at : at + rows]]
