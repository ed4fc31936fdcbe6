"""The decoder as pure functions of its parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ffp_jax.models.config import ModelConfig
from ffp_jax.models.decoder import Decoder, Masks


def make_apply(
  config: ModelConfig, *, remat: bool = False
) -> Callable[[dict, jax.Array, Masks | None], jax.Array]:
  """Returns the function (params, tokens [B,T], masks) -> logits [B,T,V].

  Args:
    config: of the decoder.
    remat: whether the backward pass recomputes each layer, to save memory.
  """
  decoder = Decoder(config, remat=remat)

  def apply(params, tokens, masks) -> Any:
    return decoder.apply({'params': params}, tokens, masks)

  return apply


def make_capture(
  config: ModelConfig, statistic: Callable[[jax.Array], jax.Array]
) -> Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]:
  """Returns a function that computes statistics of the sublayers' activations.

  Args:
    config: of a dense decoder.
    statistic: maps the inputs of an output projection, attention
      [B,T,K,G,H] or FFN [B,T,F], to an array.

  Returns:
    The function (params, tokens [B,T]) -> (attention [L,...], ffn [L,...]).
  """
  decoder = Decoder(config, capture=statistic)

  def captured(params, tokens):
    _, seen = decoder.apply({'params': params}, tokens, mutable='captured')
    stack = seen['captured']['stack']
    return stack['attention']['inputs'], stack['ffn']['inputs']

  return captured


def resolve_dtype(name: str) -> jnp.dtype:
  """Returns the dtype of a name.

  Args:
    name: such as 'float32' or 'bfloat16'; 'auto' for bfloat16, but float32 on
      CPU.
  """
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)
