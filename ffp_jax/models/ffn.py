"""The feed-forward network as a flax module, for every family.

In two steps as attention is, see attention.py.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffp_jax.models import linear
from ffp_jax.models.config import ModelConfig
from ffp_jax.runtime.sharding import constrain

ACTIVATIONS = {
  'silu': nn.silu,
  'relu': nn.relu,
  'gelu': functools.partial(nn.gelu, approximate=False),
}


class Ffn(nn.Module):
  """Gated or plain feed-forward; the mask acts on the inputs of `down`."""

  config: ModelConfig
  channels: int
  capture: Callable[[jax.Array], jax.Array] | None = None

  def setup(self) -> None:
    c, F = self.config, self.channels
    for name in ('gate', 'up') if c.gated else ('up',):
      setattr(self, name, self.param(name, linear.init_weight, (c.width, F)))
      linear.declare_adapter(self, name, (c.width,), (F,))
      if c.ffn_bias:
        bias = self.param(f'{name}_bias', linear.BIAS_INIT, (F,))
        setattr(self, f'{name}_bias', bias)
    self.down = self.param('down', linear.init_weight, (F, c.width))
    linear.declare_adapter(self, 'down', (F,), (c.width,))
    linear.declare_refit(self, F, F)
    if c.ffn_bias:
      self.down_bias = self.param('down_bias', linear.BIAS_INIT, (c.width,))

  def inputs(self, x_BxTxD: jax.Array) -> jax.Array:
    """Returns the inputs of `down`, [B,T,F]."""

    def project(name):
      y = linear.multiply(self, name, x_BxTxD)
      return y + getattr(self, f'{name}_bias') if self.config.ffn_bias else y

    if not self.channels:
      return jnp.zeros((*x_BxTxD.shape[:2], 0), x_BxTxD.dtype)
    activation = ACTIVATIONS[self.config.activation]
    if self.config.gated:
      hidden = activation(project('gate')) * project('up')
    else:
      hidden = activation(project('up'))
    hidden = constrain(hidden, 'batch', None, 'ffn')
    linear.capture(self, hidden)
    return hidden

  def output(
    self, inputs: jax.Array, mask_F: jax.Array | None = None
  ) -> jax.Array:
    """Maps the inputs of `down`, [B,T,F], to [B,T,D]."""
    y = linear.project_units(self, 'down', inputs, mask_F)
    return y + self.down_bias if self.config.ffn_bias else y
