"""What recovery makes of allocations that were compared before.

python -m ffp_jax.benchmarks.recovered_allocations --compared=compare.json \
  --config=configs/compare.py --config.data=TEXT --sparsities=0.2,0.3 \
  --methods=fastforward,uniform --tokens=16384,65536 --out=FILE.json

Each allocation of compare.json that the flags name is calibrated as it was
there and then recovered, anew for each number of tokens, as the cosine of the
rate ends with them. The perplexities are of the held-out windows of the
config's text and of the last windows of the texts of --test. What is in FILE
already is not done again. With --models=DIR each model is kept, for
`ffp_jax.evaluate --tasks=builtin` for example; FILE says where.
"""

import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from ffp_jax import export, jobs, recover, stages
from ffp_jax.baselines import settings
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.checkpoints.model import find_model
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import scoring
from ffp_jax.models import functional
from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import masks as masks_lib
from ffp_jax.runtime import cli, sharding, storage

_KEY = ('method', 'sparsity', 'seed', 'data', 'rank', 'tokens')


def find_runs(
  compared: pathlib.Path,
  methods: Sequence[str],
  sparsities: Sequence[float],
  seeds: Sequence[int],
) -> list[dict]:
  """Returns the runs of compare.json that are asked for, in that order.

  Raises:
    RequestError: the file can't be read, or lacks one of them.
  """
  try:
    runs = json.loads(compared.read_text())['runs']
    found = {(x['method'], x['sparsity'], x['seed']): x for x in runs}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise RequestError(
      f'--compared: {compared} is not a compare.json ({error})'
    ) from error
  wanted = list(itertools.product(methods, sparsities, seeds))
  if missing := [key for key in wanted if key not in found]:
    raise RequestError(f'--compared: {compared} has no run {missing[0]}')
  return [found[key] for key in wanted]


class Setting:
  """What every measurement of one seed shares.

  Attributes:
    config: settings of one allocation, see `settings.cell_config`.
    job: the model and its text.
    params: of the dense decoder.
    tests: windows by the name of their text.
  """

  def __init__(self, config: ml_collections.ConfigDict, tests: Sequence[str]):
    """Reads model and texts."""
    self.config = config
    self.job = jobs.prepare_job(config)
    files = find_model(config.model)
    others = [jobs.read_other(config, files, name) for name in tests]
    self.tests = {self.job.protocol.text: self.job.text.heldout}
    self.tests |= {x.protocol.text: x.windows for x in others}
    self._scorer = scoring.Scorer(self.job.model)

  @functools.cached_property
  def params(self) -> dict:
    """Returns the parameters of the dense decoder."""
    dtype = functional.resolve_dtype(self.config.dtype)
    return weights_lib.load_params(self.job.directory, self.job.model, dtype)

  @functools.cached_property
  def _ranks(self):
    return stages.rank_units(self.job, self.params).rank

  def prune(self, counts: Sequence[int]) -> tuple[dict, Masks]:
    """Returns the calibrated parameters and masks of an allocation."""
    keep = masks_lib.from_counts(self._ranks, np.array(counts))
    calibrated = stages.calibrate(
      self.config, self.job, self.params, {'': keep}
    )
    return calibrated[''], keep

  def recover(self, pruned, text) -> tuple[dict, list[dict]]:
    """Returns recovered parameters, and the metrics of every step."""
    lines: list[dict] = []
    found = stages.recover(
      self.config,
      self.job,
      self.params,
      pruned,
      text,
      stages.collect(lines, _log),
    )
    return found.params, lines

  def measure(self, params: dict, keep: Masks) -> dict[str, float]:
    """Returns the perplexity on each text."""
    return {
      name: round(float(np.exp(self._scorer(params, windows, keep))), 3)
      for name, windows in self.tests.items()
    }

  def save(self, params: dict, keep: Masks, out: pathlib.Path) -> None:
    """Writes a model as a directory that every command can load."""
    small = export.slice_params(params, self.job.model, keep)
    export.save(*small, self.job.directory, out, dtype=self.job.dtype)


def _log(metrics):
  logging.log_every_n_seconds(logging.INFO, '%s', 60, metrics)


def measure_all(
  config: ml_collections.ConfigDict,
  runs: Sequence[dict],
  tests: Sequence[str],
  budgets: Sequence[tuple[str, int, int]],
  out: pathlib.Path,
  models: pathlib.Path | None = None,
) -> list[dict]:
  """Measures every run at every budget, and writes each result at once.

  Args:
    config: see configs/compare.py.
    runs: from `find_runs`.
    tests: texts beside the config's own.
    budgets: (recovery.data, recovery.rank, recovery.tokens).
    out: JSON file of the results, which are added to.
    models: directory to keep the models in, each under the number of its
      result, which names it as `model`; None for not keeping them.

  Returns:
    All results of the file.
  """
  lines: list[dict] = json.loads(out.read_text()) if out.exists() else []
  done = {tuple(line[key] for key in _KEY) for line in lines}
  if models:
    models.mkdir(parents=True, exist_ok=True)

  def add(key: tuple[Any, ...], **measured):
    lines.append(dict(zip(_KEY, key, strict=True)) | measured)
    logging.info('%s', lines[-1])
    storage.write_atomically(out, storage.to_json(lines, indent=1) + '\n')

  @functools.cache
  def setting(seed):
    return Setting(settings.cell_config(config, seed, 0.5), tests)

  for run in runs:
    name = run['method'], run['sparsity'], run['seed']
    at = setting(run['seed'])
    dense = ('dense', 0.0, run['seed'], '', 0, 0)
    if dense not in done:
      done.add(dense)
      add(dense, ppl=at.measure(at.params, at.job.dense))
    left = [x for x in [('', 0, 0), *budgets] if (*name, *x) not in done]
    if not left:
      continue
    pruned = at.prune(run['counts'])
    for budget in left:
      kept = models and models / str(len(lines))
      add((*name, *budget), **_measure_budget(at, pruned, budget, kept))
  return lines


def _measure_budget(
  at: Setting,
  pruned: tuple[dict, Masks],
  budget: tuple[str, int, int],
  out: pathlib.Path | None,
) -> dict:
  """Recovers a pruned model, and returns what is measured of it.

  Args:
    at: the setting.
    pruned: from `Setting.prune`.
    budget: see `measure_all`.
    out: directory for the recovered model; None for not keeping it.
  """
  data, rank, tokens = budget
  at.config.recovery.update(data=data, rank=rank, tokens=tokens)
  text, start = recover.prepare(at.config, at.job), time.perf_counter()
  params, metrics = at.recover(pruned, text) if text else (pruned[0], [])
  found: dict[str, Any] = {'seconds': round(time.perf_counter() - start, 1)}
  if out:
    at.save(params, pruned[1], out)
    found['model'] = str(out)
  found['ppl'] = at.measure(params, pruned[1])
  found['validation'] = [
    [i, round(x['validation'], 4)]
    for i, x in enumerate(metrics)
    if 'validation' in x
  ]
  return found


def table(lines: Sequence[dict]) -> str:
  """Returns a row of perplexities for every result."""
  texts = list(dict.fromkeys(name for line in lines for name in line['ppl']))
  shown = [pathlib.Path(name).name[:18] for name in texts]
  rows = [
    f'{"method":14}{"removed":>8}{"seed":>5}{"rank":>5}{"tokens":>10}'
    + ''.join(f'{name:>20}' for name in shown)
    + '  trained on'
  ]
  for line in lines:
    ppls = (line['ppl'].get(name, math.nan) for name in texts)
    rows.append(
      f'{line["method"]:14}{line["sparsity"]:8.0%}{line["seed"]:5}'
      f'{line["rank"]:5}{line["tokens"]:10,}'
      + ''.join(f'{ppl:20.2f}' for ppl in ppls)
      + f'  {line["data"] or "the same text"}'
    )
  return '\n'.join(rows)


def main(argv: list[str]) -> None:
  """Measures what the flags ask for and prints a table."""
  del argv
  args = flags.FLAGS
  out, again = cli.begin_command(
    'ffp_jax.benchmarks.recovered_allocations', args.out
  )
  with cli.report_errors(out, again):
    runs = find_runs(
      pathlib.Path(args.compared),
      args.methods,
      [float(x) for x in args.sparsities],
      [int(x) for x in args.seeds],
    )
    budgets = list(
      itertools.product(args.data, map(int, args.ranks), map(int, args.tokens))
    )
    with jax.set_mesh(sharding.make_mesh(**args.config.mesh)):
      lines = measure_all(
        args.config,
        runs,
        args.test,
        budgets,
        out,
        pathlib.Path(args.models) if args.models else None,
      )
  print(table(lines))


if __name__ == '__main__':
  config_flags.DEFINE_config_file(
    'config', help_string='Configuration of the comparison.'
  )
  flags.DEFINE_string('compared', None, 'compare.json of ffp_jax.compare.')
  flags.DEFINE_list('methods', ['fastforward'], 'Whose allocations.')
  flags.DEFINE_list('sparsities', ['0.2'], 'Of the allocations.')
  flags.DEFINE_list('seeds', ['0'], 'Of the allocations, and of recovery.')
  flags.DEFINE_list('tokens', ['16384'], 'Numbers of tokens to train on.')
  flags.DEFINE_list('ranks', ['0'], 'Of low-rank updates; 0 for all weights.')
  flags.DEFINE_multi_string(
    'data', [''], 'Text to train on; may be given several times.'
  )
  flags.DEFINE_multi_string('test', [], 'Further text to test on.')
  flags.DEFINE_string('out', None, 'JSON file of the results.')
  flags.DEFINE_string('models', None, 'Directory to keep the models in.')
  app.run(
    main,
    flags_parser=functools.partial(
      cli.parse_flags,
      config='a file such as configs/compare.py',
      compared='the compare.json of a comparison',
      out='the JSON file to write',
    ),
  )
