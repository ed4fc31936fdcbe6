"""Masks that refit: every candidate as calibration would leave it.

With H the inputs of an output projection in the order of the ranks, W its
weights and G + lambda = L L' for the Gram matrix G = H'H,

  H W = (H L'^-1) (L'W),

and since column i of H L'^-1 depends on the units up to i alone and all are
orthogonal under G + lambda, a mask of the first n columns leaves just what the
ridge regression of H W on the first n units predicts, shrunk to W. So one
Cholesky factor a sublayer, known before the search, serves every count: the
masks stay masks, and their gradient is that of the refit model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ffp_jax.models.decoder import Layer, Masks, ModelConfig
from ffp_jax.pruning import calibration
from ffp_jax.runtime.sharding import constrain


def refit_basis(gram_IxI, weight_IxD, rank_U, strength):
  """What to multiply inputs by, and the weights that belong to it.

  Args:
    gram_IxI: X'X of the sublayer's inputs.
    weight_IxD: W.
    rank_U: of the units, each I / U inputs.
    strength: of the ridge, a share of the mean diagonal.

  Returns:
    (refit [I,I], weights [I,D]), whose product is W; without effect on what
    a mask leaves where the factorisation fails.
  """
  size = len(gram_IxI) // len(rank_U)
  rank_I = (rank_U[:, None] * size + jnp.arange(size)).reshape(-1)
  order_I = jnp.argsort(rank_I)
  one = jnp.eye(len(gram_IxI))
  gram = gram_IxI[order_I][:, order_I]
  ridge = strength * jnp.trace(gram) / len(gram)
  lower = jnp.linalg.cholesky(gram + ridge * one)
  inverse = jax.scipy.linalg.solve_triangular(lower, one, lower=True)
  weight = jnp.matmul(
    lower.T, weight_IxD[order_I], precision=jax.lax.Precision.HIGHEST
  )
  works = jnp.all(jnp.isfinite(lower)) & jnp.all(jnp.isfinite(inverse))
  return (
    jnp.where(works, inverse.T[rank_I][:, rank_I], one),
    jnp.where(works, weight[rank_I], weight_IxD),
  )


@functools.partial(jax.jit, static_argnames=('config', 'strength'))
def _layer(params, stream_WxBxTxD, ranks, *, config, strength):
  """Returns (output projection, refit) of both, and the stream behind them."""
  layer = Layer(config, config.groups, config.ffn)
  found = []
  for rank_U, sublayer in zip(ranks, calibration.SUBLAYERS, strict=True):
    weight = sublayer.weight(params)
    entered = sublayer.enter(layer, params, stream_WxBxTxD)
    gram = calibration.input_moments(entered, weight).gram_IxI
    refit, weight = refit_basis(gram, weight, rank_U, strength)
    new = sublayer.with_weight(params, weight)[sublayer.name][
      sublayer.projection
    ]
    found.append((new, constrain(refit, 'embed', 'ffn').astype(new.dtype)))
    stream_WxBxTxD = sublayer.leave(
      layer, params, stream_WxBxTxD, entered, None
    )
  return found, stream_WxBxTxD


def refit_model(
  params, config, rank: Masks, tokens_WxBxT, *, strength
) -> tuple[ModelConfig, dict]:
  """The same decoder, but one whose masks refit.

  Args:
    params: of the dense decoder, stacked.
    config: its `ModelConfig`.
    rank: of the units; what masks keep must be a prefix of it.
    tokens_WxBxT: calibration tokens, in W batches.
    strength: of the ridge that calibration is likely to choose.

  Returns:
    (config, params); without masks the function is that of the dense decoder.
  """
  stream = calibration.embed_windows(params, tokens_WxBxT, config=config)
  layers = []
  for i in range(config.layers):
    at, ranks = jax.tree.map(lambda x, i=i: x[i], (params['stack'], rank))
    found, stream = _layer(
      at, stream, ranks, config=config, strength=float(strength)
    )
    layers.append(found)
  stack = params['stack']
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  for sublayer, (weight, refit) in zip(
    calibration.SUBLAYERS, stacked, strict=True
  ):
    new = {sublayer.projection: weight, 'refit': refit}
    stack = {**stack, sublayer.name: {**stack[sublayer.name], **new}}
  return dataclasses.replace(config, refit=True), {**params, 'stack': stack}
