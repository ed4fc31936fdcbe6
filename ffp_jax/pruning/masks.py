"""Maps scores to ranks, and ranks and counts to masks."""

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Masks


def ranks(score: jax.Array) -> jax.Array:
  """Returns the rank of every unit in its sublayer, 0 for the best.

  Args:
    score: [..., U], larger is more important.

  Returns:
    int32 [..., U], a permutation of 0..U-1 along the last axis; ties are broken
    by index.
  """
  order = jnp.argsort(-score, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1).astype(jnp.int32)


def rank_all(scores: Masks) -> Masks:
  """Returns the `ranks` of attention scores [L,K] and FFN scores [L,F]."""
  return Masks(*map(ranks, scores))


def from_counts(rank: Masks, count_S: jax.Array | np.ndarray) -> Masks:
  """Returns masks that keep the best units of every sublayer.

  Args:
    rank: from `rank_all`.
    count_S: units to keep, the attention and then the FFN of every layer, [S];
      the fraction of a count that is not whole is the mask of its last unit.

  Returns:
    float32 Masks [L,K] and [L,F].
  """
  attention_L, ffn_L = jnp.split(count_S, 2)

  def keep(count_L, rank):
    return jnp.clip((count_L[:, None] - rank).astype(jnp.float32), 0.0, 1.0)

  return Masks(keep(attention_L, rank.attention), keep(ffn_L, rank.ffn))


def ones(layers: int, groups: int, channels: int) -> Masks:
  """Returns float32 masks [L,K] and [L,F] that keep every unit."""
  return Masks(jnp.ones((layers, groups)), jnp.ones((layers, channels)))
