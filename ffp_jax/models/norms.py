"""Norms of the residual stream and of heads, computed in float32."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffp_jax.models.config import ModelConfig

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
  def __call__(self, x: jax.Array) -> jax.Array:
    norm_class = _NORMS[self.config.norm]
    norm = norm_class(
      epsilon=self.config.norm_eps, dtype=jnp.float32, name='norm'
    )
    return norm(x).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Returns RMSNorm over the last axis.

  Args:
    x: [...,H].
    scale: [H].
    epsilon: added to the mean square.
  """
  wide = x.astype(jnp.float32)
  mean = jnp.mean(wide**2, axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(mean + epsilon) * scale).astype(x.dtype)
