"""The defaults of a comparison of allocation methods."""

import ml_collections

from ffp_jax.config import defaults


def comparison() -> ml_collections.ConfigDict:
  """The defaults, and those of a comparison of allocation methods."""
  config = defaults()
  c = config.compare = ml_collections.ConfigDict()
  c.methods = (
    'uniform',
    'ffn_only',
    'magnitude_global',
    'wanda_global',
    'flap',
    'owl',
    'depth',
    'sensitivity',
    'knapsack',
    'random',
    'evopress',
    'eas',
    'cmaes',
    'amc',
    'fastforward_published',
    'fastforward',
  )
  c.sparsities = (0.2, 0.3)
  c.seeds = (0, 1, 2)  # of the splits of the text and of the methods
  c.tokens = 54_000  # evaluated; a backward pass counts as two forward ones
  c.checkpoints = (0.25, 0.5, 1.0)  # shares of it, at which to look

  # First priority of attention, from which the searches start: whole. AMC and
  # FastForward start as their authors do, ours from search.attention_prior.
  c.attention_prior = 4.0
  s = c.settings = ml_collections.ConfigDict()
  s.owl = dict(outlier=5.0, spread=0.08)
  s.depth = dict(first=0.25)
  s.sensitivity = dict(probe=0.5)
  s.knapsack = dict(ratios=(0.3, 0.5, 0.7, 0.85))
  s.random = dict(std=0.5, candidates=8, survivors=(2, 1), rows=(1, 4))
  s.evopress = dict(level=0.1, offspring=8, survivors=(2, 1), rows=(1, 4))
  s.eas = dict(population=8, parents=4, mutation=0.2, rows=8)
  s.cmaes = dict(std=0.5, rows=2)
  s.amc = dict(
    hidden=300,
    actor_rate=1e-4,
    critic_rate=1e-3,
    tau=0.01,
    noise=0.5,
    decay=0.95,
    warmup=0.25,  # of the budget
    memory=100,  # episodes
    rows=4,
  )
  s.fastforward_published = dict(stairs=4, first_share=0.05, repair='cut')
  return config
