"""Allocators behind one signature, to compare at the same cost.

See problem.py for the signature. Settings come from the configuration's
`compare.settings`, one entry a method.
"""

from ffp_jax.baselines import (
  amc,
  cmaes,
  evolution,
  fastforward,
  heuristics,
  sensitivity,
)

METHODS = {
  'uniform': heuristics.uniform,
  'ffn_only': heuristics.ffn_only,
  'magnitude_global': heuristics.magnitude_global,
  'wanda_global': heuristics.wanda_global,
  'flap': heuristics.flap,
  'owl': heuristics.owl,
  'depth': heuristics.depth,
  'sensitivity': sensitivity.proportional,
  'knapsack': sensitivity.knapsack,
  'random': evolution.random,
  'evopress': evolution.evopress,
  'eas': evolution.eas,
  'cmaes': cmaes.cmaes,
  'amc': amc.amc,
  'fastforward_published': fastforward.published,
  'fastforward': fastforward.shipped,
}

# Those that score candidates: 'evopress_refit' is 'evopress' with candidates
# scored as calibration will leave them, which 'fastforward' does by itself.
_SCORING = (
  'sensitivity',
  'knapsack',
  'random',
  'evopress',
  'eas',
  'cmaes',
  'amc',
)
REFIT = tuple(f'{name}_refit' for name in _SCORING)

# A method with one thing changed: name to keys of the configuration.
ABLATIONS = {
  # The score function in the place of gradients through the masks.
  'fastforward_score': {
    'search.candidates': 8,
    'policy.pathwise_weight': 0.0,
    'policy.score_weight': 1.0,
    'policy.value_weight': 0.5,
  },
  # No sparsity curriculum; a rising number of reward rows.
  'fastforward_steep': {'search.sparsity_shares': (1.0, 1.0)},
  'fastforward_rising': {'search.rows': (1, 2)},
  # From the uniform allocation.
  'fastforward_even': {'search.attention_prior': 0.0},
  # A pair of proposals a step instead of the policy's mean.
  'fastforward_pairs': {'search.candidates': 2},
  # Gradients of fewer units.
  'fastforward_narrow': {'search.window': 0.05},
  # Candidates scored as they are cut, not as calibration will leave them.
  'fastforward_cut': {'search.refit': 0.0},
  # As published, but with the exact projection.
  'fastforward_published_exact': {
    'compare.settings.fastforward_published.repair': 'project'
  },
}


def base(name: str) -> str:
  """The method that a name in METHODS, REFIT or ABLATIONS is one of."""
  return max((m for m in METHODS if name.startswith(m)), key=len)
