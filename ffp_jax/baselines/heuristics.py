"""Allocations that cost no search: one rule, one answer.

Rules that compare units across sublayers sort all units by a standardised
score and keep the best that the budget can pay for. The scores only say how
many units a sublayer keeps; which ones is the shared ranking's.

Every function yields one allocation, counts [S]; the seed is not used.
"""

from collections.abc import Iterator

import numpy as np

from ffp_jax.baselines.problem import Problem


def uniform(problem: Problem, seed: int) -> Iterator[np.ndarray]:
  """Gives every sublayer the same ratio."""
  del seed
  yield problem.project(np.zeros(len(problem.sublayers.units)))


def ffn_only(problem: Problem, seed: int) -> Iterator[np.ndarray]:
  """Gives every FFN the same ratio, attention whole where the budget allows."""
  del seed
  attention, ffn = np.split(
    problem.sublayers.units * problem.sublayers.unit_cost, 2
  )
  ratio = (problem.limit - attention.sum()) / ffn.sum()
  ratio_L = np.full(len(ffn), ratio)
  yield problem.round_ratios(np.concatenate([np.ones(len(ffn)), ratio_L]))


def magnitude_global(problem: Problem, seed: int) -> Iterator[np.ndarray]:
  """Applies one threshold to standardised weight magnitudes.

  The magnitude of an input is the sum of |W| over outputs; standardised and
  compared as in FLAP.
  """
  del seed
  sums = [np.abs(_float(w)).sum(-1) for w in problem.weights]
  yield _threshold(problem, *sums)


def wanda_global(problem: Problem, seed: int) -> Iterator[np.ndarray]:
  """Applies one threshold to standardised Wanda scores (2306.11695, eq. 1).

  |W| times the root mean square of its input, summed over outputs;
  standardised and compared as in FLAP.
  """
  del seed
  norms = [np.sqrt(x) for x in problem.inputs().square]
  sums = [
    np.abs(_float(w)).sum(-1) * norm
    for w, norm in zip(problem.weights, norms, strict=True)
  ]
  yield _threshold(problem, *sums)


def flap(problem: Problem, seed: int) -> Iterator[np.ndarray]:
  """Applies FLAP's fluctuation (arXiv 2312.11983: metric WIFV, global AL-AM).

  The variance of an input times the sum of its squared weights; squared for
  attention, as in the authors' code. Departs from the paper in that the
  variance is over all calibration tokens at once, that units cost their own
  parameters, and that no bias is added, as all methods share one calibration.
  """
  del seed
  mean, square = problem.inputs()
  attention, ffn = (
    np.maximum(s - np.square(m), 0.0) * np.square(_float(w)).sum(-1)
    for w, m, s in zip(problem.weights, mean, square, strict=True)
  )
  yield _threshold(problem, np.square(attention), ffn)


def owl(
  problem: Problem, seed: int, *, outlier: float = 5.0, spread: float = 0.08
) -> Iterator[np.ndarray]:
  """Gives layers OWL's outlier-weighted ratios (arXiv 2310.05175).

  A layer's outliers are the weights whose Wanda score is above `outlier`
  times the layer's mean. Ratios are linear in the share of outliers and
  average to the target. Departs from the paper in that the scores of a layer
  are those of its two output projections, whose inputs are what is removed.

  Args:
    problem: the model and the budget.
    seed: not used.
    outlier: threshold, in means of the layer's scores.
    spread: half of the largest difference between two ratios.
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
  yield problem.round_ratios(np.concatenate([ratio_L, ratio_L]))


def depth(
  problem: Problem, seed: int, *, first: float = 0.25
) -> Iterator[np.ndarray]:
  """Removes more with the logarithm of depth.

  SlimGPT's incremental pruning ratio (arXiv 2412.18110): layer i of n removes
  r_0 + (r_{n-1} - r_0) * log(i + 1) / log(n), where r_{n-1} follows from the
  budget.

  Args:
    problem: the model and the budget.
    seed: not used.
    first: r_0 as a share of the target.
  """
  del seed
  layers = problem.sublayers.layers
  removed = 1.0 - problem.keep
  rise_L = np.log(np.arange(layers) + 1.0) / np.log(max(layers, 2))
  slope = (1.0 - first) * removed / max(rise_L.mean(), 1e-12)
  ratio_L = 1.0 - (first * removed + slope * rise_L)
  yield problem.round_ratios(np.concatenate([ratio_L, ratio_L]))


def _threshold(
  problem: Problem, attention_LxKxGxH: np.ndarray, ffn_LxF: np.ndarray
) -> np.ndarray:
  """Returns counts [S] of the units above one threshold on their scores.

  The scores of inputs are standardised within a sublayer (mean 0, standard
  deviation 1) and averaged over the inputs of a unit.

  Args:
    problem: the budget.
    attention_LxKxGxH: scores of the inputs of attention's output projection.
    ffn_LxF: scores of the inputs of the FFN's output projection.
  """
  scores = []
  for score in (attention_LxKxGxH, ffn_LxF):
    flat = score.reshape(len(score), -1).astype(np.float64)
    spread = np.maximum(flat.std(axis=1, keepdims=True), 1e-30)
    flat = (flat - flat.mean(axis=1, keepdims=True)) / spread
    scores.append(flat.reshape(*score.shape[:2], -1).mean(-1))
  layers = problem.sublayers.layers
  sublayer_U = np.concatenate(
    [
      np.repeat(np.arange(layers) + i * layers, score.shape[1])
      for i, score in enumerate(scores)
    ]
  )
  order_U = np.argsort(
    -np.concatenate([score.reshape(-1) for score in scores]), kind='stable'
  )
  sublayer_U = sublayer_U[order_U]  # best units first
  # Floors are paid for first, with the best units of each sublayer.
  rank_U = _rank_within(sublayer_U)
  free_U = rank_U < problem.sublayers.floor[sublayer_U]
  cost_U = problem.sublayers.unit_cost[sublayer_U]
  paid = problem.sublayers.floor @ problem.sublayers.unit_cost
  total_U = paid + np.cumsum(np.where(free_U, 0, cost_U))
  kept_U = sublayer_U[free_U | (total_U <= problem.limit)]
  count_S = np.bincount(kept_U, minlength=2 * layers)
  return problem.round_ratios(count_S / problem.sublayers.units)


def _rank_within(sublayer_U: np.ndarray) -> np.ndarray:
  """Returns how many units of the same sublayer come before each unit, [U]."""
  order = np.argsort(sublayer_U, kind='stable')
  starts = np.searchsorted(sublayer_U[order], sublayer_U[order])
  rank = np.empty(len(sublayer_U), np.int64)
  rank[order] = np.arange(len(sublayer_U)) - starts
  return rank


def _float(weight) -> np.ndarray:
  return np.asarray(weight, np.float32)
