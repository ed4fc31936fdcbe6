"""The decoder: one flax module for every family.

Shape letters: B batch, T time, D model width, V vocabulary, L layers, F FFN
channels, K key/value groups, G query heads per group, H head size, S slots of
a cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffp_jax.models.attention import Attention, Past
from ffp_jax.models.config import ModelConfig
from ffp_jax.models.ffn import Ffn
from ffp_jax.models.linear import init_weight
from ffp_jax.models.norms import Norm
from ffp_jax.runtime.sharding import constrain


class Masks(NamedTuple):
  """Holds the masks of all units: 1 keeps a unit, 0 removes it."""

  attention: jax.Array  # [L, K]
  ffn: jax.Array  # [L, F]


class Cache(NamedTuple):
  """The key/value cache; slots from `length` on are free."""

  layers: Past | tuple[Past, ...]  # stacked, or one per layer if sliced
  length: jax.Array  # int32 [B]


class Layer(nn.Module):
  """One decoder layer: attention, then FFN, each with its residual.

  Each sublayer is computed in two steps, so that calibration can change an
  output projection between them: first the inputs of the projection, then
  the projection, the residual and, if it comes last, the norm.
  """

  config: ModelConfig
  groups: int
  channels: int
  capture: Callable[[jax.Array], jax.Array] | None = None

  def setup(self) -> None:
    c = self.config
    self.attention = Attention(c, self.groups, self.capture)
    self.ffn = Ffn(c, self.channels, self.capture)
    self.attention_norm, self.ffn_norm = Norm(c), Norm(c)

  def attention_inputs_and_cache(
    self,
    x_BxTxD: jax.Array,
    positions_BxT: jax.Array,
    past: Past | None = None,
    visible_BxTxS: jax.Array | None = None,
  ) -> tuple[jax.Array, Past | None]:
    """Returns the inputs of `out`, [B,T,K,G,H], and the extended past."""
    x = self.attention_norm(x_BxTxD) if self.config.pre_norm else x_BxTxD
    return self.attention.inputs(x, positions_BxT, past, visible_BxTxS)

  def attention_inputs(self, x_BxTxD: jax.Array) -> jax.Array:
    """Returns the inputs of `out`, [B,T,K,G,H], of tokens from position 0."""
    return self.attention_inputs_and_cache(
      x_BxTxD, positions_from_zero(x_BxTxD.shape[1])
    )[0]

  def apply_attention(
    self,
    x_BxTxD: jax.Array,
    inputs: jax.Array,
    mask_K: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the residual stream [B,T,D] after attention.

    Args:
      x_BxTxD: the residual stream before it.
      inputs: from `attention_inputs` of that stream.
      mask_K: 1 keeps a group.
    """
    x = x_BxTxD + self.attention.output(inputs, mask_K)
    return x if self.config.pre_norm else self.attention_norm(x)

  def ffn_inputs(self, x_BxTxD: jax.Array) -> jax.Array:
    """Returns the inputs of `down`, [B,T,F]."""
    pre = self.config.pre_norm
    return self.ffn.inputs(self.ffn_norm(x_BxTxD) if pre else x_BxTxD)

  def apply_ffn(
    self,
    x_BxTxD: jax.Array,
    inputs: jax.Array,
    mask_F: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the residual stream [B,T,D] after the FFN.

    Args:
      x_BxTxD: the residual stream before it.
      inputs: from `ffn_inputs` of that stream.
      mask_F: 1 keeps a channel.
    """
    x = x_BxTxD + self.ffn.output(inputs, mask_F)
    return x if self.config.pre_norm else self.ffn_norm(x)

  def __call__(
    self,
    x_BxTxD: jax.Array,
    positions_BxT: jax.Array,
    masks: Masks | None = None,
    past: Past | None = None,
    visible_BxTxS: jax.Array | None = None,
  ) -> tuple[jax.Array, Past | None]:
    mask_K, mask_F = (None, None) if masks is None else masks
    inputs, past = self.attention_inputs_and_cache(
      x_BxTxD, positions_BxT, past, visible_BxTxS
    )
    x = self.apply_attention(x_BxTxD, inputs, mask_K)
    x = self.apply_ffn(x, self.ffn_inputs(x), mask_F)
    return constrain(x, 'batch', None, 'embed'), past


class Decoder(nn.Module):
  """Maps token ids [B,T] to float32 logits [B,T,V].

  Dense models stack their layers and scan them; sliced models, whose layers
  differ in width, run them one by one. `capture`, if given, is applied to the
  inputs of every output projection and sown under 'captured', so that
  statistics never need the activations themselves to be kept. `remat`
  recomputes each layer in the backward pass.
  """

  config: ModelConfig
  capture: Callable[[jax.Array], jax.Array] | None = None
  remat: bool = False

  def setup(self) -> None:
    c = self.config
    embed_width = c.embed_width or c.width
    self.embed = _Table(c.vocab, embed_width)
    if c.positions == 'learned':
      self.position = _Table(c.max_positions + c.position_offset, c.width)
    if c.embed_width:
      self.embed_in = _Matrix((c.embed_width, c.width))
      self.embed_out = _Matrix((c.width, c.embed_width))
    layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
    if c.sliced:
      self.layer = [
        layer(c, *c.widths(i), self.capture) for i in range(c.layers)
      ]
    else:
      self.stack = nn.scan(
        layer,
        variable_axes={'params': 0, 'captured': 0},
        split_rngs={'params': True},
        in_axes=(nn.broadcast, 0, 0, nn.broadcast),
        length=c.layers,
      )(c, c.groups, c.ffn, self.capture)
    if c.final_norm:
      self.final_norm = Norm(c)
    if not c.tied:
      self.head = _Matrix((embed_width, c.vocab))

  def embed_tokens(
    self, tokens_BxT: jax.Array, positions_BxT: jax.Array | None = None
  ) -> jax.Array:
    """Returns the first residual stream [B,T,D] of token ids.

    Args:
      tokens_BxT: token ids.
      positions_BxT: their positions; None for those from 0 on.
    """
    if positions_BxT is None:
      positions_BxT = positions_from_zero(tokens_BxT.shape[1])
    x = self.embed()[tokens_BxT]
    if self.config.embed_width:
      x = x @ self.embed_in()
    if self.config.positions == 'learned':
      x = x + self.position()[positions_BxT + self.config.position_offset]
    return constrain(x, 'batch', None, 'embed')

  def unembed(self, x_BxTxD: jax.Array) -> jax.Array:
    """Returns the float32 logits [B,T,V] of the last residual stream."""
    if self.config.final_norm:
      x_BxTxD = self.final_norm(x_BxTxD)
    if self.config.embed_width:
      x_BxTxD = x_BxTxD @ self.embed_out()
    table = self.embed().T if self.config.tied else self.head()
    logits = jnp.matmul(x_BxTxD, table, preferred_element_type=jnp.float32)
    return constrain(logits, 'batch', None, 'vocab')

  def stream(
    self,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    masks: Masks | None = None,
    layers: Any = None,
    visible_BxTxT: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """Returns the last residual stream [B,T,D], and the layers' pasts.

    Args:
      tokens_BxT: token ids.
      positions_BxT: their positions.
      masks: of a dense model; None keeps all units.
      layers: the pasts to extend, see `Cache.layers`; None for no cache.
      visible_BxTxT: without a cache, the tokens that each sees, none after it;
        None for what the positions say.
    """
    x = self.embed_tokens(tokens_BxT, positions_BxT)
    if not self.config.sliced:
      return self.stack(x, positions_BxT, masks, layers, visible_BxTxT)
    pasts: list[Past | None] = list(layers or [None] * self.config.layers)
    for i, layer in enumerate(self.layer):
      x, pasts[i] = layer(x, positions_BxT, None, pasts[i], visible_BxTxT)
    return x, tuple(pasts)

  def extend(
    self, tokens_BxT: jax.Array, cache: Cache, masks: Masks | None = None
  ) -> tuple[jax.Array, Cache]:
    """Runs tokens that follow those in the cache.

    Returns:
      (last residual stream [B,T,D] of the tokens, the extended cache).
    """
    time = tokens_BxT.shape[1]
    positions = cache.length[:, None] + jnp.arange(time)
    x, layers = self.stream(tokens_BxT, positions, masks, cache.layers)
    return x, Cache(layers, cache.length + time)

  def __call__(
    self, tokens_BxT: jax.Array, masks: Masks | None = None
  ) -> jax.Array:
    x, _ = self.stream(
      tokens_BxT, positions_from_zero(tokens_BxT.shape[1]), masks
    )
    return self.unembed(x)


def positions_from_zero(time: int) -> jax.Array:
  """Returns the positions [1,T] of tokens with none before them."""
  return jnp.arange(time)[None]


class _Matrix(nn.Module):
  """A bare weight matrix."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param('kernel', init_weight, self.shape)


class _Table(nn.Module):
  """A bare embedding table."""

  rows: int
  width: int

  @nn.compact
  def __call__(self) -> jax.Array:
    init = nn.initializers.normal(0.02)
    return self.param('table', init, (self.rows, self.width))
