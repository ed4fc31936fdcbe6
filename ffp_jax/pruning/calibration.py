"""Ridge recovery: output projections take over what removed inputs carried.

Layers in order, on the stream that the already pruned and calibrated layers
produce. One Cholesky factorisation a sublayer and strength serves all outputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Decoder, Layer, Masks

_RAISES = 8  # times the strength may grow tenfold for a failing factorisation


class Moments(NamedTuple):
  """Second moments of a sublayer over tokens; I inputs, D outputs."""

  gram_IxI: jax.Array  # inputs of the pruned stream with themselves
  cross_IxD: jax.Array  # inputs of the pruned stream with what to come near


def ridge_regression(moments: Moments, weight_IxD, mask_I, strength):
  """The kept rows that come closest to the target, shrunk to the weights.

  Minimises |X M W' - Y|^2 + lambda |W' - W|^2 over the kept rows, lambda =
  strength * mean diagonal of the kept Gram matrix, raised tenfold until the
  factorisation succeeds.

  Args:
    moments: X'X and X'Y over the calibration tokens.
    weight_IxD: W.
    mask_I: M, 1 keeps an input.
    strength: positive.

  Returns:
    W' [I,D], rows of removed inputs zero.
  """
  mask_1 = mask_I[:, None]
  kept = moments.gram_IxI * mask_1 * mask_I
  kept_weight = weight_IxD * mask_1
  miss = (moments.cross_IxD - moments.gram_IxI @ kept_weight) * mask_1
  mean = jnp.trace(kept) / jnp.maximum(jnp.sum(mask_I), 1.0)

  def factor(strength):
    ridge_I = jnp.where(mask_I > 0, strength * mean + 1e-30, 1.0)
    return jnp.linalg.cholesky(kept + jnp.diag(ridge_I))

  def failed(carry):
    tries, _, lower = carry
    return (tries < _RAISES) & ~jnp.all(jnp.isfinite(lower))

  def retry(carry):
    tries, strength, _ = carry
    return tries + 1, strength * 10.0, factor(strength * 10.0)

  strength = jnp.float32(strength)
  first = (jnp.int32(0), strength, factor(strength))
  _, _, lower = jax.lax.while_loop(failed, retry, first)
  change = jax.scipy.linalg.cho_solve((lower, True), miss)
  return kept_weight + jnp.where(jnp.isfinite(change), change, 0.0) * mask_1


def squared_error(moments: Moments, weight_IxD):
  """|X W - Y|^2 up to a constant of Y."""
  fitted = moments.gram_IxI @ weight_IxD - 2.0 * moments.cross_IxD
  return jnp.sum(weight_IxD * fitted)


def select_strength(
  fit: Moments, check: Moments, weight_IxD, mask_I, strengths
):
  """The best of no change and `ridge` at each strength, on unseen tokens.

  Args:
    fit: moments of the calibration tokens.
    check: moments of the validation tokens.
    weight_IxD: W.
    mask_I: 1 keeps an input.
    strengths: candidates, in any order.

  Returns:
    (W' [I,D], index of the strength, -1 for no change).
  """
  kept = weight_IxD * mask_I[:, None]

  def consider(best, item):
    index, strength = item
    weight = ridge_regression(fit, weight_IxD, mask_I, strength)
    loss = squared_error(check, weight)
    better = loss < best[0]
    new = (loss, index, weight)
    return jax.tree.map(lambda n, o: jnp.where(better, n, o), new, best), None

  start = (squared_error(check, kept), jnp.int32(-1), kept)
  items = (jnp.arange(len(strengths)), jnp.asarray(strengths, jnp.float32))
  (_, index, weight), _ = jax.lax.scan(consider, start, items)
  return weight, index


def input_moments(inputs_WxBxTxI, weight_IxD) -> Moments:
  """Moments over windows, towards the sublayer's own full output.

  Args:
    inputs_WxBxTxI: what enters the projection in the pruned stream.
    weight_IxD: W.
  """
  size = len(weight_IxD)

  def add(gram, inputs):
    x = inputs.reshape(-1, size).astype(jnp.float32)
    # Accelerators would round float32 products to fewer digits.
    return gram + jnp.einsum(
      'ni,nj->ij', x, x, precision=jax.lax.Precision.HIGHEST
    ), None

  gram, _ = jax.lax.scan(add, jnp.zeros((size, size)), inputs_WxBxTxI)
  return Moments(gram, gram @ weight_IxD)


class Sublayer(NamedTuple):
  """Attention or FFN of a layer: a residual stream in, the next one out."""

  name: str
  projection: str  # the output projection
  inputs: str  # methods of `Layer`
  output: str

  def weight(self, params) -> jax.Array:
    """The output projection of a layer's parameters, float32 [I,D]."""
    weight = params[self.name][self.projection]
    return weight.reshape(-1, weight.shape[-1]).astype(jnp.float32)

  def with_weight(self, params, weight_IxD):
    """The parameters with another output projection."""
    old = params[self.name]
    new = weight_IxD.reshape(old[self.projection].shape).astype(
      old[self.projection].dtype
    )
    return {**params, self.name: {**old, self.projection: new}}

  def enter(self, layer, params, x_WxBxTxD):
    """What enters the output projection, a window at a time."""
    run = functools.partial(layer.apply, {'params': params}, method=self.inputs)
    return jax.lax.map(run, x_WxBxTxD)

  def leave(self, layer, params, x_WxBxTxD, entered, mask):
    """The stream behind this sublayer."""
    return jax.lax.map(
      lambda pair: layer.apply(
        {'params': params}, *pair, mask, method=self.output
      ),
      (x_WxBxTxD, entered),
    )


SUBLAYERS = (
  Sublayer('attention', 'out', 'attention_inputs', 'apply_attention'),
  Sublayer('ffn', 'down', 'ffn_inputs', 'apply_ffn'),
)


def _calibrate_sublayer(
  layer, params, stream_WxBxTxD, mask, sublayer: Sublayer, fit_on, strengths
):
  """Calibrates one sublayer and moves the stream past it."""
  weight = sublayer.weight(params)
  mask_I = jnp.repeat(mask, len(weight) // len(mask))
  entered = sublayer.enter(layer, params, stream_WxBxTxD)
  fit = input_moments(entered[:fit_on], weight)
  check = input_moments(entered[fit_on:], weight)
  best, index = select_strength(fit, check, weight, mask_I, strengths)
  params = sublayer.with_weight(params, best)
  stream = sublayer.leave(layer, params, stream_WxBxTxD, entered, mask)
  return params, stream, index


def embed_windows(params, tokens_WxBxT, *, config):
  """The first residual streams, [W,B,T,D]."""
  ends = {name: tree for name, tree in params.items() if name != 'stack'}
  return _embed(ends, tokens_WxBxT, config=config)


@functools.partial(jax.jit, static_argnames='config')
def _embed(ends, tokens_WxBxT, *, config):
  def one(tokens):
    return Decoder(config).apply(
      {'params': ends}, tokens, method='embed_tokens'
    )

  return jax.lax.map(one, tokens_WxBxT)


@functools.partial(jax.jit, static_argnames=('config', 'fit_on', 'strengths'))
def calibrate_layer(
  params, stream_WxBxTxD, masks, *, config, fit_on, strengths
):
  """Calibrates both sublayers of a layer, attention first.

  Returns:
    (attention out, ffn down), the stream behind the layer, strength indices.
  """
  layer = Layer(config, config.groups, config.ffn)
  picks, stream = [], stream_WxBxTxD
  for mask, sublayer in zip(masks, SUBLAYERS, strict=True):
    params, stream, index = _calibrate_sublayer(
      layer, params, stream, mask, sublayer, fit_on, strengths
    )
    picks.append(index)
  new = params['attention']['out'], params['ffn']['down']
  return new, stream, jnp.stack(picks)


def calibrate(
  params,
  config,
  keep: Masks,
  fit_WxBxT,
  check_WxBxT,
  *,
  strengths,
  dtype=None,
):
  """Calibrates every output projection of a masked model.

  Args:
    params: of the dense decoder, stacked.
    config: its `ModelConfig`.
    keep: the masks.
    fit_WxBxT: calibration tokens, in W batches.
    check_WxBxT: validation tokens, which choose the strengths.
    strengths: candidates for `ridge`.
    dtype: what the projections will be saved in, to which they are rounded;
      None for that of `params`.

  Returns:
    (params with new output projections, chosen strength [2, L] of attention
    and FFN, 0 where the projection stays as it is).
  """
  tokens = np.concatenate([fit_WxBxT, check_WxBxT])
  stream = embed_windows(params, tokens, config=config)
  outs, picks = [], []
  for i in range(config.layers):
    at = jax.tree.map(lambda x, i=i: x[i], (params['stack'], keep))
    new, stream, pick = calibrate_layer(
      at[0],
      stream,
      at[1],
      config=config,
      fit_on=len(fit_WxBxT),
      strengths=tuple(strengths),
    )
    outs.append(new)
    picks.append(pick)
  stack = params['stack']
  out, down = (
    jnp.stack(x).astype(dtype or x[0].dtype).astype(x[0].dtype)
    for x in zip(*outs, strict=True)
  )
  stack = {
    **stack,
    'attention': {**stack['attention'], 'out': out},
    'ffn': {**stack['ffn'], 'down': down},
  }
  chosen = np.array([0.0, *strengths])[np.stack(picks, axis=1) + 1]
  return {**params, 'stack': stack}, chosen
