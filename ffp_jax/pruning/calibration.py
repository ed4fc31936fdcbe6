"""Ridge calibration: refits output projections after units were removed.

The layers are calibrated in order, on the residual stream that the layers
before, already pruned and calibrated, produce. Shape letters: W batches of
windows, I inputs and D outputs of an output projection.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Decoder, Layer, Masks, ModelConfig
from ffp_jax.pruning import ridge


class Sublayer(NamedTuple):
  """The attention or the FFN of a layer, which adds to the residual stream.

  Attributes:
    name: of its parameters in those of a layer.
    projection: name of the output projection.
    inputs: method of `Layer` that computes the projection's inputs.
    output: method of `Layer` that adds the projected inputs to the stream.
  """

  name: str
  projection: str
  inputs: str
  output: str

  def weight(self, params: dict) -> jax.Array:
    """Returns the output projection of a layer's parameters, float32 [I,D]."""
    weight = params[self.name][self.projection]
    return weight.reshape(-1, weight.shape[-1]).astype(jnp.float32)

  def with_weight(self, params: dict, weight_IxD: jax.Array) -> dict:
    """Returns a layer's parameters with another output projection."""
    old = params[self.name]
    new = weight_IxD.reshape(old[self.projection].shape).astype(
      old[self.projection].dtype
    )
    return {**params, self.name: {**old, self.projection: new}}

  def collect_inputs(
    self, layer: Layer, params: dict, x_WxBxTxD: jax.Array
  ) -> jax.Array:
    """Returns the inputs of the output projection, [W,B,T,...]."""
    run = functools.partial(layer.apply, {'params': params}, method=self.inputs)
    return jax.lax.map(run, x_WxBxTxD)

  def apply_output(
    self,
    layer: Layer,
    params: dict,
    x_WxBxTxD: jax.Array,
    inputs: jax.Array,
    mask: jax.Array | None,
  ) -> jax.Array:
    """Returns the residual stream behind this sublayer, [W,B,T,D].

    Args:
      layer: of the dense decoder.
      params: of the layer.
      x_WxBxTxD: the residual stream before this sublayer.
      inputs: from `collect_inputs`.
      mask: of the units, or None to keep all.
    """
    return jax.lax.map(
      lambda pair: layer.apply(
        {'params': params}, *pair, mask, method=self.output
      ),
      (x_WxBxTxD, inputs),
    )


SUBLAYERS = (
  Sublayer('attention', 'out', 'attention_inputs', 'apply_attention'),
  Sublayer('ffn', 'down', 'ffn_inputs', 'apply_ffn'),
)


def _calibrate_sublayer(
  layer, params, stream_WxBxTxD, mask, sublayer: Sublayer, fit_on, strengths
):
  """Calibrates one sublayer.

  Args:
    layer: of the dense decoder.
    params: of the layer.
    stream_WxBxTxD: the residual stream before the sublayer.
    mask: of the sublayer's units.
    sublayer: attention or FFN.
    fit_on: number of batches to fit on; the others choose the strength.
    strengths: candidates for `ridge.ridge_regression`.

  Returns:
    (params, the residual stream behind the sublayer, index of the strength).
  """
  weight = sublayer.weight(params)
  mask_I = jnp.repeat(mask, len(weight) // len(mask))
  inputs = sublayer.collect_inputs(layer, params, stream_WxBxTxD)
  fit = ridge.input_moments(inputs[:fit_on], weight)
  check = ridge.input_moments(inputs[fit_on:], weight)
  best, index = ridge.select_strength(fit, check, weight, mask_I, strengths)
  params = sublayer.with_weight(params, best)
  stream = sublayer.apply_output(layer, params, stream_WxBxTxD, inputs, mask)
  return params, stream, index


def embed_windows(
  params: dict, tokens_WxBxT: np.ndarray, *, config: ModelConfig
) -> jax.Array:
  """Returns the residual streams before the first layer, [W,B,T,D]."""
  outer = {name: tree for name, tree in params.items() if name != 'stack'}
  return _embed(outer, tokens_WxBxT, config=config)


@functools.partial(jax.jit, static_argnames='config')
def _embed(params, tokens_WxBxT, *, config):
  """Embeds tokens; `params` are those outside the stack of layers."""

  def embed_batch(tokens):
    return Decoder(config).apply(
      {'params': params}, tokens, method='embed_tokens'
    )

  return jax.lax.map(embed_batch, tokens_WxBxT)


@functools.partial(jax.jit, static_argnames=('config', 'fit_on', 'strengths'))
def calibrate_layer(
  params: dict,
  stream_WxBxTxD: jax.Array,
  masks: tuple[jax.Array, jax.Array],
  *,
  config: ModelConfig,
  fit_on: int,
  strengths: tuple[float, ...],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
  """Calibrates both sublayers of a layer, attention first.

  Args:
    params: of the layer.
    stream_WxBxTxD: the residual stream before the layer.
    masks: of the layer's units, (attention [K], ffn [F]).
    config: of the dense decoder.
    fit_on: number of batches to fit on; the others choose the strengths.
    strengths: candidates for `ridge.ridge_regression`.

  Returns:
    ((attention out, ffn down), the residual stream behind the layer, indices of
    the strengths [2]; -1 for no change).
  """
  layer = Layer(config, config.groups, config.ffn)
  indices, stream = [], stream_WxBxTxD
  for mask, sublayer in zip(masks, SUBLAYERS, strict=True):
    params, stream, index = _calibrate_sublayer(
      layer, params, stream, mask, sublayer, fit_on, strengths
    )
    indices.append(index)
  new = params['attention']['out'], params['ffn']['down']
  return new, stream, jnp.stack(indices)


def calibrate(
  params: dict,
  config: ModelConfig,
  masks: Masks,
  fit_WxBxT: np.ndarray,
  check_WxBxT: np.ndarray,
  *,
  strengths: Sequence[float],
  dtype: jnp.dtype | None = None,
) -> tuple[dict, np.ndarray]:
  """Calibrates every output projection of a masked model.

  Args:
    params: of the dense decoder, stacked.
    config: its `ModelConfig`.
    masks: the units to keep.
    fit_WxBxT: calibration tokens, in batches.
    check_WxBxT: validation tokens, which choose the strengths; in batches.
    strengths: candidates for `ridge.ridge_regression`.
    dtype: the type that the projections will be saved in, to which they are
      rounded; None for that of `params`.

  Returns:
    (params with new output projections, chosen strengths [2,L] of attention and
    FFN, 0 where the projection is unchanged).
  """
  tokens = np.concatenate([fit_WxBxT, check_WxBxT])
  stream = embed_windows(params, tokens, config=config)
  projections, indices = [], []
  for i in range(config.layers):
    layer, layer_masks = jax.tree.map(
      lambda x, i=i: x[i], (params['stack'], masks)
    )
    new, stream, index = calibrate_layer(
      layer,
      stream,
      layer_masks,
      config=config,
      fit_on=len(fit_WxBxT),
      strengths=tuple(strengths),
    )
    projections.append(new)
    indices.append(index)
  stack = params['stack']
  out, down = (
    jnp.stack(x).astype(dtype or x[0].dtype).astype(x[0].dtype)
    for x in zip(*projections, strict=True)
  )
  stack = {
    **stack,
    'attention': {**stack['attention'], 'out': out},
    'ffn': {**stack['ffn'], 'down': down},
  }
  chosen = np.array([0.0, *strengths])[np.stack(indices, axis=1) + 1]
  return {**params, 'stack': stack}, chosen
