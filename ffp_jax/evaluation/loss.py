"""The next-token negative log-likelihood of a masked model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.models.functional import make_apply


def token_nll(
  apply: Callable,
  params: dict,
  tokens_BxT: jax.Array,
  masks: Masks | None = None,
) -> jax.Array:
  """Returns the loss of every token but the first of each window, in nats.

  Args:
    apply: (params, tokens, masks) -> float32 logits [B,T,V].
    params: of the decoder.
    tokens_BxT: token ids.
    masks: the units to keep, or None for the dense model.

  Returns:
    float32 [B,T-1].
  """
  logits = apply(params, tokens_BxT, masks)[:, :-1]
  target = tokens_BxT[:, 1:, None]
  picked = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


def nll(
  apply: Callable,
  params: dict,
  tokens_BxT: jax.Array,
  masks: Masks | None = None,
) -> jax.Array:
  """Returns the mean of `token_nll` over each window, float32 [B]."""
  return jnp.mean(token_nll(apply, params, tokens_BxT, masks), axis=-1)


def make_nll(
  config: ModelConfig, *, remat: bool = False
) -> Callable[..., jax.Array]:
  """Returns the losses of a decoder as a function.

  Args:
    config: of the decoder.
    remat: whether a backward pass recomputes the activations of a layer, which
      takes less memory and more time.

  Returns:
    (params, tokens [B,T], `Masks` or None) -> mean loss of each window in nats,
    float32 [B].
  """
  apply = make_apply(config, remat=remat)

  def losses(params, tokens_BxT, masks=None):
    return nll(apply, params, tokens_BxT, masks)

  return losses
