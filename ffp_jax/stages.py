"""The stages of a run, in the order in which prune.py runs them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ffp_jax import config as config_lib
from ffp_jax.evaluation import scoring
from ffp_jax.evaluation.loss import make_nll
from ffp_jax.models import adapters
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import (
  allocation,
  calibration,
  curriculum,
  importance,
  recovery,
  search,
)
from ffp_jax.pruning import masks as masks_lib
from ffp_jax.pruning import refit as refit_lib
from ffp_jax.text import recovery_text

# Of recovery: the best of the rates tried, see docs/results.md.
_FULL_RATE, _LORA_RATE = 1e-4, 3e-3


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
  measure = importance.make_measure(job.model)
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


class Recovered(NamedTuple):
  """A recovered model, still of the dense shapes."""

  params: dict
  keep: Masks
  losses: dict[str, float]  # on the validation text, in nats: start and best


def recover(config, job, dense, pruned, text, follow) -> Recovered:
  """Trains a pruned model to predict what the dense one predicts.

  Args:
    config: see config.py.
    job: the model and its text.
    dense: parameters of the dense decoder.
    pruned: (calibrated parameters of the dense shapes, masks); where the
      caller keeps no name for it, its memory is free once training begins.
    text: to train on, a `recovery_text.RecoveryText`.
    follow: takes the first state, and a function from a state to the steps
      from there on, an iterator of (state, metrics); returns the last state.
  """
  settings, rank = config.recovery, config.recovery.rank
  params, keep = pruned
  trained, frozen = recovery.begin(
    params, job.model, keep, rank=rank, seed=config.seed
  )
  del params, pruned  # makes room
  total = len(text.order) // (settings.rows * settings.accumulate)
  optim = recovery.optimizer()
  step_fn = _make_recovery_step(config, job.model, optim, total)
  scorer = scoring.Scorer(dataclasses.replace(job.model, adapter_rank=rank))
  dtype = dense['embed']['table'].dtype

  def validate(trained):
    joined = adapters.join(frozen, trained, dtype)
    return scorer(joined, job.text.validation, keep, label='validation')

  def steps(state):
    return recovery.steps(
      state,
      lambda *args: step_fn(*args[:-1], frozen, dense, keep, args[-1]),
      lambda step: recovery_text.batch(
        text, step, micro_batches=settings.accumulate, rows=settings.rows
      ),
      validate,
      optim,
      total=total,
      every=max(1, settings.every // config_lib.recovery_batch(config)),
    )

  state = follow(recovery.start(trained, optim), steps)
  losses = {'start': float(state.start_loss), 'best': float(state.best_loss)}
  recovered = adapters.merge(frozen, state.best, dtype)
  # What is evaluated is what is saved, in the type of the file.
  recovered = jax.tree.map(
    lambda x: x.astype(job.dtype).astype(dtype), recovered
  )
  return Recovered(recovered, keep, losses)


def _make_recovery_step(config, model, optim, total: int):
  """Returns the configured training step; `total` is the number of steps."""
  settings, rank = config.recovery, config.recovery.rank
  loss_fn = recovery.make_loss(
    model,
    rank=rank,
    cross_entropy=settings.cross_entropy,
    remat=settings.remat,
  )
  peak = settings.learning_rate or (_LORA_RATE if rank else _FULL_RATE)
  rate = recovery.schedule(peak=peak, warmup=total // 10, steps=total)
  return _compile_once(recovery.make_step(loss_fn, optim, rate))


def collect(metrics: list[dict], on_step=None):
  """Returns what `recover` takes as `follow` in memory.

  Args:
    metrics: gets those of every step.
    on_step: called with them, if given.
  """

  def follow(state, steps_from):
    for new, line in steps_from(state):
      state = new
      metrics.append(line)
      if on_step:
        on_step(line)
    return state

  return follow


def _compile_once(function):
  """Returns a jitted function that is compiled at its first call alone.

  JAX would compile again where the sharding of an output, which becomes an
  input, is another name of the same one.
  """
  compiled: list = []

  def call(*args):
    if not compiled:
      compiled.append(function.lower(*args).compile())
    return compiled[0](*args)

  return call


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
  results: dict = {'protocol': job.protocol._asdict()}
  if job.other:
    results['other'] = {'protocol': job.other.protocol._asdict()}
  saved = 'calibrated' if config.calibration.enabled else 'searched'
  for name, model in models.items():
    measure(results, job, scorer, *model, name, other=name in ('dense', saved))
  return results


def measure(results, job, scorer, params, masks, name, *, other=True) -> None:
  """Adds the perplexities of a model to what results.json will hold.

  Args:
    results: changed.
    job: the texts.
    scorer: of the dense decoder.
    params, masks: the model.
    name: of the model in results.json.
    other: whether to measure on the text of another kind too, if there is one.
  """
  texts = [(results, job.text.heldout, 'held-out text')]
  if other and job.other and 'other' in results:
    text = job.other.protocol.text
    texts.append((results['other'], job.other.windows, text))
  for entries, windows, text in texts:
    ppl = float(np.exp(scorer(params, windows, masks, label=name)))
    logging.info('perplexity on %s, %s: %.2f', text, name, ppl)
    entries[name] = {'ppl': ppl}
