"""Next-token negative log-likelihood of a masked model, and the reward."""

import jax
import jax.numpy as jnp


def token_nll(apply, params, tokens_BxT, masks=None):
  """Negative log-likelihood of every token but each window's first, in nats.

  Args:
    apply: (params, tokens, masks) -> float32 logits [B,T,V].
    params: what `apply` takes.
    tokens_BxT: token ids.
    masks: `Masks` or None for the dense model.

  Returns:
    float32 [B,T-1].
  """
  logits = apply(params, tokens_BxT, masks)[:, :-1]
  target = tokens_BxT[:, 1:, None]
  picked = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


def nll(apply, params, tokens_BxT, masks=None):
  """Mean of `token_nll` over each window, float32 [B]."""
  return jnp.mean(token_nll(apply, params, tokens_BxT, masks), axis=-1)
