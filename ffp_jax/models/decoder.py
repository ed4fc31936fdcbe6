"""The decoder: one flax module for every family.

Shape letters: B batch, T time, D model width, V vocabulary, L layers, F FFN
channels, K key/value groups, G query heads per group, H head size, S slots of
a cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffp_jax.models import rope
from ffp_jax.runtime.sharding import constrain


class Masks(NamedTuple):
  """1 keeps a unit, 0 removes it."""

  attention: jax.Array  # [L, K]
  ffn: jax.Array  # [L, F]


class Past(NamedTuple):
  """Keys and values that a layer has seen; stacked layers have an axis L."""

  keys: jax.Array  # [B, S, K, H], rotated where positions are
  values: jax.Array  # [B, S, K, H]


class Cache(NamedTuple):
  """What the tokens before have left; slots from `length` on are free."""

  layers: Past | tuple[Past, ...]  # stacked, or one a sliced layer
  length: jax.Array  # int32 [B]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything the decoder needs to know; families differ only in here.

  `kept_groups` and `kept_ffn` hold each layer's units once a model is sliced;
  both are None for a dense model, whose layers are alike and scanned.
  """

  vocab: int
  width: int
  layers: int
  groups: int  # K
  heads_per_group: int  # G
  head_size: int  # H
  ffn: int  # F
  norm: str = 'rms'  # 'rms', 'layer' or, without parameters, 'bare_layer'
  norm_eps: float = 1e-5
  pre_norm: bool = True
  final_norm: bool = True
  positions: str = 'rope'  # 'rope' or 'learned'
  rope_theta: float = 10000.0
  rope_scaling: rope.Scaling = rope.Scaling()
  max_positions: int = 2048
  position_offset: int = 0
  activation: str = 'silu'
  gated: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: bool = False  # RMSNorm of each query and key head
  ffn_bias: bool = False
  window: int | None = None
  tied: bool = False
  refit: bool = False  # masks also refit the kept weights, see refit.py
  adapter_rank: int = 0  # of low-rank updates of the weights, see recovery.py
  embed_width: int | None = None  # of projected embeddings, else None
  kept_groups: tuple[int, ...] | None = None
  kept_ffn: tuple[int, ...] | None = None

  @property
  def sliced(self) -> bool:
    return self.kept_ffn is not None

  def widths(self, layer: int) -> tuple[int, int]:
    """Key/value groups and FFN channels of one layer."""
    if not self.sliced:
      return self.groups, self.ffn
    return self.kept_groups[layer], self.kept_ffn[layer]


_WEIGHT = nn.initializers.lecun_normal()
_BIAS = nn.initializers.zeros
ACTIVATIONS = {
  'silu': nn.silu,
  'relu': nn.relu,
  'gelu': functools.partial(nn.gelu, approximate=False),
}


_NORMS = {
  'rms': nn.RMSNorm,
  'layer': nn.LayerNorm,
  'bare_layer': functools.partial(
    nn.LayerNorm, use_scale=False, use_bias=False
  ),
}


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, computed in float32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    kind = _NORMS[self.config.norm]
    norm = kind(epsilon=self.config.norm_eps, dtype=jnp.float32, name='norm')
    return norm(x).astype(x.dtype)


def rotate(x_BxTxNxH, angle_BxTxh, amplitude):
  """Rotary position embedding, halves convention (arXiv 2104.09864)."""
  angle = angle_BxTxh[:, :, None]
  sin, cos = amplitude * jnp.sin(angle), amplitude * jnp.cos(angle)
  a, b = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BxTxNxH.dtype)


def _append_to_cache(past: Past, at_BxT, keys_BxTxKxH, values_BxTxKxH) -> Past:
  """Puts keys and values into the slots of their positions.

  What lies beyond the last slot is dropped.
  """
  rows = jnp.arange(len(at_BxT))[:, None]
  new = keys_BxTxKxH, values_BxTxKxH
  return Past(
    *(
      constrain(old.at[rows, at_BxT].set(x), 'batch', None, 'groups', None)
      for old, x in zip(past, new, strict=True)
    )
  )


def _rms_norm(x, scale, epsilon):
  """RMSNorm over the last axis, computed in float32."""
  wide = x.astype(jnp.float32)
  mean = jnp.mean(wide**2, axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(mean + epsilon) * scale).astype(x.dtype)


def _declare_adapter(module, name, inputs, outputs):
  """Declares the low-rank update of a weight, if the config asks for it."""
  rank = module.config.adapter_rank
  factors = {'a': ((*inputs, rank), _WEIGHT), 'b': ((rank, *outputs), _BIAS)}
  for part, (shape, init) in factors.items() if rank else ():
    leaf = f'{name}_{part}'
    setattr(module, leaf, module.param(leaf, init, shape))


def _multiply(module, name, x):
  """Multiplies [...,I] by a weight and its low-rank update: [...,O]."""
  # As matrices: XLA's backward pass is slow on more axes.
  y = x @ getattr(module, name).reshape(x.shape[-1], -1)
  if not module.config.adapter_rank:
    return y
  a, b = (getattr(module, f'{name}_{part}') for part in 'ab')
  return y + (x @ a.reshape(x.shape[-1], -1)) @ b.reshape(len(b), -1)


class Attention(nn.Module):
  """Grouped-query attention; the mask acts on what enters `out`."""

  config: ModelConfig
  groups: int
  capture: Callable | None = None

  def setup(self):
    c, K = self.config, self.groups
    G, H, D = c.heads_per_group, c.head_size, c.width
    shapes = {'query': (K, G, H), 'key': (K, H), 'value': (K, H)}
    for name, shape in shapes.items():
      setattr(self, name, self.param(name, _WEIGHT, (D, *shape)))
      _declare_adapter(self, name, (D,), shape)
      if c.qkv_bias:
        bias = self.param(f'{name}_bias', _BIAS, shape)
        setattr(self, f'{name}_bias', bias)
    for name in ('query', 'key') if c.qk_norm else ():
      scale = self.param(f'{name}_norm', nn.initializers.ones, (H,))
      setattr(self, f'{name}_norm', scale)
    self.out = self.param('out', _WEIGHT, (K, G, H, D))
    _declare_adapter(self, 'out', (K, G, H), (D,))
    if c.refit:
      self.refit = self.param('refit', _WEIGHT, (K * G * H, K * G * H))
    if c.out_bias:
      self.out_bias = self.param('out_bias', _BIAS, (D,))

  def project(self, x_BxTxD):
    """Queries [B,T,N,H], keys and values [B,T,K,H], not yet rotated."""
    c = self.config

    def project(name):
      y = _multiply(self, name, x_BxTxD)
      if c.qkv_bias:
        y = y + getattr(self, f'{name}_bias').reshape(-1)
      return y.reshape(*x_BxTxD.shape[:2], -1, c.head_size)

    q, k, v = project('query'), project('key'), project('value')
    if c.qk_norm:
      q = _rms_norm(q, self.query_norm, c.norm_eps)
      k = _rms_norm(k, self.key_norm, c.norm_eps)
    return q, k, v

  def mix(self, q, k, v, at_BxT):
    """What enters `out`, [B,T,K,G,H], of slots [B,S,K,H] in their order."""
    c = self.config
    back_Bx1xTxS = (at_BxT[..., None] - jnp.arange(k.shape[1]))[:, None]
    seen = back_Bx1xTxS >= 0
    if c.window is not None:
      seen &= back_Bx1xTxS < c.window
    mixed = jax.nn.dot_product_attention(q, k, v, mask=seen)
    shape = (self.groups, c.heads_per_group, c.head_size)
    mixed = mixed.reshape(*q.shape[:2], *shape)
    mixed = constrain(mixed, 'batch', None, 'groups', 'heads', None)
    _capture(self, mixed)
    return mixed

  def inputs(self, x_BxTxD, at_BxT, past: Past | None = None):
    """What enters `out`, [B,T,K,G,H], and the past with these tokens."""
    c = self.config
    q, k, v = self.project(x_BxTxD)
    if c.positions == 'rope':
      longest = x_BxTxD.shape[1] if past is None else past.keys.shape[1]
      angle = rope.angles(
        c.rope_scaling, c.rope_theta, c.head_size, at_BxT, longest
      )
      q, k = (rotate(x, angle, c.rope_scaling.amplitude) for x in (q, k))
    if past is not None:
      past = k, v = _append_to_cache(past, at_BxT, k, v)
    return self.mix(q, k, v, at_BxT), past

  def output(self, mixed, mask_K=None):
    if self.config.refit:
      flat = mixed.reshape(*mixed.shape[:2], -1) @ self.refit
      mixed = flat.reshape(mixed.shape)
    if mask_K is not None:
      mixed = mixed * mask_K[:, None, None].astype(mixed.dtype)
    y = _multiply(self, 'out', mixed.reshape(*mixed.shape[:2], -1))
    return y + self.out_bias if self.config.out_bias else y


class Ffn(nn.Module):
  """Gated or plain feed-forward; the mask acts on what enters `down`."""

  config: ModelConfig
  channels: int
  capture: Callable | None = None

  def setup(self):
    c, F = self.config, self.channels
    for name in ('gate', 'up') if c.gated else ('up',):
      setattr(self, name, self.param(name, _WEIGHT, (c.width, F)))
      _declare_adapter(self, name, (c.width,), (F,))
      if c.ffn_bias:
        bias = self.param(f'{name}_bias', _BIAS, (F,))
        setattr(self, f'{name}_bias', bias)
    self.down = self.param('down', _WEIGHT, (F, c.width))
    _declare_adapter(self, 'down', (F,), (c.width,))
    if c.refit:
      self.refit = self.param('refit', _WEIGHT, (F, F))
    if c.ffn_bias:
      self.down_bias = self.param('down_bias', _BIAS, (c.width,))

  def inputs(self, x_BxTxD):
    """What enters `down`, [B,T,F]."""

    def project(name):
      y = _multiply(self, name, x_BxTxD)
      return y + getattr(self, f'{name}_bias') if self.config.ffn_bias else y

    act = ACTIVATIONS[self.config.activation]
    if self.config.gated:
      hidden = act(project('gate')) * project('up')
    else:
      hidden = act(project('up'))
    hidden = constrain(hidden, 'batch', None, 'ffn')
    _capture(self, hidden)
    return hidden

  def output(self, hidden, mask_F=None):
    if self.config.refit:
      hidden = hidden @ self.refit
    if mask_F is not None:
      hidden = hidden * mask_F.astype(hidden.dtype)
    y = _multiply(self, 'down', hidden)
    return y + self.down_bias if self.config.ffn_bias else y


class Layer(nn.Module):
  """One decoder layer: attend, then feed, each with its residual.

  Each half comes in two steps, so that calibration can change an output
  projection between them: what enters the projection, and the rest.
  """

  config: ModelConfig
  groups: int
  channels: int
  capture: Callable | None = None

  def setup(self):
    c = self.config
    self.attention = Attention(c, self.groups, self.capture)
    self.ffn = Ffn(c, self.channels, self.capture)
    self.attention_norm, self.ffn_norm = Norm(c), Norm(c)

  def attention_inputs_and_cache(self, x_BxTxD, at_BxT, past=None):
    """`attention_inputs`, and the past with these tokens."""
    pre = self.config.pre_norm
    return self.attention.inputs(
      self.attention_norm(x_BxTxD) if pre else x_BxTxD, at_BxT, past
    )

  def attention_inputs(self, x_BxTxD):
    return self.attention_inputs_and_cache(
      x_BxTxD, positions_from_zero(x_BxTxD.shape[1])
    )[0]

  def apply_attention(self, x_BxTxD, inputs, mask_K=None):
    x = x_BxTxD + self.attention.output(inputs, mask_K)
    return x if self.config.pre_norm else self.attention_norm(x)

  def ffn_inputs(self, x_BxTxD):
    pre = self.config.pre_norm
    return self.ffn.inputs(self.ffn_norm(x_BxTxD) if pre else x_BxTxD)

  def apply_ffn(self, x_BxTxD, inputs, mask_F=None):
    x = x_BxTxD + self.ffn.output(inputs, mask_F)
    return x if self.config.pre_norm else self.ffn_norm(x)

  def __call__(self, x_BxTxD, at_BxT, masks=None, past=None):
    masks = Masks(None, None) if masks is None else masks
    inputs, past = self.attention_inputs_and_cache(x_BxTxD, at_BxT, past)
    x = self.apply_attention(x_BxTxD, inputs, masks.attention)
    x = self.apply_ffn(x, self.ffn_inputs(x), masks.ffn)
    return constrain(x, 'batch', None, 'embed'), past


class Decoder(nn.Module):
  """Token ids to float32 logits.

  Dense models stack their layers and scan them; sliced models, whose layers
  differ in width, run them one by one. `capture`, if given, is applied to the
  inputs of every output projection and sown under 'captured', so statistics
  never need the activations themselves to be kept.
  """

  config: ModelConfig
  capture: Callable | None = None
  remat: bool = False

  def setup(self):
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
        in_axes=(nn.broadcast, 0, 0),
        length=c.layers,
      )(c, c.groups, c.ffn, self.capture)
    if c.final_norm:
      self.final_norm = Norm(c)
    if not c.tied:
      self.head = _Matrix((embed_width, c.vocab))

  def embed_tokens(self, tokens_BxT, at_BxT=None):
    """Token ids [B,T] to the first residual stream [B,T,D]."""
    at_BxT = (
      positions_from_zero(tokens_BxT.shape[1]) if at_BxT is None else at_BxT
    )
    x = self.embed()[tokens_BxT]
    if self.config.embed_width:
      x = x @ self.embed_in()
    if self.config.positions == 'learned':
      x = x + self.position()[at_BxT + self.config.position_offset]
    return constrain(x, 'batch', None, 'embed')

  def unembed(self, x_BxTxD):
    """Last residual stream [B,T,D] to float32 logits [B,T,V]."""
    if self.config.final_norm:
      x_BxTxD = self.final_norm(x_BxTxD)
    if self.config.embed_width:
      x_BxTxD = x_BxTxD @ self.embed_out()
    table = self.embed().T if self.config.tied else self.head()
    logits = jnp.matmul(x_BxTxD, table, preferred_element_type=jnp.float32)
    return constrain(logits, 'batch', None, 'vocab')

  def stream(self, tokens_BxT, at_BxT, masks=None, layers=None):
    """The last residual stream [B,T,D], and the layers' pasts."""
    x = self.embed_tokens(tokens_BxT, at_BxT)
    if not self.config.sliced:
      return self.stack(x, at_BxT, masks, layers)
    pasts = list(layers or [None] * self.config.layers)
    for i, layer in enumerate(self.layer):
      x, pasts[i] = layer(x, at_BxT, None, pasts[i])
    return x, tuple(pasts)

  def extend(self, tokens_BxT, cache: Cache, masks: Masks | None = None):
    """`stream` of tokens that follow those in the cache, and the new cache."""
    time = tokens_BxT.shape[1]
    at = cache.length[:, None] + jnp.arange(time)
    x, layers = self.stream(tokens_BxT, at, masks, cache.layers)
    return x, Cache(layers, cache.length + time)

  def __call__(self, tokens_BxT, masks: Masks | None = None):
    x, _ = self.stream(
      tokens_BxT, positions_from_zero(tokens_BxT.shape[1]), masks
    )
    return self.unembed(x)


def positions_from_zero(time: int):
  """Positions [1,T] of tokens with none before them."""
  return jnp.arange(time)[None]


class _Matrix(nn.Module):
  """A bare weight matrix."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self):
    return self.param('kernel', _WEIGHT, self.shape)


class _Table(nn.Module):
  """A bare embedding table."""

  rows: int
  width: int

  @nn.compact
  def __call__(self):
    init = nn.initializers.normal(0.02)
    return self.param('table', init, (self.rows, self.width))


def _capture(module, activations):
  if module.capture is not None:
    module.sow(
      'captured',
      'inputs',
      module.capture(activations),
      reduce_fn=lambda _, new: new,
      init_fn=lambda: None,
    )
