"""A whole run as one readable story.

`prune_workdir` is what the command runs: it reads, writes, logs, saves and
resumes. `prune` is the same in memory, for api.py: stages one after another,
each of them a function below.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from ffp_jax import config as config_lib
from ffp_jax import export, report
from ffp_jax import results as results_lib
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.checkpoints.model import find_model
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import protocols, scoring
from ffp_jax.evaluation.loss import nll
from ffp_jax.export import gguf_file
from ffp_jax.models import functional
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import (
  allocation,
  calibration,
  curriculum,
  importance,
  resources,
  search,
)
from ffp_jax.pruning import masks as masks_lib
from ffp_jax.pruning import refit as refit_lib
from ffp_jax.pruning.sublayers import (
  Sublayers,
  check_reachable,
  find_sublayers,
)
from ffp_jax.runtime import search_state, sharding, signals
from ffp_jax.runtime import workdir as workdir_lib
from ffp_jax.runtime.workdir import Workdir
from ffp_jax.text import tokenization
from ffp_jax.text import windows as windows_lib


def prune_workdir(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, *, command: str
) -> dict:
  """Prunes `config.model` and leaves everything in a directory.

  Args:
    config: see config.py.
    workdir: directory of the run; a run that was stopped resumes there.
    command: how to run this again, for the report.

  Returns:
    What results.json holds.

  Raises:
    RequestError: the request can't be met; known before any heavy work.
  """
  config_lib.validate(config)
  mesh = sharding.make_mesh(**config.mesh)
  job = prepare_job(config)
  with jax.set_mesh(mesh):
    state = initial_state(config, job.sublayers, workdir)
    claim = workdir_lib.claim
    with sharding.lead_process_first(claim, workdir, config) as leads:
      files = Workdir(workdir, writes=leads)
      return run_stages(config, job, state, files, command)


def run_stages(config, job, state, workdir: Workdir, command: str) -> dict:
  """Runs the stages in a workdir that is ours; `state` begins the search."""
  if finished := workdir.read_json('results.json'):
    logging.info('%s already holds the finished run', workdir.path)
    if workdir.writes:
      report.write_report(workdir.path)  # a crash may have come before it
    return finished

  if workdir.writes:
    gguf_file.warn(job.directory, job.model)
  state = resume_search(state, workdir)
  with workdir.timed('load'):
    dtype = functional.resolve_dtype(config.dtype)
    params = weights_lib.load_params(job.directory, job.model, dtype)
    scorer = scoring.Scorer(job.model)
  follow = functools.partial(log_and_save, config, state, workdir)
  pruned = prune(
    config, job, params, state, scorer, follow=follow, timed=workdir.timed
  )
  with workdir.timed('save'):
    size = save(job, pruned, workdir)
  with workdir.timed('evaluate'):
    results = evaluate(config, job, params, pruned, scorer)
  found = results_lib.allocation(config, job, pruned.best)
  workdir.write_json('allocation.json', found)
  results |= results_lib.rewards(config, pruned.text, pruned.best)
  results |= results_lib.sizes(job, found, size)
  results |= pruned.cost | {'seconds': workdir.seconds, 'command': command}
  results |= {'versions': report.versions(), 'device': results_lib.device()}
  workdir.write_json('results.json', results)
  if workdir.writes:
    report.write_report(workdir.path)
  return results


def prune(
  config: ml_collections.ConfigDict,
  job: 'PruningJob',
  params: dict,
  state: search.SearchState,
  scorer: scoring.Scorer,
  *,
  follow: Callable[[Iterator], tuple[search.SearchState, dict]],
  timed: Callable[[str], contextlib.AbstractContextManager],
) -> 'Pruned':
  """Searches an allocation and calibrates it, in memory.

  Args:
    config: see config.py.
    job: the model and its text.
    params: of the dense decoder.
    state: where the search begins.
    scorer: of the dense decoder.
    follow: takes the steps of the search, an iterator of (state, metrics), to
      its end, and returns the last of each.
    timed: stage name to a context in which it runs.
  """
  with timed('dense loss'):
    text = reward_text(config, job, params, scorer)
  with timed('importance'):
    device_sublayers = rank_units(job, params)
  with timed('refit'):
    scored = refit(config, job, params, device_sublayers)
  with timed('search'):
    finalists, cost = search_allocation(
      config, job, scored, device_sublayers, text, state, follow
    )
  with timed('re-score'):
    tried = rescore(config, job, scored, device_sublayers, text, finalists)
    del scored  # makes room
    best = min(tried, key=lambda x: np.nan_to_num(x.nll, nan=np.inf))
    cost['tokens_evaluated'] += (1 + len(tried)) * text.rows_RxT.size
  keep = {
    'uniform': uniform_masks(config, job, device_sublayers),
    'searched': masks_lib.from_counts(device_sublayers.rank, best.counts),
  }
  with timed('calibrate'):
    calibrated = calibrate(config, job, params, keep)
  return Pruned(best, keep, calibrated, text, cost)


class PruningJob(NamedTuple):
  """What a run works on, before any weight is read."""

  directory: pathlib.Path
  model: ModelConfig
  dtype: np.dtype  # of the model's file, and so of the file that is written
  sublayers: Sublayers
  text: windows_lib.Splits
  protocol: protocols.Protocol  # of the held-out figures

  @property
  def dense(self) -> Masks:
    """Returns masks that remove nothing."""
    model = self.model
    return masks_lib.ones(model.layers, model.groups, model.ffn)


class ScoringModel(NamedTuple):
  """The decoder that candidates are scored on."""

  model: ModelConfig
  params: dict


class Finalist(NamedTuple):
  """A candidate that was re-scored."""

  counts: np.ndarray  # [S]
  priority: np.ndarray  # [S]
  nll: float  # mean over the whole reward text, in nats


class Pruned(NamedTuple):
  """What pruning finds; `keep` and `params` by 'uniform' and 'searched'."""

  best: Finalist
  keep: dict[str, Masks]
  params: dict[str, dict]  # calibrated, still of the dense shapes
  text: search.RewardText
  cost: dict  # what the search evaluated


def prepare_job(config: ml_collections.ConfigDict) -> PruningJob:
  """Finds the model, its sublayers and its text.

  Raises:
    RequestError: what is asked can't be done.
  """
  files = find_model(config.model)
  sublayers = prunable_sublayers(config, files.config)
  dtype = functional.resolve_dtype(config.dtype)
  found = weights_lib.check_files(files.directory, files.config, dtype)
  text = tokenization.read_tokens(
    files.directory, config.data, field=config.text.field
  )
  dtype = weights_lib.main_dtype(*found)
  return make_job(config, files, dtype, sublayers, text)


def prunable_sublayers(config, model: ModelConfig) -> Sublayers:
  """Returns what may be removed; refuses a budget that can't be met."""
  if model.sliced:
    raise RequestError(
      f'model: {config.model!r} is already pruned; give the dense model'
    )
  sublayers = find_sublayers(
    model,
    round_heads=config.budget.round_heads,
    round_ffn=config.budget.round_ffn,
  )
  budgets = resources.from_config(config, model, sublayers)
  sublayers = sublayers._replace(resources=budgets)
  check_reachable(sublayers, config)
  return sublayers


def make_job(config, files, dtype, sublayers, text) -> PruningJob:
  """Cuts a text into the parts of a run.

  Args:
    config: see config.py.
    files: a `ModelFiles`, or a `Model` alike.
    dtype: of the model's file.
    sublayers: from `prunable_sublayers`.
    text: a `tokenization.TokenText`.
  """
  context = config.text.context
  tokenization.check_tokens(files.config, text.ids, context)
  splits = windows_lib.split(
    windows_lib.windows(text.ids, context),
    calibration=config.text.calibration_windows,
    reward=config.text.reward_windows,
    validation=config.text.validation_windows,
    heldout=config.text.heldout_windows,
    seed=config.seed,
  )
  protocol = protocols.describe_protocol(
    'gptq',
    text.name,
    f'held-out (end of {text.extent})',
    splits.heldout,
    protocols.full_spans(splits.heldout),
    stride=context,
    bos=text.bos,
  )
  return PruningJob(
    files.directory, files.config, dtype, sublayers, splits, protocol
  )


def initial_state(config, sublayers, workdir) -> search.SearchState:
  """Returns where a new search begins: the prior, or another run's policy."""
  state = search.initial_state(config, sublayers)
  # Once begun, a search no longer needs the run that it began from.
  if config.search.init_from and not search_state.steps_in(
    workdir / 'checkpoints'
  ):
    other = pathlib.Path(config.search.init_from).expanduser()
    state = state._replace(
      params=search_state.inherit_policy(other, state.params)
    )
  return state


def resume_search(first, workdir: Workdir) -> search.SearchState:
  """Returns the state saved last, or else `first`."""
  state = search_state.restore_state(workdir.path / 'checkpoints', first)
  if state is None and workdir.has_metrics():
    raise RequestError(
      f'workdir: {workdir.path} has metrics of a search but no checkpoint; '
      'put back its checkpoints, or use another --workdir'
    )
  return first if state is None else state


def log_and_save(config, state, workdir: Workdir, steps: Iterator):
  """Takes a search to its end; logs and saves each step.

  Args:
    config: see config.py.
    state: where the search begins.
    workdir: gets metrics and checkpoints.
    steps: from `search.steps`.

  Returns:
    (the last state, its metrics).
  """
  ends, metrics = curriculum.boundaries(curriculum.stages(config)), {}
  with (
    search_state.Checkpoints(
      workdir.path / 'checkpoints',
      every=config.checkpoint.every,
      keep=config.checkpoint.keep,
      ends=ends,
    ) as saved,
    signals.save_on_signal(saved.flush),
    workdir.progress(ends[-1], int(state.step)) as show,
  ):
    # Before the first line of metrics: where these are, so is a checkpoint.
    saved.begin(int(state.step), state)
    workdir.rewind(int(state.step))
    for state, metrics in steps:
      line = {k: v for k, v in metrics.items() if k != 'compilations'}
      workdir.append(line)
      show(line)
      saved.save(line['step'] + 1, state)
  return state, metrics


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
  apply = functional.make_apply(scored.model, remat=config.search.remat)
  state, metrics = follow(
    search.steps(
      config,
      job.sublayers,
      device_sublayers,
      lambda params, tokens, masks: nll(apply, params, tokens, masks),
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


def save(job, pruned: Pruned, workdir: Workdir) -> int:
  """Writes the small model.

  Returns:
    Bytes of its weights; 0 in a process that doesn't write.
  """
  small = export.slice_params(
    pruned.params['searched'], job.model, pruned.keep['searched']
  )
  if not workdir.writes:
    return 0
  out = workdir.path / 'pruned'
  return export.save(*small, job.directory, out, dtype=job.dtype)


def evaluate(config, job, params, pruned: Pruned, scorer) -> dict:
  """Returns held-out perplexities of the dense model and the pruned ones."""
  keep, calibrated = pruned.keep, pruned.params
  models = {
    'dense': (params, job.dense),
    'uniform': (params, keep['uniform']),
    'searched': (params, keep['searched']),
  }
  if config.calibration.enabled:
    models['uniform_calibrated'] = calibrated['uniform'], keep['uniform']
    models['calibrated'] = calibrated['searched'], keep['searched']
  results = {}
  for name, (weights, masks) in models.items():
    mean = scorer(weights, job.text.heldout, masks, label=name)
    results[name] = {'ppl': float(np.exp(mean))}
    logging.info('held-out perplexity, %s: %.2f', name, results[name]['ppl'])
  results['protocol'] = job.protocol._asdict()
  return results
