"""The reward of a candidate."""

import jax
import jax.numpy as jnp


def reward(dense_nll: jax.Array, pruned_nll: jax.Array) -> jax.Array:
  """Returns PPL_dense / PPL_pruned: larger is better, never NaN.

  Args:
    dense_nll: mean loss of the dense model on the reward tokens, in nats,
      finite.
    pruned_nll: mean loss of the pruned model on the same tokens, in nats.

  Returns:
    The reward, of the shape of the arguments; 0 where the pruned loss is not
    finite.
  """
  value = jnp.exp(-(pruned_nll - dense_nll))
  return jnp.where(jnp.isfinite(pruned_nll), value, 0.0)
