"""Allocation methods behind one signature, to compare at the same cost.

See problem.py for the signature. The settings of a method are its own keyword
defaults; to add a method, write its generator and one line in METHODS.
"""

import functools
from collections.abc import Callable, Iterator

import ml_collections
import numpy as np

from ffp_jax.baselines import (
  amc,
  cmaes,
  evolution,
  fastforward,
  heuristics,
  sensitivity,
)
from ffp_jax.baselines.problem import score_calibrated

# (problem, seed, settings by name) -> incumbents, see problem.py.
Method = Callable[..., Iterator[np.ndarray]]

# The methods that a comparison runs by default.
METHODS: dict[str, Method] = {
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

_SCORING = (
  'sensitivity',
  'knapsack',
  'random',
  'evopress',
  'eas',
  'cmaes',
  'amc',
)

# The same methods with one thing changed, on request. 'evopress_refit' is
# 'evopress' with candidates scored as calibration will leave them, which
# 'fastforward' does by itself.
VARIANTS: dict[str, Method] = {
  'fastforward_published_exact': functools.partial(
    fastforward.published, repair='project'
  ),
  # Attention and FFNs are removed whole, or as far as the floors let them:
  # with budget.floor=0 and search.min_ratio=0.
  'knapsack_whole': functools.partial(sensitivity.knapsack, ratios=()),
  **{
    f'{name}_refit': functools.partial(score_calibrated, METHODS[name])
    for name in _SCORING
  },
}

# 'fastforward' with other values of keys of the configuration, on request.
ABLATIONS = {
  # The score function in place of gradients through the masks.
  'fastforward_score': {
    'search.candidates': 8,
    'policy.pathwise_weight': 0.0,
    'policy.score_weight': 1.0,
    'policy.value_weight': 0.5,
  },
  # No curriculum of sparsities.
  'fastforward_steep': {'search.sparsity_shares': (1.0, 1.0)},
  # More reward rows in the second stage.
  'fastforward_rising': {'search.rows': (1, 2)},
  # The uniform allocation as the start.
  'fastforward_even': {'search.attention_prior': 0.0},
  # A pair of proposals per step in place of the policy's mean.
  'fastforward_pairs': {'search.candidates': 2},
  # Gradients averaged over fewer units.
  'fastforward_narrow': {'search.window': 0.05},
  # Candidates scored as they are cut, not as calibration will leave them.
  'fastforward_cut': {'search.refit': 0.0},
}


def allocator(name: str, config: ml_collections.ConfigDict) -> Method:
  """Returns the method of a name as a function of a `Problem` and a seed.

  Args:
    name: a key of METHODS, VARIANTS or ABLATIONS.
    config: of the run; an ablation's keys are changed in it already.
  """
  method = 'fastforward' if name in ABLATIONS else name
  allocate = {**METHODS, **VARIANTS}[method]
  if method.startswith('fastforward'):
    return functools.partial(allocate, config=config)
  return allocate
