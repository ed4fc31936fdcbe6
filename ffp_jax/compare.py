"""Every allocation method at the same cost, on the same model and text.

python -m ffp_jax.compare --config=configs/compare.py --workdir=DIR

All share the scores of the units, the projection to integers, the
calibration and the text; they differ in who gets the budget.
"""

import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from ffp_jax import baselines, prune
from ffp_jax import config as config_lib
from ffp_jax.baselines.problem import Inputs, OutOfTokens, Problem
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import scoring
from ffp_jax.evaluation.loss import nll
from ffp_jax.models import functional
from ffp_jax.pruning import masks, search
from ffp_jax.pruning import refit as refit_lib
from ffp_jax.reporting import method_comparison
from ffp_jax.runtime import cli, sharding
from ffp_jax.runtime import workdir as workdir_lib


def run_comparison(config, workdir: pathlib.Path) -> dict:
  """Compares the methods of `config.compare`; goes on where it stopped.

  Args:
    config: see `settings.comparison`.
    workdir: gets compare.json, compare.md and the plots.

  Returns:
    What compare.json holds.

  Raises:
    RequestError: the request can't be met; known before any heavy work.
  """
  check(config)
  c = config.compare
  for sparsity, name in itertools.product(c.sparsities, c.methods):
    config_lib.validate(cell_config(config, c.seeds[0], sparsity, name))
  jobs = {
    seed: prune.prepare_job(cell_config(config, seed, max(c.sparsities)))
    for seed in c.seeds
  }
  with jax.set_mesh(sharding.make_mesh(**config.mesh)):
    with workdir_lib.claim(workdir, config):
      files = workdir_lib.Workdir(workdir)
      load = functools.cache(
        lambda: load_shared_model(config, jobs[c.seeds[0]])
      )
      for seed, job in jobs.items():
        run_missing(config, job, seed, load, files)
      results = files.read_json('compare.json')
      method_comparison.write(results, workdir)
  return results


def check(config):
  """Refuses unknown methods and a budget that can't pay for all of them."""
  if 'compare' not in config:
    raise RequestError("--config: no key 'compare'; give configs/compare.py")
  c = config.compare
  known = [*baselines.METHODS, *baselines.ABLATIONS, *baselines.REFIT]
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
  least = config.text.calibration_windows * config.text.context
  if c.tokens < least:
    raise RequestError(
      f'compare.tokens: {c.tokens} must be at least {least}, the calibration '
      'text, which some methods measure'
    )
  if not all(0.0 < share <= 1.0 for share in c.checkpoints):
    raise RequestError('compare.checkpoints: each must be in (0, 1]')


def cell_config(config, seed: int, sparsity: float, method: str = ''):
  """The configuration of one seed and sparsity, and of an ablation."""
  cell = config.copy_and_resolve_references()
  cell.seed, cell.budget.sparsity = seed, sparsity
  cell.update_from_flattened_dict(baselines.ABLATIONS.get(method, {}))
  return cell


class Model(NamedTuple):
  """What all seeds share; the losses compile once."""

  params: dict
  loss: scoring.Scorer
  nll: Callable  # what searches take
  refit_nll: Callable  # the same, of `refit.refit_model`


def load_shared_model(config, job) -> Model:
  """Loads the model."""
  dtype = functional.resolve_dtype(config.dtype)

  def nll_of(model):
    apply = functional.make_apply(model, remat=config.search.remat)
    return lambda params, tokens, masks: nll(apply, params, tokens, masks)

  return Model(
    weights_lib.load_params(job.directory, job.model, dtype),
    scoring.Scorer(job.model),
    nll_of(job.model),
    nll_of(dataclasses.replace(job.model, refit=True)),
  )


def run_missing(config, job, seed: int, load, files):
  """Runs what compare.json lacks of one seed, writing after each method."""
  results = files.read_json('compare.json') or {'runs': []}
  done = {method_comparison.run_key(line) for line in results['runs']}
  todo = [
    (name, sparsity)
    for sparsity in config.compare.sparsities
    for name in config.compare.methods
    if (name, sparsity, seed) not in done
  ]
  if not todo:
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
  device_sublayers = prune.rank_units(job, model.params)

  @functools.cache
  def refit(strength):
    text = job.text.calibration[:, None]
    rank = device_sublayers.rank
    return refit_lib.refit_model(
      model.params, job.model, rank, text, strength=strength
    )[1]

  for name, sparsity in todo:
    cell = cell_config(config, seed, sparsity, name)
    problem = problem_of(cell, job, model, device_sublayers, refit)
    begun = time.perf_counter()
    trace = trace_incumbents(allocator(name, cell), problem, seed)
    results['runs'].append(
      {
        'method': name,
        'sparsity': sparsity,
        'seed': seed,
        'seconds': round(time.perf_counter() - begun, 3),
        'tokens': problem.used,
        **evaluate_incumbents(cell, job, model, device_sublayers, dense, trace),
      }
    )
    files.write_json('compare.json', results)
    logging.info('%s', method_comparison.run_line(results['runs'][-1]))


def problem_of(config, job, model, device_sublayers, refit) -> Problem:
  """What the allocators see, with a full meter."""
  stack, text = model.params['stack'], job.text.calibration

  def moments(x):
    x = x.astype(jnp.float32)
    return jnp.stack([jnp.sum(x, (0, 1)), jnp.sum(jnp.square(x), (0, 1))])

  def measure():
    captured = jax.jit(functional.make_capture(job.model, moments))
    totals = [captured(model.params, row[None]) for row in text]
    total = jax.tree.map(lambda *x: np.sum(x, axis=0) / text.size, *totals)
    return Inputs(*(tuple(x[:, i] for x in total) for i in range(2)))

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
    input_moments=measure,
    refit_model=lambda: (model.refit_nll, refit(config.search.refit)),
    measure_tokens=text.size,
    tokens=config.compare.tokens,
  )


def allocator(name: str, config) -> Callable:
  """(problem, seed) -> incumbents, with the settings of the configuration."""
  base = baselines.base(name)
  settings = dict(config.compare.settings.get(base, {}))
  if base.startswith('fastforward'):
    settings['config'] = config
  allocate = functools.partial(baselines.METHODS[base], **settings)
  refits = name in baselines.REFIT
  return functools.partial(on_refit, allocate) if refits else allocate


def on_refit(allocate, problem: Problem, seed: int):
  """An allocator that scores candidates calibrated."""
  yield problem.project(problem.start_S)
  yield from allocate(problem.refit(), seed)


def trace_incumbents(allocate, problem: Problem, seed: int) -> list:
  """Every new incumbent and the tokens used when it came, the answer last."""
  trace = []
  try:
    for counts in allocate(problem, seed):
      if not trace or not np.array_equal(counts, trace[-1][1]):
        trace.append((problem.used, counts))
  except OutOfTokens:
    pass
  return trace


def evaluate_incumbents(
  config, job, model, device_sublayers, dense, trace
) -> dict:
  """What an allocator's incumbents are worth; costs it no tokens."""

  @functools.cache
  def worth(counts):
    keep = masks.from_counts(device_sublayers.rank, np.array(counts))
    repaired = prune.calibrate(config, job, model.params, {'': keep})['']
    weights = {'ppl': model.params, 'ppl_calibrated': repaired}
    heldout = job.text.heldout
    return {
      name: float(np.exp(model.loss(params, heldout, keep)))
      for name, params in weights.items()
    }

  looks = []
  for share in config.compare.checkpoints:
    tokens = round(share * config.compare.tokens)
    known = [row for row in trace if row[0] <= tokens]
    counts = (known or trace)[-1 if known else 0][1]
    looks.append({'tokens': tokens, **worth(tuple(counts.tolist()))})
  counts = trace[-1][1]
  keep = masks.from_counts(device_sublayers.rank, counts)
  reward = model.loss(model.params, job.text.reward, keep)
  return {
    **worth(tuple(counts.tolist())),
    'reward': float(np.exp(dense['reward'] - reward)),
    'sparsity_achieved': job.sublayers.sparsity(counts),
    'counts': counts,
    'checkpoints': looks,
  }


def main(argv):
  del argv
  workdir, again = cli.begin_command('ffp_jax.compare', flags.FLAGS.workdir)
  with cli.report_errors(workdir, again):
    results = run_comparison(flags.FLAGS.config, workdir)
  print(method_comparison.summary(results))
  print(f'\nreport      {workdir / "compare.md"}')


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', help_string='Settings.')
  flags.DEFINE_string('workdir', None, 'Directory of the comparison.')
  app.run(
    main,
    flags_parser=functools.partial(
      cli.parse_flags,
      config='configs/compare.py',
      workdir='the directory of the comparison',
    ),
  )
