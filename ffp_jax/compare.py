"""Every allocation method at the same cost, on the same model and text.

python -m ffp_jax.compare --config=configs/compare.py --workdir=DIR

All methods share the scores of the units, the projection to integers, the
calibration and the text; they differ in how they distribute the budget over
the sublayers.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from ffp_jax import baselines, jobs, stages
from ffp_jax import config as config_lib
from ffp_jax.baselines import settings
from ffp_jax.baselines.problem import Problem, input_moments, trace_incumbents
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.evaluation import scoring
from ffp_jax.evaluation.loss import make_nll
from ffp_jax.models import functional
from ffp_jax.pruning import masks, search
from ffp_jax.pruning import refit as refit_lib
from ffp_jax.pruning.allocation import DeviceSublayers
from ffp_jax.reporting import method_comparison
from ffp_jax.runtime import cli, sharding
from ffp_jax.runtime import workdir as workdir_lib


def run_comparison(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict:
  """Compares the methods of `config.compare`; resumes where it stopped.

  Args:
    config: see `settings.comparison`.
    workdir: gets compare.json, compare.md and the plots.

  Returns:
    The content of compare.json.

  Raises:
    RequestError: the request cannot be met; raised before any heavy work.
  """
  settings.validate(config)
  c = config.compare
  for sparsity, name in itertools.product(c.sparsities, c.methods):
    cell = settings.cell_config(config, c.seeds[0], sparsity, name)
    config_lib.validate(cell)
  job_of = {
    seed: jobs.prepare_job(
      settings.cell_config(config, seed, max(c.sparsities))
    )
    for seed in c.seeds
  }
  with jax.set_mesh(sharding.make_mesh(**config.mesh)):
    with workdir_lib.claim(workdir, config):
      files = workdir_lib.Workdir(workdir)
      load = functools.cache(
        lambda: load_shared_model(config, job_of[c.seeds[0]])
      )
      for seed, job in job_of.items():
        run_missing(config, job, seed, load, files)
      results = files.read_json('compare.json')
      method_comparison.write(results, workdir)
  return results


class SharedModel(NamedTuple):
  """The dense model and its losses, which all runs share and compile once.

  Attributes:
    params: of the dense decoder.
    loss: mean loss on windows of text.
    nll: (params, tokens [B,T], Masks or None) -> losses [B], for searches.
    refit_nll: the same for the decoder and parameters of `refit.refit_model`.
  """

  params: dict
  loss: scoring.Scorer
  nll: Callable
  refit_nll: Callable


def load_shared_model(
  config: ml_collections.ConfigDict, job: jobs.PruningJob
) -> SharedModel:
  """Loads the weights in the configured dtype and makes the losses."""
  dtype = functional.resolve_dtype(config.dtype)
  remat = config.search.remat
  return SharedModel(
    weights_lib.load_params(job.directory, job.model, dtype),
    scoring.Scorer(job.model),
    make_nll(job.model, remat=remat),
    make_nll(dataclasses.replace(job.model, refit=True), remat=remat),
  )


def run_missing(
  config: ml_collections.ConfigDict,
  job: jobs.PruningJob,
  seed: int,
  load: Callable[[], SharedModel],
  files: workdir_lib.Workdir,
) -> None:
  """Runs what compare.json lacks of one seed; writes it after each method."""
  results: dict[str, Any] = files.read_json('compare.json') or {'runs': []}
  done = {method_comparison.run_key(line) for line in results['runs']}
  missing = [
    (name, sparsity)
    for sparsity in config.compare.sparsities
    for name in config.compare.methods
    if (name, sparsity, seed) not in done
  ]
  if not missing:
    return
  model = load()
  dense = {
    split: model.loss(model.params, windows, job.dense)
    for split, windows in job.text._asdict().items()
    if split in ('reward', 'heldout')
  }
  results |= {
    'model': config.model,
    'protocol': job.protocol._asdict(),
    'dense_ppl': float(np.exp(dense['heldout'])),
    'tokens': config.compare.tokens,
    'units': job.sublayers.units,
  }
  device_sublayers = stages.rank_units(job, model.params)
  refit_params = _make_refit(job, model, device_sublayers)
  for name, sparsity in missing:
    cell = settings.cell_config(config, seed, sparsity, name)
    problem = problem_of(cell, job, model, device_sublayers, refit_params)
    start = time.perf_counter()
    trace = trace_incumbents(baselines.allocator(name, cell), problem, seed)
    results['runs'].append(
      {
        'method': name,
        'sparsity': sparsity,
        'seed': seed,
        'seconds': round(time.perf_counter() - start, 3),
        'tokens': problem.used,
        **evaluate_incumbents(cell, job, model, device_sublayers, dense, trace),
      }
    )
    files.write_json('compare.json', results)
    logging.info('%s', method_comparison.run_line(results['runs'][-1]))


def _make_refit(
  job: jobs.PruningJob, model: SharedModel, device_sublayers: DeviceSublayers
) -> Callable[[float], dict]:
  """Returns ridge strength -> parameters of `refit.refit_model`, kept."""

  @functools.cache
  def refit_params(strength):
    text, rank = job.text.calibration[:, None], device_sublayers.rank
    return refit_lib.refit_model(
      model.params, job.model, rank, text, strength=strength
    )[1]

  return refit_params


def problem_of(
  config: ml_collections.ConfigDict,
  job: jobs.PruningJob,
  model: SharedModel,
  device_sublayers: DeviceSublayers,
  refit_params: Callable[[float], dict],
) -> Problem:
  """Returns the problem that a method gets, with all tokens still to spend.

  Args:
    config: see `settings.cell_config`.
    job: the text and the sublayers.
    model: the dense model.
    device_sublayers: the sublayers and the ranks of their units.
    refit_params: ridge strength -> parameters of `refit.refit_model`.
  """
  stack, text = model.params['stack'], job.text.calibration
  return Problem(
    sublayers=job.sublayers,
    device_sublayers=device_sublayers,
    sparsity=config.budget.sparsity,
    min_ratio=config.search.min_ratio,
    start_S=search.initial_priorities(
      job.sublayers, config.compare.attention_prior
    ),
    rows_RxT=job.text.reward.reshape(-1, config.search.context),
    nll=model.nll,
    params=model.params,
    weights=(stack['attention']['out'], stack['ffn']['down']),
    input_moments=lambda: input_moments(job.model, model.params, text),
    refit_model=lambda: (model.refit_nll, refit_params(config.search.refit)),
    measure_tokens=text.size,
    tokens=config.compare.tokens,
  )


def evaluate_incumbents(
  config: ml_collections.ConfigDict,
  job: jobs.PruningJob,
  model: SharedModel,
  device_sublayers: DeviceSublayers,
  dense: Mapping[str, float],
  trace: list[tuple[int, np.ndarray]],
) -> dict:
  """Evaluates a method's answer and its incumbents at the checkpoints.

  Args:
    config: see `settings.cell_config`.
    job: the text and the sublayers.
    model: the dense model.
    device_sublayers: the sublayers and the ranks of their units.
    dense: losses of the dense model on 'reward' and 'heldout'.
    trace: of `trace_incumbents`.

  Returns:
    Keys of a run in compare.json. None of it is charged to the method.
  """

  @functools.cache
  def perplexities(counts):
    keep = masks.from_counts(device_sublayers.rank, np.array(counts))
    calibrated = stages.calibrate(config, job, model.params, {'': keep})['']
    weights = {'ppl': model.params, 'ppl_calibrated': calibrated}
    heldout = job.text.heldout
    return {
      name: float(np.exp(model.loss(params, heldout, keep)))
      for name, params in weights.items()
    }

  checkpoints = []
  for share in config.compare.checkpoints:
    tokens = round(share * config.compare.tokens)
    known = [row for row in trace if row[0] <= tokens]
    counts = (known or trace)[-1 if known else 0][1]
    ppl = perplexities(tuple(counts.tolist()))
    checkpoints.append({'tokens': tokens, **ppl})
  counts = trace[-1][1]
  keep = masks.from_counts(device_sublayers.rank, counts)
  reward = model.loss(model.params, job.text.reward, keep)
  return {
    **perplexities(tuple(counts.tolist())),
    'reward': float(np.exp(dense['reward'] - reward)),
    'sparsity_achieved': job.sublayers.sparsity(counts),
    'counts': counts,
    'checkpoints': checkpoints,
  }


def main(argv: list[str]) -> None:
  """Runs the comparison that the flags ask for and prints its summary."""
  del argv
  workdir, again = cli.begin_command('ffp_jax.compare', flags.FLAGS.workdir)
  with cli.report_errors(workdir, again):
    results = run_comparison(flags.FLAGS.config, workdir)
  print(method_comparison.summary(results))
  print(f'\nreport      {workdir / "compare.md"}')


if __name__ == '__main__':
  config_flags.DEFINE_config_file(
    'config', help_string='Configuration file with settings to compare by.'
  )
  flags.DEFINE_string('workdir', None, 'Directory of the comparison.')
  app.run(
    main,
    flags_parser=functools.partial(
      cli.parse_flags,
      config='configs/compare.py',
      workdir='the directory of the comparison',
    ),
  )
