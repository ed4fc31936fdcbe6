"""Scores and counts to masks, ties broken by index."""

import jax.numpy as jnp

from ffp_jax.models.decoder import Masks


def ranks(score):
  """Place of every unit in its sublayer, 0 for the best; ties by index.

  Args:
    score: [..., U], larger is more important.

  Returns:
    int32 [..., U], a permutation of 0..U-1 along the last axis.
  """
  order = jnp.argsort(-score, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1).astype(jnp.int32)


def rank_all(scores: Masks) -> Masks:
  """`ranks` of attention scores [L,K] and FFN scores [L,F]."""
  return Masks(*map(ranks, scores))


def from_counts(rank: Masks, count_S) -> Masks:
  """Masks that keep the `count_S` best units of every sublayer.

  Args:
    rank: from `rank_all`.
    count_S: [S], attention of every layer, then FFN of every layer; of a
      count that isn't whole, the fraction is the mask of its last unit.

  Returns:
    float32 Masks [L,K] and [L,F].
  """
  attention_L, ffn_L = jnp.split(count_S, 2)

  def keep(count_L, rank):
    return jnp.clip((count_L[:, None] - rank).astype(jnp.float32), 0.0, 1.0)

  return Masks(keep(attention_L, rank.attention), keep(ffn_L, rank.ffn))


def ones(layers: int, groups: int, channels: int) -> Masks:
  """Masks of the dense model."""
  return Masks(jnp.ones((layers, groups)), jnp.ones((layers, channels)))
