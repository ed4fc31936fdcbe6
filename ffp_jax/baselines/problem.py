"""What an allocator works on, and the meter that bounds it.

An allocator is a generator function: (problem, seed, settings by name) ->
its incumbent, counts [S] within the budget, each time that it has one. The
last one is its answer. It may go on for ever: `Problem.charge` ends it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import allocation, masks
from ffp_jax.pruning.sublayers import Sublayers


class OutOfTokens(Exception):
  """The next evaluation would go over the budget; it wasn't made."""


class Inputs(NamedTuple):
  """Moments of what enters the output projections, over calibration tokens.

  Both hold (attention [L,K,G,H], ffn [L,F]).
  """

  mean: tuple
  square: tuple  # mean of squares


@dataclasses.dataclass(frozen=True)
class Problem:
  """One model, one sparsity, one budget of evaluated tokens.

  Attributes:
    sublayers: the sublayers.
    device_sublayers: the same on the device, and the ranks of the units.
    sparsity: the target.
    min_ratio: smallest ratio that a priority or a search can ask for.
    start_S: priorities around which the searches start.
    rows_RxT: reward text.
    nll: (params, tokens [B,T], Masks or None) -> losses [B].
    params: of the dense decoder.
    weights: (attention out [L,K,G,H,D], ffn down [L,F,D]).
    input_moments: () -> `Inputs` of the dense decoder.
    refit_model: () -> (nll, params) of `refit.refit_model`.
    measure_tokens: what calling either costs.
    tokens: the budget.
    spent: what has been charged, in turn.
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
    """What the counts may cost: parameters, without those never removed."""
    return self.sublayers.limit(self.sparsity) - self.sublayers.fixed

  @property
  def keep(self) -> float:
    """The limit as a share of all that could be removed."""
    return self.limit / (self.sublayers.total - self.sublayers.fixed)

  def at(self, sparsity: float) -> 'Problem':
    """The same at another sparsity, on the same meter."""
    return dataclasses.replace(self, sparsity=sparsity)

  @property
  def used(self) -> int:
    return sum(self.spent)

  @property
  def left(self) -> int:
    return self.tokens - self.used

  def charge(self, tokens: int):
    """Counts tokens that are about to be evaluated.

    Raises:
      OutOfTokens: they are more than is left; nothing is counted.
    """
    if tokens > self.left:
      raise OutOfTokens(f'{tokens} tokens asked, {self.left} left')
    self.spent.append(tokens)

  def inputs(self) -> Inputs:
    """Statistics of the dense decoder on the calibration text, charged."""
    self.charge(self.measure_tokens)
    return self.input_moments()

  def refit(self) -> 'Problem':
    """The same, but candidates are scored calibrated; charged."""
    self.charge(self.measure_tokens)
    nll, params = self.refit_model()
    return dataclasses.replace(self, nll=nll, params=params)

  def draw(self, source, rows: int) -> np.ndarray:
    """Different reward rows, as many as asked for or there are, [r,T]."""
    count = min(rows, len(self.rows_RxT))
    return self.rows_RxT[source.permutation(len(self.rows_RxT))[:count]]

  def score(self, counts_NxS, rows_RxT) -> np.ndarray:
    """Mean losses [N] of candidates on the same rows, charged at once.

    A loss that isn't finite is infinite, and so sorts last.
    """
    means = np.mean(self.losses(counts_NxS, rows_RxT), axis=1)
    return np.where(np.isfinite(means), means, np.inf)

  def losses(self, counts_NxS, rows_RxT) -> np.ndarray:
    """Losses [N,R] of candidates on each of the same rows, charged at once."""
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

  def project(self, priority_S, repair='project') -> np.ndarray:
    """Counts of priorities, the budget met as `allocation.project` says."""
    return allocation.priorities_to_counts(
      priority_S,
      self.sparsity,
      self.sublayers,
      self.device_sublayers,
      min_ratio=self.min_ratio,
      repair=repair,
    )

  def fit(self, ratio_S) -> np.ndarray:
    """Returns counts of ratios that about meet the budget."""
    return allocation.round_ratios(ratio_S, self.sparsity, self.sublayers)


@functools.partial(jax.jit, static_argnames='nll')
def _loss(nll, params, row_T, rank: Masks, count_S):
  """Loss of one row: one compilation serves every batch of every method."""
  return nll(params, row_T[None], masks.from_counts(rank, count_S))[0]
