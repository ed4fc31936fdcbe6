"""Kills a tiny run at random moments and goes on, until it is done.

    python -m tests.kill --times=50

Every run that was killed has to end as the one that nothing disturbed.
"""

import collections
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import NamedTuple
from unittest import mock

import numpy as np
from absl import app, flags, logging

from tests import tiny_run

# Imports take longer than a tiny run: one process makes them, and a run is a
# fork of it, which has started no device yet.
_FORKS = multiprocessing.get_context('forkserver')
_FORKS.set_forkserver_preload(
  ['ffp_jax.prune', 'tests.tiny_run', 'transformers']
)


def _work(config, workdir, log):
  from ffp_jax import prune

  # A kill must hit the run itself, so whatever it says goes to a file.
  os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  prune.prune_workdir(config, workdir, command='')


def launch(config, workdir: pathlib.Path):
  """A process that works on `workdir`; `workdir.log` gets what it says."""
  log = workdir.with_suffix('.log')
  process = _FORKS.Process(target=_work, args=(config, workdir, log))
  with mock.patch.dict(os.environ, tiny_run.ENVIRONMENT):
    process.start()
  return process


class Outcome(NamedTuple):
  """What has to be the same, bit for bit."""

  metrics: list
  allocation: bytes
  weights: list[bytes]
  perplexities: list


def outcome(workdir: pathlib.Path) -> Outcome:
  """Of a finished run; wall-clock fields left out."""
  files = [workdir / f'{name}.jsonl' for name in ('metrics', 'recovery')]
  lines = [x for file in files for x in file.read_text().splitlines()]
  metrics = [json.loads(line) | {'seconds': None} for line in lines]
  results = json.loads((workdir / 'results.json').read_text())
  wanted = ('dense', 'uniform', 'searched', 'calibrated', 'uniform_calibrated')
  return Outcome(
    metrics,
    (workdir / 'allocation.json').read_bytes(),
    [
      (workdir / name / 'model.safetensors').read_bytes()
      for name in ('pruned', 'recovered')
    ],
    [results[name] for name in (*wanted, 'recovered')],
  )


def undisturbed(config, workdir) -> float:
  """Runs to the end; returns the seconds that this took."""
  begun = time.perf_counter()
  process = launch(config, workdir)
  process.join()
  if process.exitcode:
    raise RuntimeError(workdir.with_suffix('.log').read_text())
  return time.perf_counter() - begun


def disturbed(config, workdir, moments) -> list[str]:
  """Runs, killed after each of `moments` seconds, then to the end.

  Returns:
    The stage that each kill hit; a run that ended before its kill ends the
    list.
  """
  hit = []
  for moment in moments:
    process = launch(config, workdir)
    process.join(moment)
    if process.exitcode is not None:
      break
    process.kill()
    process.join()
    log = workdir.with_suffix('.log')
    said = log.read_text() if log.exists() else ''
    stages = re.findall(r'\] ([a-z -]+): start$', said, re.M)
    hit.append(stages[-1] if stages else 'prepare')
    log.unlink(missing_ok=True)
  undisturbed(config, workdir)
  return hit


def main(argv):
  del argv
  source = np.random.default_rng(flags.FLAGS.seed)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    config = tiny_run.config(**tiny_run.inputs(folder), **tiny_run.RECOVERY)
    undisturbed(config, folder / 'compiled')
    spent = undisturbed(config, folder / 'whole')
    expected, hit = outcome(folder / 'whole'), collections.Counter()
    print(f'undisturbed: {spent:.1f} s')
    for run in itertools.count():
      if (left := flags.FLAGS.times - hit.total()) <= 0:
        break
      workdir = folder / f'run{run}'
      stages = disturbed(config, workdir, source.uniform(0.0, spent, left))
      hit.update(stages)
      if outcome(workdir) != expected:
        sys.exit(f'not as the undisturbed run after kills in {stages}')
      print(f'{len(stages)} kills, as undisturbed: {", ".join(stages)}')
    print(f'{hit.total()} kills, all as undisturbed: {dict(hit)}')


if __name__ == '__main__':
  flags.DEFINE_integer('times', 50, 'Kills.')
  flags.DEFINE_integer('seed', 0, 'Of the moments.')
  app.run(main)
