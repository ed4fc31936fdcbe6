"""What a candidate is worth."""

import jax.numpy as jnp


def reward(dense_nll, pruned_nll):
  """Returns PPL_dense / PPL_pruned: larger is better, never NaN.

  Args:
    dense_nll: mean loss of the dense model on the reward tokens, finite.
    pruned_nll: mean loss of the pruned model on the same tokens.

  Returns:
    The reward; 0 where the pruned loss isn't finite.
  """
  value = jnp.exp(-(pruned_nll - dense_nll))
  return jnp.where(jnp.isfinite(pruned_nll), value, 0.0)
