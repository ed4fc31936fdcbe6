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
from ffp_jax.runtime.compiling import BRIEFLY


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
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the inputs of the output projection, and their Gram matrix.

    Their shapes are [W,B,T,...] and, in float32, [I,I].
    """
    size = len(self.weight(params))

    def collect(upper, x):
      inputs = layer.apply({'params': params}, x, method=self.inputs)
      flat = jnp.asarray(inputs).reshape(-1, size).astype(jnp.float32)
      return upper + ridge.upper_gram(flat), inputs

    upper, inputs = jax.lax.scan(collect, jnp.zeros((size, size)), x_WxBxTxD)
    return inputs, ridge.mirror(upper)

  def apply_output(
    self,
    layer: Layer,
    params: dict,
    x_WxBxTxD: jax.Array,
    inputs: jax.Array,
    mask: jax.Array | None,
  ) -> jax.Array:
    """Returns the residual stream behind this sublayer, [W,B,T,D].

    It takes the place of the stream before, which is no longer needed.

    Args:
      layer: of the dense decoder.
      params: of the layer.
      x_WxBxTxD: the residual stream before this sublayer.
      inputs: from `collect_inputs`.
      mask: of the units, or None to keep all.
    """

    def apply(i, x):
      new = layer.apply(
        {'params': params}, x[i], inputs[i], mask, method=self.output
      )
      return x.at[i].set(new)

    return jax.lax.fori_loop(0, len(x_WxBxTxD), apply, x_WxBxTxD)


SUBLAYERS = (
  Sublayer('attention', 'out', 'attention_inputs', 'apply_attention'),
  Sublayer('ffn', 'down', 'ffn_inputs', 'apply_ffn'),
)


class Streams(NamedTuple):
  """Residual streams [W,B,T,D] of the calibration and validation tokens."""

  fit: jax.Array
  check: jax.Array  # chooses the strengths


def _calibrate_sublayer(
  layer, params, streams: Streams, mask, sublayer: Sublayer, strengths
):
  """Calibrates one sublayer.

  Args:
    layer: of the dense decoder.
    params: of the layer.
    streams: before the sublayer.
    mask: of the sublayer's units.
    sublayer: attention or FFN.
    strengths: candidates for `ridge.ridge_regression`.

  Returns:
    (params, the streams behind the sublayer, index of the strength).
  """
  weight = sublayer.weight(params)
  mask_I = jnp.repeat(mask, len(weight) // len(mask))
  inputs, grams = zip(
    *(sublayer.collect_inputs(layer, params, x) for x in streams), strict=True
  )
  fit, check = (ridge.Moments(gram, gram @ weight) for gram in grams)
  best, index = ridge.select_strength(fit, check, weight, mask_I, strengths)
  params = sublayer.with_weight(params, best)
  streams = Streams(
    *(
      sublayer.apply_output(layer, params, x, of_x, mask)
      for x, of_x in zip(streams, inputs, strict=True)
    )
  )
  return params, streams, index


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


@functools.partial(
  jax.jit,
  static_argnames=('config', 'strengths'),
  donate_argnames='streams',
  compiler_options=BRIEFLY,
)
def calibrate_layer(
  params: dict,
  streams: Streams,
  masks: tuple[jax.Array, jax.Array],
  *,
  config: ModelConfig,
  strengths: tuple[float, ...],
) -> tuple[tuple[jax.Array, jax.Array], Streams, jax.Array]:
  """Calibrates both sublayers of a layer, attention first.

  Args:
    params: of the layer.
    streams: before the layer; their memory is given to those behind it.
    masks: of the layer's units, (attention [K], ffn [F]).
    config: of the dense decoder.
    strengths: candidates for `ridge.ridge_regression`.

  Returns:
    ((attention out, ffn down), the streams behind the layer, indices of the
    strengths [2]; -1 for no change).
  """
  layer = Layer(config, config.groups, config.ffn)
  indices = []
  for mask, sublayer in zip(masks, SUBLAYERS, strict=True):
    params, streams, index = _calibrate_sublayer(
      layer, params, streams, mask, sublayer, strengths
    )
    indices.append(index)
  new = params['attention']['out'], params['ffn']['down']
  return new, streams, jnp.stack(indices)


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
  streams = Streams(
    *(embed_windows(params, x, config=config) for x in (fit_WxBxT, check_WxBxT))
  )
  projections, indices = [], []
  for i in range(config.layers):
    layer, layer_masks = jax.tree.map(
      lambda x, i=i: x[i], (params['stack'], masks)
    )
    new, streams, index = calibrate_layer(
      layer,
      streams,
      layer_masks,
      config=config,
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
