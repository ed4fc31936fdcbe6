"""A whole run as one readable story.

`prune_workdir` is what the command runs: it reads, writes, logs, saves and
resumes. `prune` is the same in memory, for api.py: one stage after another,
each of them a function of stages.py.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from ffp_jax import config as config_lib
from ffp_jax import export, recover, report, stages
from ffp_jax import results as results_lib
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import scoring
from ffp_jax.export import gguf_file
from ffp_jax.jobs import PruningJob, prepare_job
from ffp_jax.models import functional
from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import (
  curriculum,
  search,
)
from ffp_jax.pruning import masks as masks_lib
from ffp_jax.runtime import run_state, sharding, signals
from ffp_jax.runtime import workdir as workdir_lib
from ffp_jax.runtime.workdir import Workdir


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
  text = recover.prepare(config, job)
  with jax.set_mesh(mesh):
    state = initial_state(config, job.sublayers, workdir)
    claim = workdir_lib.claim
    with sharding.lead_process_first(claim, workdir, config) as leads:
      files = Workdir(workdir, writes=leads)
      results = run_stages(config, job, state, files, command)
      return recover.recover_run(config, job, text, files, results)


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
    results = stages.evaluate(config, job, params, pruned, scorer)
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
  job: PruningJob,
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
    text = stages.reward_text(config, job, params, scorer)
  with timed('importance'):
    device_sublayers = stages.rank_units(job, params)
  with timed('refit'):
    scored = stages.refit(config, job, params, device_sublayers)
  with timed('search'):
    finalists, cost = stages.search_allocation(
      config, job, scored, device_sublayers, text, state, follow
    )
  with timed('re-score'):
    tried = stages.rescore(
      config, job, scored, device_sublayers, text, finalists
    )
    del scored  # makes room
    best = min(tried, key=lambda x: np.nan_to_num(x.nll, nan=np.inf))
    cost['tokens_evaluated'] += (1 + len(tried)) * text.rows_RxT.size
  keep = {
    'uniform': stages.uniform_masks(config, job, device_sublayers),
    'searched': masks_lib.from_counts(device_sublayers.rank, best.counts),
  }
  with timed('calibrate'):
    calibrated = stages.calibrate(config, job, params, keep)
  return Pruned(best, keep, calibrated, text, cost)


class Pruned(NamedTuple):
  """What pruning finds; `keep` and `params` by 'uniform' and 'searched'."""

  best: stages.Finalist
  keep: dict[str, Masks]
  params: dict[str, dict]  # calibrated, still of the dense shapes
  text: search.RewardText
  cost: dict  # what the search evaluated


def initial_state(config, sublayers, workdir) -> search.SearchState:
  """Returns where a new search begins: the prior, or another run's policy."""
  state = search.initial_state(config, sublayers)
  # Once begun, a search no longer needs the run that it began from.
  if config.search.init_from and not run_state.steps_in(
    workdir / 'checkpoints'
  ):
    other = pathlib.Path(config.search.init_from).expanduser()
    state = state._replace(params=run_state.inherit_policy(other, state.params))
  return state


def resume_search(first, workdir: Workdir) -> search.SearchState:
  """Returns the state saved last, or else `first`."""
  state = run_state.restore_state(workdir.path / 'checkpoints', first)
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
    run_state.Checkpoints(
      workdir.path / 'checkpoints',
      every=config.checkpoint.every,
      keep=config.checkpoint.keep,
      ends=ends,
    ) as saved,
    signals.save_on_signal(saved.flush),
    workdir.progress('search', ends[-1], int(state.step)) as show,
  ):
    # Before the first line of metrics: where these are, so is a checkpoint.
    saved.begin(int(state.step), state)
    workdir.rewind(int(state.step))
    for state, metrics in steps:
      line = {k: v for k, v in metrics.items() if k != 'compilations'}
      workdir.append(line)
      figures = {
        'reward': f'{line["reward_mean"]:.3f}',
        'sparsity': f'{line["sparsity"]:.1%}',
      }
      show(line['step'] + 1, figures, line['seconds'])
      saved.save(line['step'] + 1, state)
  return state, metrics


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
