"""The whole run as one readable story."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ffp_jax import config as config_lib
from ffp_jax import export, report
from ffp_jax import results as results_lib
from ffp_jax.checkpoints import hub
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.evaluation import protocols, scoring
from ffp_jax.evaluation.loss import nll
from ffp_jax.export import gguf_file
from ffp_jax.models import families
from ffp_jax.pruning import (
  allocation,
  curriculum,
  importance,
  resources,
  search,
  sublayers,
)
from ffp_jax.pruning import calibration as ridge
from ffp_jax.pruning import masks as masks_lib
from ffp_jax.pruning import refit as refit_lib
from ffp_jax.runtime import search_state, sharding, signals
from ffp_jax.runtime.workdir import Book
from ffp_jax.text import corpora, tokenization
from ffp_jax.text import windows as windows_lib


def run(config, workdir: pathlib.Path, *, command: str) -> dict:
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
  job = prepare(config)
  with jax.set_mesh(mesh):
    first = start(config, job.sites, workdir)
    with sharding.led_by_one(config_lib.claim, workdir, config) as leads:
      return go(config, job, first, Book(workdir, writes=leads), command)


def go(config, job, first, book, command) -> dict:
  """The run, in a workdir that is ours; `first` begins the search."""
  if finished := book.read_json('results.json'):
    logging.info('%s already holds the finished run', book.workdir)
    if book.writes:
      report.write(book.workdir)  # a crash may have come before it
    return finished

  if book.writes:
    gguf_file.warn(job.directory, job.model)
  state = resume(first, book)
  with book.timed('load'):
    dtype = scoring.dtype_of(config.dtype)
    params = weights_lib.load_params(job.directory, job.model, dtype)
    loss = scoring.Scorer(job.model)
  with book.timed('dense loss'):
    text = reward_text(config, job, params, loss)
  with book.timed('importance'):
    modules = rank_units(config, job, params)
  with book.timed('refit'):
    scored = refit(config, job, params, modules)
  with book.timed('search'):
    finalists, cost = find(config, job, scored, modules, text, state, book)
  with book.timed('re-score'):
    tried = rescore(config, job, scored, modules, text, finalists)
    del scored  # makes room
    best = min(tried, key=lambda x: np.nan_to_num(x.nll, nan=np.inf))
    cost['tokens_evaluated'] += (1 + len(tried)) * text.rows_RxT.size
  keep = {
    'uniform': uniform(config, job, modules),
    'searched': masks_lib.from_counts(modules.rank, best.counts),
  }
  with book.timed('calibrate'):
    repaired = calibrate(config, job, params, keep)
  with book.timed('save'):
    size = save(job, repaired['searched'], keep['searched'], book)
  with book.timed('evaluate'):
    results = judge(config, job, params, keep, repaired, loss)
  found = results_lib.allocation(config, job, best)
  book.write_json('allocation.json', found)
  results |= results_lib.rewards(config, text, best)
  results |= results_lib.sizes(job, found, size)
  results |= cost | {'seconds': book.seconds, 'command': command}
  results |= {'versions': report.versions(), 'device': results_lib.device()}
  book.write_json('results.json', results)
  if book.writes:
    report.write(book.workdir)
  return results


class Job(NamedTuple):
  """What a run works on, before any weight is read."""

  directory: pathlib.Path
  model: families.ModelConfig
  dtype: np.dtype  # of its file, and so of the file that is written
  sites: sublayers.Sites
  text: windows_lib.Splits
  protocol: protocols.Protocol  # of the held-out figures

  @property
  def dense(self):
    """Masks that remove nothing."""
    model = self.model
    return masks_lib.ones(model.layers, model.groups, model.ffn)


class Scored(NamedTuple):
  """The decoder that candidates are scored on."""

  model: families.ModelConfig
  params: dict


class Finalist(NamedTuple):
  """A candidate that was re-scored."""

  counts: np.ndarray  # [S]
  priority: np.ndarray  # [S]
  nll: float  # on the whole reward text


def prepare(config) -> Job:
  """Finds the model, its modules and its text; refuses what can't be."""
  directory = hub.locate(config.model)
  model = families.model_config(directory)
  if model.sliced:
    raise config_lib.RequestError(
      f'model: {config.model!r} is already pruned; give the dense model'
    )
  sites = sublayers.sites(
    model,
    round_heads=config.budget.round_heads,
    round_ffn=config.budget.round_ffn,
  )
  sites = sites._replace(resources=resources.of(config, model, sites))
  config_lib.check_reachable(sites, config)
  found = weights_lib.check_files(
    directory, model, scoring.dtype_of(config.dtype)
  )
  text = corpora.read(config.data, field=config.text.field)
  tokens = tokenization.encode(directory, text.content)
  context = config.text.context
  tokenization.check(model, tokens.ids, context)
  splits = windows_lib.split(
    windows_lib.windows(tokens.ids, context),
    calibration=config.text.calibration_windows,
    reward=config.text.reward_windows,
    validation=config.text.validation_windows,
    heldout=config.text.heldout_windows,
    seed=config.seed,
  )
  protocol = protocols.describe(
    'gptq',
    text.name,
    f'held-out (end of {text.extent})',
    splits.heldout,
    protocols.whole(splits.heldout),
    stride=context,
    bos=tokens.bos,
  )
  dtype = weights_lib.main_dtype(*found)
  return Job(directory, model, dtype, sites, splits, protocol)


def start(config, sites, workdir) -> search.SearchState:
  """Where a new search begins: the prior, or another run's policy."""
  state = search.start(config, sites)
  # Once begun, a search no longer needs the run that it began from.
  if config.search.init_from and not search_state.steps_in(
    workdir / 'checkpoints'
  ):
    other = pathlib.Path(config.search.init_from).expanduser()
    state = state._replace(params=search_state.inherit(other, state.params))
  return state


def resume(first, book) -> search.SearchState:
  """Where the search goes on: the state saved last, or else `first`."""
  state = search_state.restore(book.workdir / 'checkpoints', first)
  if state is None and book.has_metrics():
    raise config_lib.RequestError(
      f'workdir: {book.workdir} has metrics of a search but no checkpoint; '
      'put back its checkpoints, or use another --workdir'
    )
  return first if state is None else state


def rank_units(config, job, params) -> allocation.Modules:
  """Scores the units on the calibration text and orders each module's."""
  captured = scoring.captured_of(job.model, importance.square_sum)
  measure = jax.jit(lambda p, t: importance.input_norms(captured, p, t))
  norms = measure(params, job.text.calibration[:, None])
  weights = params['stack']['attention']['out'], params['stack']['ffn']['down']
  scores = jax.jit(importance.wanda)(weights, norms)
  modules = allocation.modules(job.sites, masks_lib.rank_all(scores))
  return jax.block_until_ready(modules)  # for an honest clock


def reward_text(config, job, params, loss) -> search.RewardText:
  """The reward rows, and what the dense model makes of them."""
  rows = job.text.reward.reshape(-1, config.search.context)
  dense = loss.each(params, rows, job.dense, label='dense loss')
  return search.RewardText(rows, dense)


def refit(config, job, params, modules) -> Scored:
  """The decoder whose masks refit, or the dense one if none is asked for."""
  if not config_lib.refits(config):
    return Scored(job.model, params)
  model, mended = refit_lib.refitting(
    params,
    job.model,
    modules.rank,
    job.text.calibration[:, None],
    strength=config.search.refit,
  )
  return Scored(model, jax.block_until_ready(mended))  # for an honest clock


def find(config, job, scored, modules, text, state, book):
  """The search, from `state` on: logs and saves every step.

  Returns:
    (priorities worth re-scoring [M,S], what the whole search takes).
  """
  apply = scoring.apply_of(scored.model, remat=config.search.remat)
  plan = curriculum.plan(config)
  ends, compilations = curriculum.ends(plan), 0
  steps = search.steps(
    config,
    job.sites,
    modules,
    lambda params, tokens, masks: nll(apply, params, tokens, masks),
    scored.params,
    text,
    state,
  )
  with (
    search_state.Checkpoints(
      book.workdir / 'checkpoints',
      every=config.checkpoint.every,
      keep=config.checkpoint.keep,
      ends=ends,
    ) as saved,
    signals.save_first(saved.flush),
    book.progress(ends[-1], int(state.step)) as show,
  ):
    # Before the first line of metrics: where these are, so is a checkpoint.
    saved.begin(int(state.step), state)
    book.rewind(int(state.step))
    for state, line in steps:
      compilations = line.pop('compilations')
      book.append(line)
      show(line)
      saved.save(line['step'] + 1, state)
  cost = search.cost(config, plan) | {'compilations': compilations}
  return search.finalists(config, job.sites, state), cost


def rescore(config, job, scored, modules, text, finalists) -> list:
  """Every `Finalist`, its loss over the whole reward text."""
  loss = scoring.Scorer(scored.model)
  counts = {
    tuple(counts_of(config, job, modules, row)): row for row in finalists
  }
  return [
    Finalist(
      np.array(count),
      row,
      loss(
        scored.params,
        text.rows_RxT,
        masks_lib.from_counts(modules.rank, jnp.array(count)),
        label='re-score',
      ),
    )
    for count, row in counts.items()
  ]


def counts_of(config, job, modules, priority_S) -> np.ndarray:
  """Priorities to counts at the run's budget."""
  return allocation.counts_of(
    priority_S,
    config.budget.sparsity,
    job.sites,
    modules,
    low=config.search.lowest_ratio,
    repair=config.search.repair,
  )


def uniform(config, job, modules):
  """Masks of the same budget spread evenly."""
  even = np.zeros(len(job.sites.units), np.float32)
  counts = counts_of(config, job, modules, even)
  return masks_lib.from_counts(modules.rank, jnp.array(counts))


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
      'calibrate %s: ridge strengths, number of modules: %s',
      name,
      {f'{k:g}': int(np.sum(strengths == k)) for k in np.unique(strengths)},
    )
  return repaired


def save(job, params, keep, book) -> int:
  """Writes the small model; its bytes, 0 in a process that doesn't write."""
  small = export.slice_params(params, job.model, keep)
  if not book.writes:
    return 0
  out = book.workdir / 'pruned'
  return export.save(*small, job.directory, out, dtype=job.dtype)


def judge(config, job, params, keep, repaired, loss) -> dict:
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
