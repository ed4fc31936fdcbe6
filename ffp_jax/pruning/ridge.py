"""Ridge regression of an output projection on the inputs that remain.

One Cholesky factorisation per strength serves all outputs. Shape letters: I
inputs and D outputs of an output projection.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.runtime import linear_algebra

_MAX_TRIES = 9  # of a factorisation, each with ten times the strength


class Moments(NamedTuple):
  """Second moments of an output projection's inputs X and targets Y."""

  gram_IxI: jax.Array  # X'X, summed over tokens
  cross_IxD: jax.Array  # X'Y


def ridge_regression(
  moments: Moments,
  weight_IxD: jax.Array,
  mask_I: jax.Array,
  strength: float | jax.Array,
) -> jax.Array:
  """Returns the kept rows that best predict the target, shrunk to the weights.

  They minimise |X M W' - Y|^2 + lambda |W' - W|^2 over the kept rows, where
  lambda is `strength` times the mean diagonal of the kept Gram matrix, raised
  tenfold until the factorisation succeeds.

  Args:
    moments: X'X and X'Y over the calibration tokens.
    weight_IxD: W.
    mask_I: the diagonal of M, where 1 keeps an input.
    strength: positive.

  Returns:
    W' [I,D]; the rows of removed inputs are zero.
  """
  mask_Ix1 = mask_I[:, None]
  kept = moments.gram_IxI * mask_Ix1 * mask_I
  kept_weight = weight_IxD * mask_Ix1
  predicted = linear_algebra.product(moments.gram_IxI, kept_weight)
  residual = (moments.cross_IxD - predicted) * mask_Ix1
  mean = jnp.trace(kept) / jnp.maximum(jnp.sum(mask_I), 1.0)

  def failed(carry):
    tries, _, change = carry
    return (tries < _MAX_TRIES) & ~jnp.all(jnp.isfinite(change))

  def solve(carry):
    tries, strength, _ = carry
    ridge_I = jnp.where(mask_I > 0, strength * mean + 1e-30, 1.0)
    lower = linear_algebra.cholesky(kept + jnp.diag(ridge_I))
    change = linear_algebra.cholesky_solve(lower, residual)
    return tries + 1, strength * 10.0, change

  start = (0, jnp.float32(strength), jnp.full_like(residual, jnp.nan))
  _, _, change = jax.lax.while_loop(failed, solve, start)
  return kept_weight + jnp.where(jnp.isfinite(change), change, 0.0) * mask_Ix1


def squared_error(moments: Moments, weight_IxD: jax.Array) -> jax.Array:
  """Returns |X W - Y|^2, less the constant |Y|^2; scalar."""
  fitted = linear_algebra.product(moments.gram_IxI, weight_IxD)
  return jnp.sum(weight_IxD * (fitted - 2.0 * moments.cross_IxD))


def select_strength(
  fit: Moments,
  check: Moments,
  weight_IxD: jax.Array,
  mask_I: jax.Array,
  strengths: Sequence[float],
) -> tuple[jax.Array, jax.Array]:
  """Returns the best weights of ridge at each strength, and of no change.

  Args:
    fit: moments of the calibration tokens.
    check: moments of the validation tokens, which decide.
    weight_IxD: W.
    mask_I: 1 keeps an input.
    strengths: candidates for `ridge_regression`, in any order.

  Returns:
    (W' [I,D], index of the strength, -1 for no change).
  """
  kept = weight_IxD * mask_I[:, None]

  def keep_better(best, item):
    index, strength = item
    weight = ridge_regression(fit, weight_IxD, mask_I, strength)
    loss = squared_error(check, weight)
    better = loss < best[0]
    new = (loss, index, weight)
    return jax.tree.map(lambda n, o: jnp.where(better, n, o), new, best), None

  start = (squared_error(check, kept), jnp.int32(-1), kept)
  items = (jnp.arange(len(strengths)), jnp.asarray(strengths, jnp.float32))
  (_, index, weight), _ = jax.lax.scan(keep_better, start, items)
  return weight, index


def upper_gram(x_NxI: jax.Array, bands: int = 4) -> jax.Array:
  """Returns the upper triangle of the Gram matrix X'X, [I,I].

  It is computed in bands of rows, each from the diagonal on, which takes little
  more than half the products. What is below the diagonal has no meaning.

  Args:
    x_NxI: N vectors, float32.
    bands: number of them.
  """
  size = x_NxI.shape[1]
  rows = []
  for band in np.array_split(np.arange(size), min(bands, size)):
    start, end = band[0], band[-1] + 1
    product = linear_algebra.product(x_NxI[:, start:end].T, x_NxI[:, start:])
    rows.append(jnp.pad(product, ((0, 0), (start, 0))))
  return jnp.concatenate(rows)


def mirror(upper_IxI: jax.Array) -> jax.Array:
  """Returns the symmetric matrix of an upper triangle."""
  return jnp.triu(upper_IxI) + jnp.triu(upper_IxI, 1).T
