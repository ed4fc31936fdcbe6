"""The distillation loss: KL divergence from a dense model to a pruned one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def distillation_loss(
  unembed: Callable[[dict, jax.Array], jax.Array],
  params: dict,
  stream_BxTxD: jax.Array,
  dense: dict,
  dense_stream_BxTxD: jax.Array,
  *,
  chunk: int,
) -> jax.Array:
  """Returns the mean over tokens of KL(dense || pruned), a float32 scalar.

  The logits of only a chunk of tokens exist at a time, and are computed once:
  where a gradient is wanted, it is taken chunk by chunk along with the value.

  Args:
    unembed: (params, stream [B,t,D]) -> float32 logits [B,t,V].
    params: parameters of the pruned model that `unembed` reads; a gradient is
      computed for each of them.
    stream_BxTxD: last residual stream of the pruned model.
    dense: the same parameters of the dense model, without gradient.
    dense_stream_BxTxD: last residual stream of the dense model, without
      gradient.
    chunk: most tokens whose logits may exist at once; at least B are taken.
  """
  B, T, _ = stream_BxTxD.shape
  length = max(
    t for t in range(1, T + 1) if T % t == 0 and B * t <= max(chunk, B)
  )

  def chunks(x_BxTxD):
    return jnp.moveaxis(x_BxTxD.reshape(B, T // length, length, -1), 1, 0)

  streams, dense_streams = chunks(stream_BxTxD), chunks(dense_stream_BxTxD)
  return _divergence(unembed, params, streams, dense, dense_streams) / (B * T)


def _chunk_divergence(unembed, params, stream, dense, dense_stream):
  """Returns the sum over a chunk of tokens of KL(dense || pruned)."""
  dense_log_prob = jax.nn.log_softmax(unembed(dense, dense_stream))
  log_prob = jax.nn.log_softmax(unembed(params, stream))
  return jnp.sum(jnp.exp(dense_log_prob) * (dense_log_prob - log_prob))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(unembed, params, streams, dense, dense_streams):
  """Returns the sum over chunks of `_chunk_divergence`."""

  def add(total, chunk):
    stream, dense_stream = chunk
    new = _chunk_divergence(unembed, params, stream, dense, dense_stream)
    return total + new, None

  chunks = streams, dense_streams
  return jax.lax.scan(add, jnp.float32(0.0), chunks)[0]


def _divergence_forward(unembed, params, streams, dense, dense_streams):
  """Returns the value, and its gradients by streams and trained parameters."""
  trains = any(x.perturbed for x in jax.tree.leaves(params))
  params, streams, dense, dense_streams = jax.tree.map(
    lambda x: x.value, (params, streams, dense, dense_streams)
  )

  def add(totals, chunk):
    stream, dense_stream = chunk
    value, (by_stream, *by_params) = jax.value_and_grad(
      _chunk_divergence, argnums=(2, 1) if trains else (2,)
    )(unembed, params, stream, dense, dense_stream)
    return jax.tree.map(jnp.add, totals, (value, by_params)), by_stream

  zeros = [jax.tree.map(lambda x: jnp.zeros(x.shape), params)] if trains else []
  (total, by_params), by_streams = jax.lax.scan(
    add, (jnp.float32(0.0), zeros), (streams, dense_streams)
  )
  by_params = [
    jax.tree.map(lambda g, x: g.astype(x.dtype), tree, params)
    for tree in by_params
  ]
  return total, (by_streams, by_params)


def _divergence_backward(unembed, gradients, slope):
  """Scales the gradients that the forward pass has computed."""
  del unembed
  by_streams, by_params = jax.tree.map(
    lambda x: (x * slope).astype(x.dtype), gradients
  )
  return (by_params or [None])[0], by_streams, None, None


_divergence.defvjp(
  _divergence_forward, _divergence_backward, symbolic_zeros=True
)
