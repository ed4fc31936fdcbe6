"""The distillation loss: a pruned model learns from a dense one and a text."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

_UNKNOWN = -1  # in the place of a next token


def distillation_loss(
  unembed: Callable[[dict, jax.Array], jax.Array],
  params: dict,
  stream_BxTxD: jax.Array,
  dense: dict,
  dense_stream_BxTxD: jax.Array,
  tokens_BxT: jax.Array,
  *,
  cross_entropy: float,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the loss, and the divergence in it that has no gradient.

  The divergence is the mean over tokens of KL(dense || pruned). The loss takes
  a share of it from the cross-entropy of the tokens that follow.

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
    tokens_BxT: the tokens that both models read.
    cross_entropy: its share of the loss, from 0 to 1.
    chunk: most tokens whose logits may exist at once; at least B are taken.

  Returns:
    (loss, divergence), float32 scalars in nats.
  """
  B, T, _ = stream_BxTxD.shape
  length = max(
    t for t in range(1, T + 1) if T % t == 0 and B * t <= max(chunk, B)
  )

  def chunks(x_BxTxN):
    return jnp.moveaxis(x_BxTxN.reshape(B, T // length, length, -1), 1, 0)

  next_BxT = jnp.roll(tokens_BxT, -1, axis=1).at[:, -1].set(_UNKNOWN)
  # The last token of a row has no next one, so that the others count for more.
  shares = 1.0 - cross_entropy, cross_entropy * T / max(1, T - 1)
  loss, divergence = _losses(
    unembed,
    shares,
    params,
    chunks(stream_BxTxD),
    dense,
    chunks(dense_stream_BxTxD),
    chunks(next_BxT),
  )
  return loss / (B * T), divergence / (B * T)


def _chunk_losses(unembed, shares, params, stream, dense, dense_stream, labels):
  """Returns the sums over a chunk of tokens of loss and divergence."""
  dense_log_prob = jax.nn.log_softmax(unembed(dense, dense_stream))
  log_prob = jax.nn.log_softmax(unembed(params, stream))
  divergence = jnp.sum(jnp.exp(dense_log_prob) * (dense_log_prob - log_prob))
  if not shares[1]:
    return divergence, divergence
  found = jnp.take_along_axis(log_prob, jnp.maximum(labels, 0), axis=-1)
  cross_entropy = -jnp.sum(jnp.where(labels == _UNKNOWN, 0.0, found))
  return shares[0] * divergence + shares[1] * cross_entropy, divergence


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(unembed, shares, params, streams, dense, dense_streams, labels):
  """Returns the sums over chunks of `_chunk_losses`."""

  def add(totals, chunk):
    stream, *others = chunk
    new = _chunk_losses(unembed, shares, params, stream, dense, *others)
    return jax.tree.map(jnp.add, totals, new), None

  zeros = jnp.float32(0.0), jnp.float32(0.0)
  return jax.lax.scan(add, zeros, (streams, dense_streams, labels))[0]


def _losses_forward(
  unembed, shares, params, streams, dense, dense_streams, labels
):
  """Returns the values, and the loss's gradients by streams and parameters."""
  trains = any(x.perturbed for x in jax.tree.leaves(params))
  params, streams, dense, dense_streams, labels = jax.tree.map(
    lambda x: x.value, (params, streams, dense, dense_streams, labels)
  )

  def add(totals, chunk):
    stream, *others = chunk
    values, (by_stream, *by_params) = jax.value_and_grad(
      _chunk_losses, argnums=(3, 2) if trains else (3,), has_aux=True
    )(unembed, shares, params, stream, dense, *others)
    return jax.tree.map(jnp.add, totals, (values, by_params)), by_stream

  zeros = [jax.tree.map(lambda x: jnp.zeros(x.shape), params)] if trains else []
  (totals, by_params), by_streams = jax.lax.scan(
    add,
    ((jnp.float32(0.0), jnp.float32(0.0)), zeros),
    (streams, dense_streams, labels),
  )
  by_params = [
    jax.tree.map(lambda g, x: g.astype(x.dtype), tree, params)
    for tree in by_params
  ]
  return totals, (by_streams, by_params)


def _losses_backward(unembed, shares, gradients, slopes):
  """Scales the gradients that the forward pass has computed."""
  del unembed, shares
  by_streams, by_params = jax.tree.map(
    lambda x: (x * slopes[0]).astype(x.dtype), gradients
  )
  return (by_params or [None])[0], by_streams, None, None, None


_losses.defvjp(_losses_forward, _losses_backward, symbolic_zeros=True)
