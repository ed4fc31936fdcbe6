"""Grouped-query attention as a flax module, for every family.

It computes in two steps, so that statistics and calibration can come between
them: `inputs` returns the inputs of the output projection, and `output` applies
mask and projection. Shape letters as in decoder.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models import linear, rope
from ffp_jax.models.config import ModelConfig
from ffp_jax.models.norms import rms_norm
from ffp_jax.runtime.sharding import constrain


class Past(NamedTuple):
  """Holds a layer's keys and values; those of stacked layers have an axis L."""

  keys: jax.Array  # [B, S, K, H], after rotation if there is one
  values: jax.Array  # [B, S, K, H]


def rotate(
  x_BxTxNxH: jax.Array, angle_BxTxh: jax.Array, amplitude: float
) -> jax.Array:
  """Applies rotary position embedding (arXiv 2104.09864) to heads.

  Dimension i is paired with i + H/2, as in Hugging Face checkpoints.

  Args:
    x_BxTxNxH: queries or keys of N heads.
    angle_BxTxh: angles of the H/2 pairs in radians, float32.
    amplitude: factor of sine and cosine.
  """
  angle = angle_BxTxh[:, :, None]
  sin, cos = amplitude * jnp.sin(angle), amplitude * jnp.cos(angle)
  a, b = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BxTxNxH.dtype)


def _attend(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, visible_BxTxS):
  """Computes softmax attention of grouped heads: [B,T,K,G,H].

  The sum of the softmax divides the values' sum, not each weight, and the
  queries of a group stay side by side: on CPU that takes two thirds of the time
  of `jax.nn.dot_product_attention`.
  """
  scores = jnp.einsum(
    'btkgh,bskh->bktgs',
    q_BxTxKxGxH,
    k_BxSxKxH,
    preferred_element_type=jnp.float32,
  )
  scores *= q_BxTxKxGxH.shape[-1] ** -0.5
  lowest = jnp.finfo(jnp.float32).min
  scores = jnp.where(visible_BxTxS[:, None, :, None], scores, lowest)
  highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.exp(scores - highest)
  values = jnp.einsum(
    'bktgs,bskh->bktgh',
    weights.astype(v_BxSxKxH.dtype),
    v_BxSxKxH,
    preferred_element_type=jnp.float32,
  )
  values /= jnp.sum(weights, axis=-1, keepdims=True)
  return values.swapaxes(1, 2).astype(v_BxSxKxH.dtype)


def in_reach(distance: jax.Array, window: int | None) -> jax.Array:
  """Returns whether tokens see those so many positions before them.

  Args:
    distance: position of the one that sees minus that of the other.
    window: tokens of sliding-window attention, or None.
  """
  visible = distance >= 0
  return visible if window is None else visible & (distance < window)


def _append_to_cache(
  past: Past, positions_BxT, keys_BxTxKxH, values_BxTxKxH
) -> Past:
  """Writes keys and values into the slots of their positions.

  Positions beyond the last slot are dropped.
  """
  rows = jnp.arange(len(positions_BxT))[:, None]
  new = keys_BxTxKxH, values_BxTxKxH
  return Past(
    *(
      constrain(
        old.at[rows, positions_BxT].set(x), 'batch', None, 'groups', None
      )
      for old, x in zip(past, new, strict=True)
    )
  )


class Attention(nn.Module):
  """Grouped-query attention; the mask acts on the inputs of `out`."""

  config: ModelConfig
  groups: int
  capture: Callable[[jax.Array], jax.Array] | None = None

  def setup(self) -> None:
    c, K = self.config, self.groups
    G, H, D = c.heads_per_group, c.head_size, c.width
    shapes = {'query': (K, G, H), 'key': (K, H), 'value': (K, H)}
    for name, shape in shapes.items():
      setattr(self, name, self.param(name, linear.init_weight, (D, *shape)))
      linear.declare_adapter(self, name, (D,), shape)
      if c.qkv_bias:
        bias = self.param(f'{name}_bias', linear.BIAS_INIT, shape)
        setattr(self, f'{name}_bias', bias)
    for name in ('query', 'key') if c.qk_norm else ():
      scale = self.param(f'{name}_norm', nn.initializers.ones, (H,))
      setattr(self, f'{name}_norm', scale)
    self.out = self.param('out', linear.init_weight, (K, G, H, D))
    linear.declare_adapter(self, 'out', (K, G, H), (D,))
    linear.declare_refit(self, K * G * H, K)
    if c.out_bias:
      self.out_bias = self.param('out_bias', linear.BIAS_INIT, (D,))

  def project(
    self, x_BxTxD: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries [B,T,KG,H], keys and values [B,T,K,H], not rotated."""
    c = self.config

    def project(name):
      y = linear.multiply(self, name, x_BxTxD)
      if c.qkv_bias:
        y = y + getattr(self, f'{name}_bias').reshape(-1)
      return y.reshape(*x_BxTxD.shape[:2], -1, c.head_size)

    q, k, v = project('query'), project('key'), project('value')
    if c.qk_norm:
      q = rms_norm(q, self.query_norm, c.norm_eps)
      k = rms_norm(k, self.key_norm, c.norm_eps)
    return q, k, v

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions_BxT: jax.Array,
    visible_BxTxS: jax.Array | None = None,
    *,
    blocks: int = 1,
  ) -> jax.Array:
    """Returns the attention-weighted values, [B,T,K,G,H].

    Args:
      q: queries [B,T,KG,H].
      k, v: keys and values [B,S,K,H], of positions 0 to S - 1.
      positions_BxT: of the queries.
      visible_BxTxS: the keys that each query sees, none after it in its row;
        None for what the positions say.
      blocks: of queries, each of which is attended to by itself, with the keys
        up to its last; more than one only for queries of positions from 0 on.
    """
    c = self.config
    size = q.shape[1]
    q = q.reshape(*q.shape[:2], self.groups, c.heads_per_group, c.head_size)
    attended = []
    for block in np.array_split(np.arange(size), blocks):
      seen = block[-1] + 1 if blocks > 1 else k.shape[1]
      rows = slice(block[0], block[-1] + 1)
      if visible_BxTxS is None:
        distance_BxTxS = positions_BxT[:, rows, None] - jnp.arange(seen)
        visible = in_reach(distance_BxTxS, c.window)
      else:
        visible = visible_BxTxS[:, rows, :seen]
      attended.append(_attend(q[:, rows], k[:, :seen], v[:, :seen], visible))
    attended = jnp.concatenate(attended, axis=1)
    attended = constrain(attended, 'batch', None, 'groups', 'heads', None)
    linear.capture(self, attended)
    return attended

  def inputs(
    self,
    x_BxTxD: jax.Array,
    positions_BxT: jax.Array,
    past: Past | None = None,
    visible_BxTxS: jax.Array | None = None,
  ) -> tuple[jax.Array, Past | None]:
    """Returns the inputs of `out`, [B,T,K,G,H], and the extended past."""
    c = self.config
    if not self.groups:
      shape = *x_BxTxD.shape[:2], 0, c.heads_per_group, c.head_size
      return jnp.zeros(shape, x_BxTxD.dtype), past
    q, k, v = self.project(x_BxTxD)
    if c.positions == 'rope':
      longest = x_BxTxD.shape[1] if past is None else past.keys.shape[1]
      angle = rope.angles(
        c.rope_scaling, c.rope_theta, c.head_size, positions_BxT, longest
      )
      q, k = (rotate(x, angle, c.rope_scaling.amplitude) for x in (q, k))
    if past is not None:
      past = k, v = _append_to_cache(past, positions_BxT, k, v)
    # Half of the scores of a long text are of keys behind their query.
    blocks = 4 if past is None and x_BxTxD.shape[1] >= 64 else 1
    attended = self.attend(q, k, v, positions_BxT, visible_BxTxS, blocks=blocks)
    return attended, past

  def output(
    self, inputs: jax.Array, mask_K: jax.Array | None = None
  ) -> jax.Array:
    """Maps the inputs of `out`, [B,T,K,G,H], to [B,T,D]."""
    y = linear.project_units(self, 'out', inputs, mask_K)
    return y + self.out_bias if self.config.out_bias else y
