"""Makes every masked candidate equal to its ridge-calibrated model.

With H the inputs of an output projection in the order of the ranks, W its
weights, G = H'H their Gram matrix, and G + lambda = L L',

  H W = (H L'^-1) (L'W).

Column i of H L'^-1 depends on the units up to i alone, and all columns are
orthonormal under G + lambda. The first n columns therefore leave what the ridge
regression of H W on the first n units, shrunk to W, predicts: H W less what the
other columns, of the removed units, give (`models/removed.py`). One Cholesky
factor per sublayer, known before the search, serves every count; the masks stay
masks, and their gradient is that of the refit model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Layer, Masks, ModelConfig
from ffp_jax.models.removed import FACTORS, Refit, store, to_blocks
from ffp_jax.pruning import calibration
from ffp_jax.runtime import linear_algebra, sharding
from ffp_jax.runtime.compiling import BRIEFLY


def refit_factors(
  gram_IxI: jax.Array, weight_IxD: jax.Array, rank_U: jax.Array, strength: float
) -> Refit:
  """Returns the change of basis, and the weights in that basis.

  I inputs, D outputs, U units.

  Args:
    gram_IxI: Gram matrix of the inputs of the output projection, H'H.
    weight_IxD: its weights, W.
    rank_U: ranks of the units, each of which has I / U inputs.
    strength: of the ridge, as a share of the mean diagonal of the Gram matrix.

  Returns:
    L'^-1 and L'W, in blocks. If the factorisation fails, the identity and W:
    masks then do not refit.
  """
  size = len(gram_IxI) // len(rank_U)
  rank_I = (rank_U[:, None] * size + jnp.arange(size)).reshape(-1)
  order_I = jnp.argsort(rank_I)
  identity = jnp.eye(len(gram_IxI))
  gram = gram_IxI[order_I][:, order_I]
  ridge = strength * jnp.trace(gram) / len(gram)
  lower = linear_algebra.cholesky(gram + ridge * identity)
  inverse = linear_algebra.invert_lower(lower)
  ordered = weight_IxD[order_I]
  valid = jnp.all(jnp.isfinite(lower)) & jnp.all(jnp.isfinite(inverse))
  return to_blocks(
    jnp.where(valid, inverse.T, identity)[rank_I],
    jnp.where(valid, linear_algebra.product(lower.T, ordered), ordered),
    jnp.argsort(rank_U),
  )


@functools.partial(
  jax.jit,
  static_argnames=('config', 'strength'),
  donate_argnames='stream_WxBxTxD',
  compiler_options=BRIEFLY,
)
def refit_layer(params, stream_WxBxTxD, ranks, *, config, strength):
  """Refits both sublayers of a layer.

  Args:
    params: of the layer.
    stream_WxBxTxD: the residual stream before the layer; its memory is given to
      the one behind it.
    ranks: of the units, (attention [K], ffn [F]).
    config: `ModelConfig` of the dense decoder.
    strength: of the ridge.

  Returns:
    (new parameters of attention and FFN by the sublayer's name, the residual
    stream behind the layer).
  """
  layer = Layer(config, config.groups, config.ffn)
  refits = {}
  for rank_U, sublayer in zip(ranks, calibration.SUBLAYERS, strict=True):
    weight = sublayer.weight(params)
    inputs, gram = sublayer.collect_inputs(layer, params, stream_WxBxTxD)
    factors = refit_factors(gram, weight, rank_U, strength)
    factors = store(factors, params[sublayer.name][sublayer.projection].dtype)
    refits[sublayer.name] = {
      f'refit_{name}': x for name, x in zip(FACTORS, factors, strict=True)
    }
    stream_WxBxTxD = sublayer.apply_output(
      layer, params, stream_WxBxTxD, inputs, None
    )
  return sharding.constrain_params(refits), stream_WxBxTxD


@functools.partial(jax.jit, static_argnames='layers')
def _allocate(layer, *, layers):
  """Returns zeros for what all layers have, stacked."""
  return sharding.constrain_params(
    jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), layer)
  )


@functools.partial(jax.jit, donate_argnames='stacked')
def _put(stacked, layer, i):
  """Writes the parameters of layer i; what is stacked gives its memory."""
  return jax.tree.map(lambda x, new: x.at[i].set(new), stacked, layer)


def refit_model(
  params: dict,
  config: ModelConfig,
  rank: Masks,
  tokens_WxBxT: np.ndarray,
  *,
  strength: float,
) -> tuple[ModelConfig, dict]:
  """Returns the same decoder in a form whose masks refit.

  Args:
    params: of the dense decoder, stacked.
    config: its `ModelConfig`.
    rank: ranks of the units; a mask must keep a prefix of them.
    tokens_WxBxT: calibration tokens, in W batches.
    strength: of the ridge; the one that calibration is likely to choose.

  Returns:
    (config, params). Without masks the function is that of the dense decoder.
  """
  stream = calibration.embed_windows(params, tokens_WxBxT, config=config)
  stacked: dict = {}
  for i in range(config.layers):
    layer, ranks = jax.tree.map(lambda x, i=i: x[i], (params['stack'], rank))
    refits, stream = refit_layer(
      layer, stream, ranks, config=config, strength=float(strength)
    )
    stacked = stacked or _allocate(refits, layers=config.layers)
    stacked = _put(stacked, refits, i)
  stack = params['stack']
  stack = stack | {name: stack[name] | new for name, new in stacked.items()}
  return dataclasses.replace(config, refit=True), {**params, 'stack': stack}
