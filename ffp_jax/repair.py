"""What calibration will leave of the harm that a removed unit does.

A module loses its units from the last rank on. With G the Gram matrix of its
inputs in the order of the ranks, W its output weights and G + lambda = L L',
a refit of the kept rows leaves of the removed ones (r) the error

  W_r' (Schur complement of G_rr) W_r = |rows r of L'W|^2 - lambda |W_r|^2,

as the trailing block of a Cholesky factor is that of the Schur complement. So
one factorisation tells for every count at once what removing the next unit
adds, refit or not.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ffp_jax import calibrate
from ffp_jax.model import Layer, Masks

_LEAST = 0.05  # of what is left; a refit never mends all on other text


class Harm(NamedTuple):
  """Squared error of a module's output that a unit adds as the next to go."""

  plain: Masks  # kept weights as they are
  mended: Masks  # kept weights refit


def unknown(rank: Masks) -> Harm:
  """As if nothing could be mended."""
  ones = jax.tree.map(jnp.ones_like, rank)
  return Harm(ones, ones)


def left(harm: Harm, near: Masks):
  """Share of the harm that is left around a cut, in (0, 1].

  Args:
    harm: of every unit.
    near: 1 for the units around the cut of their module.

  Returns:
    float32 (attention [L], ffn [L]).
  """

  def share(plain, mended, near):
    plain, mended = (jnp.sum(x * near, -1) for x in (plain, mended))
    return jnp.clip(mended / jnp.maximum(plain, 1e-30), _LEAST, 1.0)

  return tuple(map(share, *harm, near))


def marginals(gram_IxI, weight_IxD, rank_U, strength):
  """What each unit adds to the error when all of later ranks are gone.

  Args:
    gram_IxI: X'X of the module's inputs.
    weight_IxD: W.
    rank_U: of the units, each I / U inputs.
    strength: of the ridge, a share of the mean diagonal.

  Returns:
    (plain, mended), float32 [U], by unit.
  """
  size = len(gram_IxI) // len(rank_U)
  order_U = jnp.argsort(rank_U)
  order_I = (order_U[:, None] * size + jnp.arange(size)).reshape(-1)
  gram = gram_IxI[order_I][:, order_I]
  weight = weight_IxD[order_I]
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  ridge = strength * jnp.trace(gram) / len(gram)
  lower = jnp.linalg.cholesky(gram + ridge * jnp.eye(len(gram)))
  square = jnp.sum(jnp.square(weight), -1)
  mended = jnp.sum(jnp.square(product(lower.T, weight)), -1) - ridge * square
  later = product(jnp.triu(gram, 1), weight)
  plain = jnp.diagonal(gram) * square + 2.0 * jnp.sum(weight * later, -1)

  def by_unit(x_I):
    summed = x_I.reshape(-1, size).sum(-1)
    return jnp.zeros(len(rank_U)).at[order_U].set(summed)

  # A factorisation that failed tells nothing: as if nothing were mended.
  mended = jnp.where(jnp.isfinite(mended), mended, plain)
  return by_unit(plain), by_unit(mended)


@functools.partial(jax.jit, static_argnames=('config', 'strength'))
def _layer(params, stream_WxBxTxD, ranks, *, config, strength):
  """Both halves of a layer: marginals, and the stream behind it."""
  layer = Layer(config, config.groups, config.ffn)
  found = []
  for rank_U, half in zip(ranks, calibrate.HALVES, strict=True):
    weight = half.weight(params)
    entered = half.enter(layer, params, stream_WxBxTxD)
    gram = calibrate.moments(entered, None, weight).gram_IxI
    found.append(marginals(gram, weight, rank_U, strength))
    stream_WxBxTxD = half.leave(layer, params, stream_WxBxTxD, entered, None)
  return found, stream_WxBxTxD


def foresee(params, config, rank: Masks, tokens_WxBxT, *, strength) -> Harm:
  """The harm of every unit, on the stream of the dense model.

  Args:
    params: of the dense decoder, stacked.
    config: its `ModelConfig`.
    rank: of the units.
    tokens_WxBxT: calibration tokens, in W batches.
    strength: of the ridge that calibration is likely to choose.
  """
  stream = calibrate.embed(params, tokens_WxBxT, config=config)
  layers = []
  for i in range(config.layers):
    at, ranks = jax.tree.map(lambda x, i=i: x[i], (params['stack'], rank))
    found, stream = _layer(
      at, stream, ranks, config=config, strength=float(strength)
    )
    layers.append(found)
  (plain_a, mended_a), (plain_f, mended_f) = jax.tree.map(
    lambda *x: jnp.stack(x), *layers
  )
  return Harm(Masks(plain_a, plain_f), Masks(mended_a, mended_f))
