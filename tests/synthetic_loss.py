"""A decoder's shapes, and a loss of its masks whose optimum is known."""

import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import masks, sublayers

L, K, F = 3, 200, 400
# Only its shapes matter; many units, so that rounding hardly does.
WIDE = ModelConfig(
  vocab=10,
  width=4,
  layers=L,
  groups=K,
  heads_per_group=1,
  head_size=2,
  ffn=F,
)
SUBLAYERS = sublayers.find_sublayers(WIDE, round_heads=1, round_ffn=1, floor=1)
# What removing the whole of each sublayer would cost, in nats.
HARM_S = np.array([0.2, 1.0, 4.0, 3.0, 0.3, 0.8])


def rank(config: ModelConfig = WIDE, seed: int = 0) -> Masks:
  """Returns the ranks of units with random scores."""
  source = np.random.default_rng(seed)
  shapes = Masks((config.layers, config.groups), (config.layers, config.ffn))
  return masks.rank_all(Masks(*(source.random(shape) for shape in shapes)))


def harm(kept_S, xp=np):
  """Returns the synthetic loss, a function of the kept shares alone."""
  return 1.0 + xp.sum(HARM_S * xp.square(1.0 - kept_S))


def nll(cliff, tokens_BxT, masks):
  """Returns `harm` in the place of a model's losses, [B].

  It is flat in the masks of units that are kept, as the loss of a model is.

  Args:
    cliff: the loss is NaN where the first FFN keeps a larger share.
    tokens_BxT: only their number counts.
    masks: `Masks`, or None for the dense model.
  """
  if masks is None:
    return jnp.ones(len(tokens_BxT))
  kept_S = jnp.concatenate([(mask * (2.0 - mask)).mean(-1) for mask in masks])
  value = jnp.where(kept_S[L] > cliff, jnp.nan, harm(kept_S, jnp))
  return jnp.full(len(tokens_BxT), value)
