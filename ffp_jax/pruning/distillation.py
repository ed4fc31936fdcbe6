"""How far the predictions of a pruned model are from the dense model's."""

import functools

import jax
import jax.numpy as jnp


def distillation_loss(
  unembed, params, stream_BxTxD, dense, dense_stream_BxTxD, *, chunk
):
  """Returns the mean over tokens of KL(dense || pruned), in float32.

  Logits exist for a chunk of tokens at a time, and are computed once: where a
  gradient is wanted, it is taken chunk by chunk along with the value.

  Args:
    unembed: (params, stream [B,t,D]) -> float32 logits [B,t,V].
    params: what `unembed` reads of the pruned model, and no more, as there is
      a gradient of all of it.
    stream_BxTxD: the pruned model's last residual stream.
    dense, dense_stream_BxTxD: the same of the dense model; no gradient.
    chunk: tokens whose logits may exist at once, if B is not more already.
  """
  B, T, _ = stream_BxTxD.shape
  time = max(
    t for t in range(1, T + 1) if T % t == 0 and B * t <= max(chunk, B)
  )

  def chunks(x_BxTxD):
    return jnp.moveaxis(x_BxTxD.reshape(B, T // time, time, -1), 1, 0)

  streams = chunks(stream_BxTxD), chunks(dense_stream_BxTxD)
  return _divergence(unembed, params, streams[0], dense, streams[1]) / (B * T)


def _chunk_divergence(unembed, params, stream, dense, dense_stream):
  """Returns the sum over a chunk of tokens of KL(dense || pruned)."""
  aim = jax.nn.log_softmax(unembed(dense, dense_stream))
  found = jax.nn.log_softmax(unembed(params, stream))
  return jnp.sum(jnp.exp(aim) * (aim - found))


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
  """Returns the value, and its gradient in the streams and in trained heads."""
  heads = any(x.perturbed for x in jax.tree.leaves(params))
  params, streams, dense, dense_streams = jax.tree.map(
    lambda x: x.value, (params, streams, dense, dense_streams)
  )

  def add(totals, chunk):
    stream, dense_stream = chunk
    value, (of_stream, *of_params) = jax.value_and_grad(
      _chunk_divergence, argnums=(2, 1) if heads else (2,)
    )(unembed, params, stream, dense, dense_stream)
    return jax.tree.map(jnp.add, totals, (value, of_params)), of_stream

  zeros = [jax.tree.map(lambda x: jnp.zeros(x.shape), params)] if heads else []
  (total, of_params), of_streams = jax.lax.scan(
    add, (jnp.float32(0.0), zeros), (streams, dense_streams)
  )
  of_params = [
    jax.tree.map(lambda g, x: g.astype(x.dtype), tree, params)
    for tree in of_params
  ]
  return total, (of_streams, of_params)


def _divergence_backward(unembed, gradients, slope):
  del unembed
  of_streams, of_params = jax.tree.map(
    lambda x: (x * slope).astype(x.dtype), gradients
  )
  return (of_params or [None])[0], of_streams, None, None


_divergence.defvjp(
  _divergence_forward, _divergence_backward, symbolic_zeros=True
)
