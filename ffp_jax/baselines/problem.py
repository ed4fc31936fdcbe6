"""The problem that an allocation method solves, and the meter that bounds it.

A method is a generator function of a `Problem`, a seed and settings by name. It
yields its incumbent, counts [S] within the budget, whenever it has one. The
last one is its answer. It may go on for ever: `Problem.charge` ends it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models import functional
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import allocation, masks
from ffp_jax.pruning.sublayers import Sublayers


class OutOfTokens(Exception):
  """The next evaluation would exceed the budget; it was not made."""


class Inputs(NamedTuple):
  """Moments of the inputs of the output projections over calibration tokens.

  Attributes:
    mean: (attention [L,K,G,H], FFN [L,F]).
    square: mean of the squares, in the same shapes.
  """

  mean: tuple[np.ndarray, np.ndarray]
  square: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
  """One model, one sparsity, one budget of evaluated tokens.

  Attributes:
    sublayers: what may be removed.
    device_sublayers: the same on the device, and the ranks of the units.
    sparsity: target sparsity.
    min_ratio: smallest ratio that a priority or a search can ask for.
    start_S: priorities around which the searches start.
    rows_RxT: token ids of the reward text.
    nll: (params, tokens [B,T], Masks or None) -> losses [B], in nats.
    params: parameters of the dense decoder.
    weights: output projections, (attention [L,K,G,H,D], FFN [L,F,D]).
    input_moments: () -> `Inputs` of the dense decoder.
    refit_model: () -> (nll, params) that score candidates as calibration will
      leave them, see `refit.refit_model`.
    measure_tokens: tokens that calling either of the two costs.
    tokens: the budget.
    spent: tokens of each charge so far, shared by copies of the problem.
  """

  sublayers: Sublayers
  device_sublayers: allocation.DeviceSublayers
  sparsity: float
  min_ratio: float
  start_S: np.ndarray
  rows_RxT: np.ndarray
  nll: Callable
  params: dict
  weights: tuple
  input_moments: Callable[[], Inputs]
  refit_model: Callable[[], tuple]
  measure_tokens: int
  tokens: int
  spent: list[int] = dataclasses.field(default_factory=list)

  @property
  def limit(self) -> int:
    """Most parameters of what is kept, without those never removed."""
    return self.sublayers.limit(self.sparsity) - self.sublayers.fixed

  @property
  def keep(self) -> float:
    """The limit as a share of all parameters that could be removed."""
    return self.limit / (self.sublayers.total - self.sublayers.fixed)

  def at(self, sparsity: float) -> 'Problem':
    """Returns the same problem at another sparsity, on the same meter."""
    return dataclasses.replace(self, sparsity=sparsity)

  @property
  def used(self) -> int:
    """Tokens that have been evaluated."""
    return sum(self.spent)

  @property
  def left(self) -> int:
    """Tokens that may still be evaluated."""
    return self.tokens - self.used

  def charge(self, tokens: int) -> None:
    """Counts tokens that are about to be evaluated.

    Raises:
      OutOfTokens: fewer are left; nothing is counted.
    """
    if tokens > self.left:
      raise OutOfTokens(f'{tokens} tokens asked, {self.left} left')
    self.spent.append(tokens)

  def inputs(self) -> Inputs:
    """Returns moments of the dense decoder on calibration text; charged."""
    self.charge(self.measure_tokens)
    return self.input_moments()

  def refit(self) -> 'Problem':
    """Returns the same problem with candidates scored calibrated; charged."""
    self.charge(self.measure_tokens)
    nll, params = self.refit_model()
    return dataclasses.replace(self, nll=nll, params=params)

  def draw(self, rng: np.random.Generator, rows: int) -> np.ndarray:
    """Returns different rows of reward text [rows,T]; all if fewer exist."""
    count = min(rows, len(self.rows_RxT))
    return self.rows_RxT[rng.permutation(len(self.rows_RxT))[:count]]

  def score(
    self, counts_NxS: Sequence[np.ndarray], rows_RxT: np.ndarray
  ) -> np.ndarray:
    """Returns mean losses [N] of candidates on the same rows; charged.

    Non-finite losses become +inf, so they sort last.

    Raises:
      OutOfTokens: fewer tokens are left; no candidate is scored.
    """
    means = np.mean(self.losses(counts_NxS, rows_RxT), axis=1)
    return np.where(np.isfinite(means), means, np.inf)

  def losses(
    self, counts_NxS: Sequence[np.ndarray], rows_RxT: np.ndarray
  ) -> np.ndarray:
    """Returns losses [N,R] of candidates on each of the same rows; charged.

    Raises:
      OutOfTokens: fewer tokens are left; no candidate is scored.
    """
    rows_RxT = np.asarray(rows_RxT)
    self.charge(len(counts_NxS) * rows_RxT.size)
    losses = [
      [
        _loss(
          self.nll,
          self.params,
          row,
          self.device_sublayers.rank,
          jnp.asarray(count),
        )
        for row in rows_RxT
      ]
      for count in counts_NxS
    ]
    return np.array(jax.device_get(losses), np.float64)

  def project(
    self, priority_S: np.ndarray, repair: str = 'project'
  ) -> np.ndarray:
    """Returns counts [S] of priorities that meet the budget.

    Args:
      priority_S: any finite numbers.
      repair: how they meet the budget, see `allocation.project`.
    """
    return allocation.priorities_to_counts(
      priority_S,
      self.sparsity,
      self.sublayers,
      self.device_sublayers,
      min_ratio=self.min_ratio,
      repair=repair,
    )

  def round_ratios(self, ratio_S: np.ndarray) -> np.ndarray:
    """Returns counts [S] that meet the budget, of ratios that nearly do."""
    return allocation.round_ratios(ratio_S, self.sparsity, self.sublayers)


def score_calibrated(
  allocate: Callable, problem: Problem, seed: int
) -> Iterator[np.ndarray]:
  """Runs an allocator on candidates scored as calibration will leave them."""
  yield problem.project(problem.start_S)
  yield from allocate(problem.refit(), seed)


def trace_incumbents(
  allocate: Callable[[Problem, int], Iterator[np.ndarray]],
  problem: Problem,
  seed: int,
) -> list[tuple[int, np.ndarray]]:
  """Runs a method until it ends or its tokens do.

  Returns:
    (tokens used so far, counts [S]) of each new incumbent, the answer last.
  """
  trace = []
  try:
    for counts in allocate(problem, seed):
      if not trace or not np.array_equal(counts, trace[-1][1]):
        trace.append((problem.used, counts))
  except OutOfTokens:
    pass
  return trace


def input_moments(
  config: ModelConfig, params: dict, tokens_WxT: np.ndarray
) -> Inputs:
  """Returns float32 moments of a decoder's inputs on a text."""

  def sums(x):
    x = x.astype(jnp.float32)
    return jnp.stack([jnp.sum(x, (0, 1)), jnp.sum(jnp.square(x), (0, 1))])

  capture = jax.jit(functional.make_capture(config, sums))
  totals = [capture(params, row[None]) for row in tokens_WxT]
  mean = jax.tree.map(lambda *x: np.sum(x, axis=0) / tokens_WxT.size, *totals)
  return Inputs(*(tuple(x[:, i] for x in mean) for i in range(2)))


@functools.partial(jax.jit, static_argnames='nll')
def _loss(
  nll: Callable, params: dict, row_T, rank: Masks, count_S
) -> jax.Array:
  """Returns the loss of one row; compiled once for all methods and batches."""
  return nll(params, row_T[None], masks.from_counts(rank, count_S))[0]
