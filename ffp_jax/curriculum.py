"""The curriculum: which sparsity and which reward text at which step."""

from typing import NamedTuple

import numpy as np


class Stage(NamedTuple):
  """A stretch of the search at one sparsity and one fidelity."""

  sparsity: float
  steps: int
  windows: int  # reward windows that score a candidate


def stages(sparsity, *, shares, steps, windows) -> list[Stage]:
  """The curriculum: shares of the target sparsity, each with its fidelity."""
  zipped = zip(shares, steps, windows, strict=True)
  return [Stage(sparsity * share, n, w) for share, n, w in zipped]


def stage_at(stages: list[Stage], step: int) -> tuple[int, Stage, bool]:
  """The stage of a step: its index, itself, whether the step is its first."""
  ends = np.cumsum([stage.steps for stage in stages])
  index = int(np.searchsorted(ends, step, side='right'))
  return index, stages[index], step == ends[index] - stages[index].steps


def draw(reward_WxT, step: int, *, windows: int, seed: int) -> np.ndarray:
  """The reward windows of a step, [windows,T], known from step and seed.

  Passes over the reward text in a new order each time, so every window is
  used before any is used again.
  """
  total = len(reward_WxT)
  places = step * windows + np.arange(windows)
  rows = [
    np.random.default_rng((seed, place // total)).permutation(total)[
      place % total
    ]
    for place in places
  ]
  return reward_WxT[np.array(rows)]
