"""Allocations from the losses of sublayers that are pruned one at a time."""

from collections.abc import Iterator, Sequence

import numpy as np

from ffp_jax.baselines.problem import Problem
from ffp_jax.pruning.sublayers import Sublayers

_MIN_INCREASE = 1e-3  # nats; a smaller increase of the loss is noise
_BUCKETS = 10_000  # of the knapsack's budget, if its costs don't divide it


def proportional(
  problem: Problem, seed: int, *, probe: float = 0.5
) -> Iterator[np.ndarray]:
  """Removes from sublayers in inverse proportion to what removal costs.

  One sublayer at a time is pruned alone (Li et al., arXiv 1608.08710, section
  3.2, who then allocate by eye). A sublayer gives up parameters in inverse
  proportion to the increase of the loss per parameter that the probe removed,
  as far as its floor.

  Args:
    problem: scores the probes.
    seed: draws the rows of reward text.
    probe: ratio of the sublayer that is pruned alone.

  Yields:
    The shared start, then the answer, as counts [S].
  """
  sublayers = problem.sublayers
  probes = [
    [_to_count(sublayers, s, probe)] for s in range(len(sublayers.units))
  ]
  yield problem.project(problem.start_S)
  increases = _probe_each(problem, np.random.default_rng(seed), probes)
  cost_S = sublayers.units * sublayers.unit_cost
  probed_S = cost_S - np.concatenate(probes) * sublayers.unit_cost
  rate_S = np.maximum(np.concatenate(increases), _MIN_INCREASE) / probed_S
  most_S = (sublayers.units - sublayers.floor) * sublayers.unit_cost
  total = cost_S.sum() - problem.limit
  removed_S = _share_out(1.0 / rate_S, most_S, total)
  yield problem.round_ratios(1.0 - removed_S / cost_S)


def _share_out(
  weight_S: np.ndarray, most_S: np.ndarray, total: float
) -> np.ndarray:
  """Returns shares of `total` in proportion to weights, at most `most_S`."""
  share_S = np.zeros(len(weight_S))
  open_S = np.ones(len(weight_S), bool)
  while True:
    rest = total - share_S[~open_S].sum()
    share_S[open_S] = rest * weight_S[open_S] / weight_S[open_S].sum()
    over_S = open_S & (share_S > most_S)
    share_S = np.minimum(share_S, most_S)
    open_S &= ~over_S
    if not over_S.any() or not open_S.any():
      return share_S


def knapsack(
  problem: Problem,
  seed: int,
  *,
  ratios: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85),
) -> Iterator[np.ndarray]:
  """Minimises a sum of losses exactly, by dynamic programming.

  Every sublayer is pruned alone to each of `ratios` and to the lowest; the
  answer are the levels whose increases of the loss have the smallest sum
  within the budget (the dynamic programme of SPDY, arXiv 2201.13096, on the
  block scores of Puzzle, arXiv 2411.19146). Departs from them in that a score
  is the loss on the reward text.

  Args:
    problem: scores the sublayers.
    seed: draws the rows of reward text.
    ratios: levels of every sublayer besides the lowest and the whole.

  Yields:
    The shared start, then the answer, as counts [S].
  """
  sublayers = problem.sublayers
  levels = [
    sorted(
      {_to_count(sublayers, s, ratio) for ratio in (*ratios, problem.min_ratio)}
    )
    for s in range(len(sublayers.units))
  ]
  yield problem.project(problem.start_S)
  increases = [
    [*row, 0.0]
    for row in _probe_each(problem, np.random.default_rng(seed), levels)
  ]
  counts = [
    [*row, units] for row, units in zip(levels, sublayers.units, strict=True)
  ]
  costs = [
    np.array(row) * cost
    for row, cost in zip(counts, sublayers.unit_cost, strict=True)
  ]
  picks = solve_knapsack(increases, costs, problem.limit)
  count_S = np.array([row[i] for row, i in zip(counts, picks, strict=True)])
  yield problem.round_ratios(count_S / sublayers.units)


def solve_knapsack(
  values: Sequence[Sequence[float]],
  costs: Sequence[np.ndarray],
  limit: int,
) -> list[int]:
  """Picks one item of each group, for the least sum of values in a budget.

  Exact if the costs have a common divisor of at least limit / _BUCKETS, else
  costs are rounded up to that, and the budget still holds.

  Args:
    values: of each group's items, finite.
    costs: of the same items, integers.
    limit: of the sum of costs.

  Returns:
    The item's index for each group; the cheapest ones if none fit together.
  """
  every = np.concatenate(costs)
  unit = max(int(np.gcd.reduce(every)), limit // _BUCKETS)
  size = limit // unit + 1
  best_B = np.zeros(size)  # the least value at a cost of at most b units
  taken = []
  for value, cost in zip(values, costs, strict=True):
    options = np.full((len(value), size), np.inf)
    for i, (v, c) in enumerate(zip(value, cost, strict=True)):
      place = -(-int(c) // unit)
      if place < size:
        options[i, place:] = best_B[: size - place] + v
    taken.append(np.argmin(options, axis=0))
    best_B = options.min(axis=0)
  if not np.isfinite(best_B[-1]):
    return [int(np.argmin(cost)) for cost in costs]
  picks, b = [], size - 1
  for choice, cost in zip(reversed(taken), reversed(costs), strict=True):
    picks.append(int(choice[b]))
    b -= -(-int(cost[picks[-1]]) // unit)
  return picks[::-1]


def _to_count(sublayers: Sublayers, s: int, ratio: float) -> int:
  """Returns the count nearest to a ratio that removes at least one step."""
  step = int(sublayers.step[s])
  most = (int(sublayers.units[s]) - 1) // step * step
  count = round(ratio * sublayers.units[s] / step) * step
  return int(np.clip(count, min(sublayers.floor[s], most), most))


def _probe_each(
  problem: Problem, rng: np.random.Generator, levels: list[list[int]]
) -> list[np.ndarray]:
  """Measures the increase of the loss when one sublayer alone is pruned.

  All losses are on the same rows, as many as the budget pays for, or on the
  beginning of one row where it does not pay for a whole one. Losses that are
  not finite count as 1e9.

  Args:
    problem: scores the candidates.
    rng: draws the rows.
    levels: counts of each sublayer to try.

  Returns:
    For each sublayer, the increase at each of its counts, in nats.
  """
  units = problem.sublayers.units
  candidates = [units]
  for s, row in enumerate(levels):
    for count in row:
      one = units.copy()
      one[s] = count
      candidates.append(one)
  # Tokens per candidate; a loss takes at least two.
  each = problem.left // len(candidates)
  length = max(2, min(problem.rows_RxT.shape[1], each))
  rows = problem.draw(rng, max(1, each // length))[:, :length]
  losses = np.minimum(problem.score(candidates, rows), 1e9)
  ends = np.cumsum([len(row) for row in levels])
  return np.split(losses[1:] - losses[0], ends[:-1])
