"""Allocations from the losses of sublayers that are pruned one at a time."""

import numpy as np

from ffp_jax.baselines.problem import Problem

_LEAST = 1e-3  # nats; smaller losses of one sublayer are noise
_BUCKETS = 10_000  # of the knapsack's budget, if its costs don't divide it


def proportional(problem: Problem, seed: int, *, probe: float):
  """Each sublayer gives in inverse proportion to what it loses.

  One sublayer at a time keeps the share `probe` (Li et al., arXiv 1608.08710,
  section 3.2, do so by eye); a sublayer then gives up parameters in inverse
  proportion to its loss for each parameter that the probe removed, as far
  as its floor.
  """
  sublayers = problem.sublayers
  probes = [
    [_rounded(sublayers, s, probe)] for s in range(len(sublayers.units))
  ]
  yield problem.project(problem.start_S)
  harms = _probe_each(problem, np.random.default_rng(seed), probes)
  cost_S = sublayers.units * sublayers.unit_cost
  removed_S = cost_S - np.concatenate(probes) * sublayers.unit_cost
  rate_S = np.maximum(np.concatenate(harms), _LEAST) / removed_S
  most_S = (sublayers.units - sublayers.floor) * sublayers.unit_cost
  aim = cost_S.sum() - problem.limit
  give_S = _shared_out(1.0 / rate_S, most_S, aim)
  yield problem.fit(1.0 - give_S / cost_S)


def _shared_out(weight_S, most_S, aim: float):
  """Shares in proportion to weights, none over its most, that sum to `aim`."""
  share_S = np.zeros(len(weight_S))
  open_S = np.ones(len(weight_S), bool)
  while True:
    rest = aim - share_S[~open_S].sum()
    share_S[open_S] = rest * weight_S[open_S] / weight_S[open_S].sum()
    over_S = open_S & (share_S > most_S)
    share_S = np.minimum(share_S, most_S)
    open_S &= ~over_S
    if not over_S.any() or not open_S.any():
      return share_S


def knapsack(problem: Problem, seed: int, *, ratios: tuple[float, ...]):
  """Additive losses, minimised exactly by dynamic programming.

  Every sublayer is scored alone at each of `ratios` and at the lowest; the
  levels whose losses sum to the least within the budget are the answer (the
  dynamic programme of SPDY, arXiv 2201.13096, on the block scores of Puzzle,
  arXiv 2411.19146). Departs in that a score is the loss on the reward text.
  """
  sublayers = problem.sublayers
  levels = [
    sorted(
      {_rounded(sublayers, s, ratio) for ratio in (*ratios, problem.min_ratio)}
    )
    for s in range(len(sublayers.units))
  ]
  yield problem.project(problem.start_S)
  harms = [
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
  picks = least(harms, costs, problem.limit)
  count_S = np.array([row[i] for row, i in zip(counts, picks, strict=True)])
  yield problem.fit(count_S / sublayers.units)


def least(values, costs, limit: int) -> list[int]:
  """One item of each group, the smallest sum of values within a budget.

  Exact if the costs have a common divisor of at least limit / _BUCKETS, else
  costs are rounded up to that, and the budget still holds.

  Args:
    values: of each group's items, finite.
    costs: of the same, integers.
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


def _rounded(sublayers, s: int, ratio: float) -> int:
  """The count next to a ratio, fewer than all units."""
  step = int(sublayers.step[s])
  most = (int(sublayers.units[s]) - 1) // step * step
  count = round(ratio * sublayers.units[s] / step) * step
  return int(np.clip(count, min(sublayers.floor[s], most), most))


def _probe_each(problem: Problem, source, levels) -> list[np.ndarray]:
  """What each sublayer loses at each of its counts, the others whole.

  All on the same rows, as many as the budget pays for, or on the beginning of
  one where it doesn't pay for a whole. A loss that isn't finite is very large.
  """
  units = problem.sublayers.units
  candidates = [units]
  for s, row in enumerate(levels):
    for count in row:
      one = units.copy()
      one[s] = count
      candidates.append(one)
  each = problem.left // len(candidates)  # tokens; two give one loss
  length = max(2, min(problem.rows_RxT.shape[1], each))
  rows = problem.draw(source, max(1, each // length))[:, :length]
  losses = np.minimum(problem.score(candidates, rows), 1e9)
  ends = np.cumsum([len(row) for row in levels])
  return np.split(losses[1:] - losses[0], ends[:-1])
