"""The stages of a run, in the order in which prune.py runs them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ffp_jax import config as config_lib
from ffp_jax.evaluation import scoring
from ffp_jax.evaluation.loss import make_nll
from ffp_jax.models import functional
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import (
  allocation,
  calibration,
  curriculum,
  importance,
  search,
)
from ffp_jax.pruning import masks as masks_lib
from ffp_jax.pruning import refit as refit_lib


class ScoringModel(NamedTuple):
  """The decoder that candidates are scored on."""

  model: ModelConfig
  params: dict


class Finalist(NamedTuple):
  """A candidate that was re-scored."""

  counts: np.ndarray  # [S]
  priority: np.ndarray  # [S]
  nll: float  # mean over the whole reward text, in nats


def rank_units(job, params) -> allocation.DeviceSublayers:
  """Scores the units on the calibration text and ranks each sublayer's."""
  captured = functional.make_capture(job.model, importance.square_sum)
  measure = jax.jit(lambda p, t: importance.input_norms(captured, p, t))
  norms = measure(params, job.text.calibration[:, None])
  weights = params['stack']['attention']['out'], params['stack']['ffn']['down']
  scores = jax.jit(importance.wanda)(weights, norms)
  ranks = masks_lib.rank_all(scores)
  # Block, so that the stage's time includes the computation.
  return jax.block_until_ready(allocation.to_device(job.sublayers, ranks))


def reward_text(config, job, params, scorer) -> search.RewardText:
  """Returns the reward rows, and the dense model's loss on each."""
  rows = job.text.reward.reshape(-1, config.search.context)
  dense = scorer.each(params, rows, job.dense, label='dense loss')
  return search.RewardText(rows, dense)


def refit(config, job, params, device_sublayers) -> ScoringModel:
  """Returns the decoder whose masks refit, or the dense one."""
  if not config_lib.refits(config):
    return ScoringModel(job.model, params)
  model, refit_params = refit_lib.refit_model(
    params,
    job.model,
    device_sublayers.rank,
    job.text.calibration[:, None],
    strength=config.search.refit,
  )
  return ScoringModel(model, jax.block_until_ready(refit_params))


def search_allocation(
  config, job, scored, device_sublayers, text, state, follow
) -> tuple[np.ndarray, dict]:
  """Searches from a state to the end of the curriculum.

  Returns:
    (priorities worth re-scoring [M,S], what the whole search evaluates).
  """
  state, metrics = follow(
    search.steps(
      config,
      job.sublayers,
      device_sublayers,
      make_nll(scored.model, remat=config.search.remat),
      scored.params,
      text,
      state,
    )
  )
  cost = search.search_cost(config, curriculum.stages(config))
  cost |= {'compilations': metrics.get('compilations', 0)}
  return search.finalists(config, job.sublayers, state), cost


def rescore(
  config, job, scored, device_sublayers, text, finalists
) -> list[Finalist]:
  """Scores every finalist on the whole reward text."""
  scorer = scoring.Scorer(scored.model)
  counts = {
    tuple(counts_of(config, job, device_sublayers, row)): row
    for row in finalists
  }
  return [
    Finalist(
      np.array(count),
      row,
      scorer(
        scored.params,
        text.rows_RxT,
        masks_lib.from_counts(device_sublayers.rank, jnp.array(count)),
        label='re-score',
      ),
    )
    for count, row in counts.items()
  ]


def counts_of(config, job, device_sublayers, priority_S) -> np.ndarray:
  """Returns the counts [S] of priorities at the run's budget."""
  return allocation.priorities_to_counts(
    priority_S,
    config.budget.sparsity,
    job.sublayers,
    device_sublayers,
    min_ratio=config.search.min_ratio,
    repair=config.search.repair,
  )


def uniform_masks(config, job, device_sublayers) -> Masks:
  """Returns masks of the same budget, spread evenly by the projection."""
  counts = allocation.priorities_to_counts(
    np.zeros(len(job.sublayers.units)),
    config.budget.sparsity,
    job.sublayers,
    device_sublayers,
    min_ratio=config.search.min_ratio,
  )
  return masks_lib.from_counts(device_sublayers.rank, jnp.array(counts))


def calibrate(config, job, params, keep: dict[str, Masks]) -> dict[str, dict]:
  """Returns parameters with calibrated output projections, for each mask."""
  if not config.calibration.enabled:
    return dict.fromkeys(keep, params)
  calibrated, windows = {}, config.calibration.windows
  fit_on = job.text.calibration[: windows or None]
  for name, masks in keep.items():
    calibrated[name], strengths = calibration.calibrate(
      params,
      job.model,
      masks,
      fit_on[:, None],
      job.text.validation[:, None],
      strengths=config.calibration.strengths,
      dtype=job.dtype,
    )
    logging.info(
      'calibrate %s: ridge strengths, number of sublayers: %s',
      name,
      {f'{k:g}': int(np.sum(strengths == k)) for k in np.unique(strengths)},
    )
  return calibrated


def evaluate(config, job, params, pruned, scorer) -> dict:
  """Returns perplexities of the dense model and the pruned ones.

  They are of held-out text, and, of the dense and the saved model, of the text
  of another kind as well.
  """
  keep, calibrated = pruned.keep, pruned.params
  models = {
    'dense': (params, job.dense),
    'uniform': (params, keep['uniform']),
    'searched': (params, keep['searched']),
  }
  if config.calibration.enabled:
    models['uniform_calibrated'] = calibrated['uniform'], keep['uniform']
    models['calibrated'] = calibrated['searched'], keep['searched']
  results: dict = {
    name: measure_perplexity(scorer, *model, job.text.heldout, name)
    for name, model in models.items()
  }
  results['protocol'] = job.protocol._asdict()
  if job.other:
    saved = 'calibrated' if config.calibration.enabled else 'searched'
    results['other'] = {
      name: measure_perplexity(
        scorer, *models[name], job.other.windows, f'{name}, other text'
      )
      for name in ('dense', saved)
    }
    results['other']['protocol'] = job.other.protocol._asdict()
  return results


def measure_perplexity(
  scorer, params, masks, windows_WxT, label
) -> dict[str, float]:
  """Returns a model's entry in results.json, and logs it with a label."""
  ppl = float(np.exp(scorer(params, windows_WxT, masks, label=label)))
  logging.info('held-out perplexity, %s: %.2f', label, ppl)
  return {'ppl': ppl}
