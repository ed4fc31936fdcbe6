"""Scores the importance of each attention group and FFN channel."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ffp_jax.models import functional
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.runtime.compiling import BRIEFLY


def square_sum(activations: jax.Array) -> jax.Array:
  """Returns the float32 sum of squares of [B,T,...] over B and T.

  It is the statistic of a projection's inputs that `wanda` needs.
  """
  squares = jnp.square(activations.astype(jnp.float32))
  return jnp.sum(squares, axis=(0, 1))


def input_norms(
  captured_apply: Callable, params: dict, tokens_WxBxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the root mean square of every output projection's inputs.

  Args:
    captured_apply: (params, tokens [B,T]) -> (attention [L,K,G,H],
      ffn [L,F]), the `square_sum` of each output projection's inputs.
    params: of the decoder.
    tokens_WxBxT: calibration tokens in W batches.

  Returns:
    float32 (attention [L,K,G,H], ffn [L,F]).
  """

  def add(total, tokens):
    return jax.tree.map(jnp.add, total, captured_apply(params, tokens)), None

  shapes = jax.eval_shape(captured_apply, params, tokens_WxBxT[0])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
  total, _ = jax.lax.scan(add, zeros, tokens_WxBxT)
  return jax.tree.map(lambda x: jnp.sqrt(x / tokens_WxBxT.size), total)


def make_measure(model: ModelConfig) -> Callable:
  """Returns the jitted (params, tokens [W,B,T]) -> `input_norms` of a model."""
  captured = functional.make_capture(model, square_sum)
  measure = functools.partial(input_norms, captured)
  return jax.jit(measure, compiler_options=BRIEFLY)


def wanda(
  out_weights: tuple[jax.Array, jax.Array], norms: tuple[jax.Array, jax.Array]
) -> Masks:
  """Returns |weight| times the root mean square of its input, summed per unit.

  The score of a weight is that of Wanda (arXiv 2306.11695, equation 1); a
  unit's score is the sum over its rows of the output projection.

  Args:
    out_weights: (attention out [L,K,G,H,D], ffn down [L,F,D]).
    norms: from `input_norms`.

  Returns:
    float32 scores [L,K] and [L,F].
  """
  out, down = (jnp.abs(w.astype(jnp.float32)).sum(-1) for w in out_weights)
  attention, ffn = norms
  return Masks(jnp.sum(out * attention, axis=(2, 3)), down * ffn)
