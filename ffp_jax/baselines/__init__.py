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
