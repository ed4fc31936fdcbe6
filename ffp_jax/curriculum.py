"""The curriculum: which sparsity and which reward text at which step."""

from typing import NamedTuple

import numpy as np


class Stage(NamedTuple):
  """A stretch of the search at one sparsity and one fidelity."""

  sparsity: float
  steps: int
  rows: int  # reward windows of the search's context, a candidate


def plan(config) -> list[Stage]:
  """The stages that `config.search` asks for; the last has the target."""
  c = config.search
  zipped = zip(c.sparsity_shares, c.steps, c.rows, strict=True)
  return [Stage(config.budget.sparsity * s, n, r) for s, n, r in zipped]


def ends(plan: list[Stage]) -> list[int]:
  """How many steps have been taken when each stage ends."""
  return np.cumsum([stage.steps for stage in plan]).tolist()


def stage_at(plan: list[Stage], step: int) -> tuple[int, Stage, bool]:
  """The stage of a step: its index, itself, whether the step is its first."""
  after = ends(plan)
  index = int(np.searchsorted(after, step, side='right'))
  return index, plan[index], step == after[index] - plan[index].steps


def draw(rows_RxT, step: int, rows: int, seed: int) -> np.ndarray:
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
