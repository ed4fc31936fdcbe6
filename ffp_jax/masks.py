"""Scores and counts to masks, ties broken by index."""

import jax
import jax.numpy as jnp

from ffp_jax.model import Masks


def ranks(score):
  """Place of every unit in its module, 0 for the best; ties by index.

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
  """Masks that keep the `count_S` best units of every module.

  Args:
    rank: from `rank_all`.
    count_S: [S], attention of every layer, then FFN of every layer.

  Returns:
    float32 Masks [L,K] and [L,F].
  """
  attention_L, ffn_L = jnp.split(count_S, 2)
  keep = Masks(rank.attention < attention_L[:, None], rank.ffn < ffn_L[:, None])
  return jax.tree.map(lambda x: x.astype(jnp.float32), keep)


def ones(layers: int, groups: int, channels: int) -> Masks:
  """Masks of the dense model."""
  return Masks(jnp.ones((layers, groups)), jnp.ones((layers, channels)))
