"""The whole run as one readable story."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ffp_jax import config as config_lib
from ffp_jax import errors, export, report
from ffp_jax import results as results_lib
from ffp_jax.checkpoints import hub, model_config
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.evaluation import protocols, scoring
from ffp_jax.evaluation.loss import nll
from ffp_jax.export import gguf_file
from ffp_jax.models import families, functional
from ffp_jax.pruning import (
  allocation,
  curriculum,
  importance,
  resources,
  search,
)
from ffp_jax.pruning import calibration as ridge
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
from ffp_jax.text import corpora, tokenization
from ffp_jax.text import windows as windows_lib


def prune_workdir(config, workdir: pathlib.Path, *, command: str) -> dict:
  """Prunes `config.model` and leaves everything in `workdir`.

  Args:
    config: see config.py.
    workdir: directory of the run; the same one goes on where it stopped.
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
    first = initial_state(config, job.sublayers, workdir)
    with sharding.lead_process_first(
      workdir_lib.claim, workdir, config
    ) as leads:
      return run_stages(
        config, job, first, Workdir(workdir, writes=leads), command
      )


def run_stages(config, job, first, workdir, command) -> dict:
  """The run, in a workdir that is ours; `first` begins the search."""
  if finished := workdir.read_json('results.json'):
    logging.info('%s already holds the finished run', workdir.path)
    if workdir.writes:
      report.write_report(workdir.path)  # a crash may have come before it
    return finished

  if workdir.writes:
    gguf_file.warn(job.directory, job.model)
  state = resume_search(first, workdir)
  with workdir.timed('load'):
    dtype = functional.resolve_dtype(config.dtype)
    params = weights_lib.load_params(job.directory, job.model, dtype)
    loss = scoring.Scorer(job.model)
  with workdir.timed('dense loss'):
    text = reward_text(config, job, params, loss)
  with workdir.timed('importance'):
    device_sublayers = rank_units(config, job, params)
  with workdir.timed('refit'):
    scored = refit(config, job, params, device_sublayers)
  with workdir.timed('search'):
    finalists, cost = search_allocation(
      config, job, scored, device_sublayers, text, state, workdir
    )
  with workdir.timed('re-score'):
    tried = rescore(config, job, scored, device_sublayers, text, finalists)
    del scored  # makes room
    best = min(tried, key=lambda x: np.nan_to_num(x.nll, nan=np.inf))
    cost['tokens_evaluated'] += (1 + len(tried)) * text.rows_RxT.size
  keep = {
    'uniform': uniform(config, job, device_sublayers),
    'searched': masks_lib.from_counts(device_sublayers.rank, best.counts),
  }
  with workdir.timed('calibrate'):
    repaired = calibrate(config, job, params, keep)
  with workdir.timed('save'):
    size = save(job, repaired['searched'], keep['searched'], workdir)
  with workdir.timed('evaluate'):
    results = evaluate(config, job, params, keep, repaired, loss)
  found = results_lib.allocation(config, job, best)
  workdir.write_json('allocation.json', found)
  results |= results_lib.rewards(config, text, best)
  results |= results_lib.sizes(job, found, size)
  results |= cost | {'seconds': workdir.seconds, 'command': command}
  results |= {'versions': report.versions(), 'device': results_lib.device()}
  workdir.write_json('results.json', results)
  if workdir.writes:
    report.write_report(workdir.path)
  return results


class PruningJob(NamedTuple):
  """What a run works on, before any weight is read."""

  directory: pathlib.Path
  model: families.ModelConfig
  dtype: np.dtype  # of its file, and so of the file that is written
  sublayers: Sublayers
  text: windows_lib.Splits
  protocol: protocols.Protocol  # of the held-out figures

  @property
  def dense(self):
    """Masks that remove nothing."""
    model = self.model
    return masks_lib.ones(model.layers, model.groups, model.ffn)


class ScoringModel(NamedTuple):
  """The decoder that candidates are scored on."""

  model: families.ModelConfig
  params: dict


class Finalist(NamedTuple):
  """A candidate that was re-scored."""

  counts: np.ndarray  # [S]
  priority: np.ndarray  # [S]
  nll: float  # on the whole reward text


def prepare_job(config) -> PruningJob:
  """Finds the model, its sublayers and its text; refuses what can't be."""
  directory = hub.resolve_model(config.model)
  model = model_config.read_model_config(directory)
  if model.sliced:
    raise errors.RequestError(
      f'model: {config.model!r} is already pruned; give the dense model'
    )
  sublayers = find_sublayers(
    model,
    round_heads=config.budget.round_heads,
    round_ffn=config.budget.round_ffn,
  )
  sublayers = sublayers._replace(
    resources=resources.from_config(config, model, sublayers)
  )
  check_reachable(sublayers, config)
  found = weights_lib.check_files(
    directory, model, functional.resolve_dtype(config.dtype)
  )
  text = corpora.read_text(config.data, field=config.text.field)
  tokens = tokenization.tokenize(directory, text.content)
  context = config.text.context
  tokenization.check_tokens(model, tokens.ids, context)
  splits = windows_lib.split(
    windows_lib.windows(tokens.ids, context),
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
    bos=tokens.bos,
  )
  dtype = weights_lib.main_dtype(*found)
  return PruningJob(directory, model, dtype, sublayers, splits, protocol)


def initial_state(config, sublayers, workdir) -> search.SearchState:
  """Where a new search begins: the prior, or another run's policy."""
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


def resume_search(first, workdir) -> search.SearchState:
  """Where the search goes on: the state saved last, or else `first`."""
  state = search_state.restore_state(workdir.path / 'checkpoints', first)
  if state is None and workdir.has_metrics():
    raise errors.RequestError(
      f'workdir: {workdir.path} has metrics of a search but no checkpoint; '
      'put back its checkpoints, or use another --workdir'
    )
  return first if state is None else state


def rank_units(config, job, params) -> allocation.DeviceSublayers:
  """Scores the units on the calibration text and orders each sublayer's."""
  captured = functional.make_capture(job.model, importance.square_sum)
  measure = jax.jit(lambda p, t: importance.input_norms(captured, p, t))
  norms = measure(params, job.text.calibration[:, None])
  weights = params['stack']['attention']['out'], params['stack']['ffn']['down']
  scores = jax.jit(importance.wanda)(weights, norms)
  device_sublayers = allocation.to_device(
    job.sublayers, masks_lib.rank_all(scores)
  )
  return jax.block_until_ready(device_sublayers)  # for an honest clock


def reward_text(config, job, params, loss) -> search.RewardText:
  """The reward rows, and what the dense model makes of them."""
  rows = job.text.reward.reshape(-1, config.search.context)
  dense = loss.each(params, rows, job.dense, label='dense loss')
  return search.RewardText(rows, dense)


def refit(config, job, params, device_sublayers) -> ScoringModel:
  """The decoder whose masks refit, or the dense one if none is asked for."""
  if not config_lib.refits(config):
    return ScoringModel(job.model, params)
  model, mended = refit_lib.refit_model(
    params,
    job.model,
    device_sublayers.rank,
    job.text.calibration[:, None],
    strength=config.search.refit,
  )
  return ScoringModel(
    model, jax.block_until_ready(mended)
  )  # for an honest clock


def search_allocation(
  config, job, scored, device_sublayers, text, state, workdir
):
  """The search, from `state` on: logs and saves every step.

  Returns:
    (priorities worth re-scoring [M,S], what the whole search takes).
  """
  apply = functional.make_apply(scored.model, remat=config.search.remat)
  plan = curriculum.stages(config)
  ends, compilations = curriculum.boundaries(plan), 0
  steps = search.steps(
    config,
    job.sublayers,
    device_sublayers,
    lambda params, tokens, masks: nll(apply, params, tokens, masks),
    scored.params,
    text,
    state,
  )
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
    for state, line in steps:
      compilations = line.pop('compilations')
      workdir.append(line)
      show(line)
      saved.save(line['step'] + 1, state)
  cost = search.search_cost(config, plan) | {'compilations': compilations}
  return search.finalists(config, job.sublayers, state), cost


def rescore(config, job, scored, device_sublayers, text, finalists) -> list:
  """Every `Finalist`, its loss over the whole reward text."""
  loss = scoring.Scorer(scored.model)
  counts = {
    tuple(counts_of(config, job, device_sublayers, row)): row
    for row in finalists
  }
  return [
    Finalist(
      np.array(count),
      row,
      loss(
        scored.params,
        text.rows_RxT,
        masks_lib.from_counts(device_sublayers.rank, jnp.array(count)),
        label='re-score',
      ),
    )
    for count, row in counts.items()
  ]


def counts_of(config, job, device_sublayers, priority_S) -> np.ndarray:
  """Priorities to counts at the run's budget."""
  return allocation.priorities_to_counts(
    priority_S,
    config.budget.sparsity,
    job.sublayers,
    device_sublayers,
    min_ratio=config.search.min_ratio,
    repair=config.search.repair,
  )


def uniform(config, job, device_sublayers):
  """Masks of the same budget spread evenly."""
  counts = allocation.priorities_to_counts(
    np.zeros(len(job.sublayers.units)),
    config.budget.sparsity,
    job.sublayers,
    device_sublayers,
    min_ratio=config.search.min_ratio,
  )
  return masks_lib.from_counts(device_sublayers.rank, jnp.array(counts))


def calibrate(config, job, params, keep) -> dict:
  """Parameters with recovered output projections, for each of `keep`."""
  if not config.calibration.enabled:
    return dict.fromkeys(keep, params)
  repaired, windows = {}, config.calibration.windows
  fit_on = job.text.calibration[: windows or None]
  for name, masks in keep.items():
    repaired[name], strengths = ridge.calibrate(
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
  return repaired


def save(job, params, keep, workdir) -> int:
  """Writes the small model; its bytes, 0 in a process that doesn't write."""
  small = export.slice_params(params, job.model, keep)
  if not workdir.writes:
    return 0
  out = workdir.path / 'pruned'
  return export.save(*small, job.directory, out, dtype=job.dtype)


def evaluate(config, job, params, keep, repaired, loss) -> dict:
  """Held-out perplexities of the dense model and the pruned ones."""
  models = {
    'dense': (params, job.dense),
    'uniform': (params, keep['uniform']),
    'searched': (params, keep['searched']),
  }
  if config.calibration.enabled:
    models['uniform_calibrated'] = repaired['uniform'], keep['uniform']
    models['calibrated'] = repaired['searched'], keep['searched']
  results = {}
  for name, (weights, masks) in models.items():
    mean = loss(weights, job.text.heldout, masks, label=name)
    results[name] = {'ppl': float(np.exp(mean))}
    logging.info('held-out perplexity, %s: %.2f', name, results[name]['ppl'])
  results['protocol'] = job.protocol._asdict()
  return results
