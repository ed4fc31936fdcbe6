"""The configuration of a comparison of allocation methods, and its checks."""

import importlib.util

import ml_collections

from ffp_jax.baselines import ABLATIONS, METHODS, VARIANTS
from ffp_jax.config import defaults
from ffp_jax.errors import RequestError


def comparison() -> ml_collections.ConfigDict:
  """Returns the defaults of a run with those of a comparison beside them.

  The settings of a method are keyword defaults of its generator.
  """
  config = defaults()
  config.text.other = ''  # a comparison is on one text
  c = config.compare = ml_collections.ConfigDict()
  c.methods = tuple(METHODS)
  c.sparsities = (0.2, 0.3)
  c.seeds = (0, 1, 2)  # of the splits of the text and of the methods
  c.tokens = 54_000  # evaluated; a backward pass counts as two forward passes
  c.checkpoints = (0.25, 0.5, 1.0)  # shares of tokens at which to evaluate

  # The first priority of attention, from which the searches start: nothing is
  # removed. AMC and the published FastForward start as their authors have it,
  # ours starts from search.attention_prior.
  c.attention_prior = 4.0
  return config


def validate(config: ml_collections.ConfigDict) -> None:
  """Refuses unknown methods and a budget that cannot pay for all of them.

  Raises:
    RequestError: names the key that is wrong.
  """
  if 'compare' not in config:
    raise RequestError("--config: no key 'compare'; give configs/compare.py")
  c = config.compare
  known = [*METHODS, *ABLATIONS, *VARIANTS]
  for name in c.methods:
    if name not in known:
      raise RequestError(
        f'compare.methods: {name!r} is not one of {", ".join(known)}'
      )
  if {'cmaes', 'cmaes_refit'} & {*c.methods} and not importlib.util.find_spec(
    'cma'
  ):
    raise RequestError('compare.methods: cmaes needs `pip install cma`')
  for key in ('methods', 'sparsities', 'seeds', 'checkpoints'):
    if not c[key]:
      raise RequestError(f'compare.{key}: give at least one')
  if any(config.budget[key] for key in ('flops', 'kv_cache', 'latency')):
    raise RequestError(
      'budget.flops, budget.kv_cache, budget.latency: a comparison is at one '
      'budget, of parameters; leave them at 0'
    )
  needed = config.text.calibration_windows * config.text.context
  if c.tokens < needed:
    raise RequestError(
      f'compare.tokens: {c.tokens} must be at least {needed}, the calibration '
      'text, which some methods measure'
    )
  if not all(0.0 < share <= 1.0 for share in c.checkpoints):
    raise RequestError('compare.checkpoints: each must be in (0, 1]')


def cell_config(
  config: ml_collections.ConfigDict,
  seed: int,
  sparsity: float,
  method: str = '',
) -> ml_collections.ConfigDict:
  """Returns the configuration of one seed, sparsity and, if any, ablation."""
  cell = config.copy_and_resolve_references()
  cell.seed, cell.budget.sparsity = seed, sparsity
  cell.update_from_flattened_dict(ABLATIONS.get(method, {}))
  return cell
