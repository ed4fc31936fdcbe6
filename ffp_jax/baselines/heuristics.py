"""Allocations that cost no search: one rule, one answer.

Rules that compare units across sublayers keep, of all units sorted by a
standardised score, the best that the budget can pay for. The scores only
say how many units a sublayer keeps; which ones is the shared ranking's.
"""

import numpy as np

from ffp_jax.baselines.problem import Problem


def uniform(problem: Problem, seed: int):
  """One ratio for every sublayer."""
  del seed
  yield problem.project(np.zeros(len(problem.sublayers.units)))


def ffn_only(problem: Problem, seed: int):
  """One ratio for every FFN, attention kept whole where the budget allows."""
  del seed
  attention, ffn = np.split(
    problem.sublayers.units * problem.sublayers.unit_cost, 2
  )
  ratio = (problem.limit - attention.sum()) / ffn.sum()
  yield problem.fit(_both(np.ones(len(ffn)), np.full(len(ffn), ratio)))


def magnitude_global(problem: Problem, seed: int):
  """One threshold over standardised weight magnitudes.

  The magnitude of an input is the sum of |W| over outputs; standardised and
  compared as FLAP does.
  """
  del seed
  sums = [np.abs(_float(w)).sum(-1) for w in problem.weights]
  yield _thresholded(problem, *sums)


def wanda_global(problem: Problem, seed: int):
  """One threshold over standardised Wanda scores (arXiv 2306.11695, eq. 1).

  |W| times the root mean square of its input, summed over outputs;
  standardised and compared as FLAP does.
  """
  del seed
  norms = [np.sqrt(x) for x in problem.inputs().square]
  sums = [
    np.abs(_float(w)).sum(-1) * norm
    for w, norm in zip(problem.weights, norms, strict=True)
  ]
  yield _thresholded(problem, *sums)


def flap(problem: Problem, seed: int):
  """FLAP's fluctuation (arXiv 2312.11983: the metric WIFV, global AL-AM).

  The variance of an input times the sum of its squared weights; squared for
  attention, as the authors' code does. Departs in that the variance is over
  all calibration tokens at once, that units cost their own parameters, and
  that no bias is added, as every method shares one calibration.
  """
  del seed
  mean, square = problem.inputs()
  attention, ffn = (
    np.maximum(s - np.square(m), 0.0) * np.square(_float(w)).sum(-1)
    for w, m, s in zip(problem.weights, mean, square, strict=True)
  )
  yield _thresholded(problem, np.square(attention), ffn)


def owl(problem: Problem, seed: int, *, outlier: float, spread: float):
  """OWL's outlier-weighted ratios (arXiv 2310.05175).

  A layer's outliers are the weights whose Wanda score is above `outlier`
  times the layer's mean; ratios differ by at most 2 * `spread`, linearly in
  the share of outliers, and average to the target. Departs in that the
  layer is its two output projections, whose units are what is removed.
  """
  del seed
  norms = [np.sqrt(x) for x in problem.inputs().square]
  scores = [
    (np.abs(_float(w)) * norm[..., None]).reshape(len(w), -1)
    for w, norm in zip(problem.weights, norms, strict=True)
  ]
  score_LxW = np.concatenate(scores, axis=1)
  mean_L = score_LxW.mean(axis=1, keepdims=True)
  share_L = np.mean(score_LxW > outlier * mean_L, axis=1)
  width = max(float(np.ptp(share_L)), 1e-12)
  ratio_L = (share_L - share_L.min()) / width * 2.0 * spread
  ratio_L += problem.keep - ratio_L.mean()
  yield problem.fit(_both(ratio_L, ratio_L))


def depth(problem: Problem, seed: int, *, first: float):
  """A sparsity that grows with the logarithm of depth.

  SlimGPT's incremental pruning ratio (arXiv 2412.18110): layer
  i of n removes r_0 + (r_{n-1} - r_0) * log(i + 1) / log(n). `first` is r_0
  as a share of the target; r_{n-1} follows from the budget.
  """
  del seed
  layers = problem.sublayers.layers
  removed = 1.0 - problem.keep
  rise_L = np.log(np.arange(layers) + 1.0) / np.log(max(layers, 2))
  slope = (1.0 - first) * removed / max(rise_L.mean(), 1e-12)
  ratio_L = 1.0 - (first * removed + slope * rise_L)
  yield problem.fit(_both(ratio_L, ratio_L))


def _thresholded(problem, attention_LxKxGxH, ffn_LxF):
  """Counts of the units above one threshold on standardised scores.

  Inputs are standardised within a sublayer (mean 0, standard deviation 1) and
  averaged over the inputs of a unit.
  """
  scores = []
  for score in (attention_LxKxGxH, ffn_LxF):
    flat = score.reshape(len(score), -1).astype(np.float64)
    spread = np.maximum(flat.std(axis=1, keepdims=True), 1e-30)
    flat = (flat - flat.mean(axis=1, keepdims=True)) / spread
    scores.append(flat.reshape(*score.shape[:2], -1).mean(-1))
  layers = problem.sublayers.layers
  site_U = np.concatenate(
    [
      np.repeat(np.arange(layers) + i * layers, score.shape[1])
      for i, score in enumerate(scores)
    ]
  )
  order_U = np.argsort(
    -np.concatenate([score.reshape(-1) for score in scores]), kind='stable'
  )
  # Floors are paid for first, with the best units of each sublayer.
  rank_U = _places(site_U[order_U])
  free_U = rank_U < problem.sublayers.floor[site_U[order_U]]
  cost_U = problem.sublayers.unit_cost[site_U[order_U]]
  paid = problem.sublayers.floor @ problem.sublayers.unit_cost
  total_U = paid + np.cumsum(np.where(free_U, 0, cost_U))
  kept_U = site_U[order_U][free_U | (total_U <= problem.limit)]
  count_S = np.bincount(kept_U, minlength=2 * layers)
  return problem.fit(count_S / problem.sublayers.units)


def _places(site_U):
  """How many of the same site come before each."""
  order = np.argsort(site_U, kind='stable')
  starts = np.searchsorted(site_U[order], site_U[order])
  place = np.empty(len(site_U), np.int64)
  place[order] = np.arange(len(site_U)) - starts
  return place


def _float(weight):
  return np.asarray(weight, np.float32)


def _both(attention_L, ffn_L):
  return np.concatenate([attention_L, ffn_L])
