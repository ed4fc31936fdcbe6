"""The decoder as pure functions of its parameters."""

import jax
import jax.numpy as jnp

from ffp_jax.models.decoder import Decoder


def make_apply(config, *, remat=False):
  """(params, tokens, masks) -> logits of the decoder with this config."""
  decoder = Decoder(config, remat=remat)
  return lambda params, tokens, masks: decoder.apply(
    {'params': params}, tokens, masks
  )


def make_capture(config, statistic):
  """(params, tokens) -> `statistic` of each output projection's inputs.

  Returns:
    Function to (attention [L,...], ffn [L,...]) of a dense decoder.
  """
  decoder = Decoder(config, capture=statistic)

  def captured(params, tokens):
    _, seen = decoder.apply({'params': params}, tokens, mutable='captured')
    stack = seen['captured']['stack']
    return stack['attention']['inputs'], stack['ffn']['inputs']

  return captured


def resolve_dtype(name: str):
  """'float32', 'bfloat16', or 'auto': bfloat16 on accelerators."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)
