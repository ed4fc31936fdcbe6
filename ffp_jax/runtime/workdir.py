"""What a run writes down as it goes: times, metrics, JSON files."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import sys
import time

from absl import logging
from tqdm import tqdm

from ffp_jax.errors import RequestError
from ffp_jax.runtime.storage import (
  append_text,
  is_local,
  read_json_lines,
  to_json,
  write_atomically,
)

_LOG_SECONDS = 10  # between progress lines where there is no terminal


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Where a run writes its times, metrics and JSON files.

  Attributes:
    path: need not exist until something is written.
    writes: False in all processes of a run but one, which only read.
    seconds: by stage, in the order of `timed`, over all processes that have
      worked on this run; kept in seconds.json.
  """

  path: pathlib.Path
  writes: bool = True
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  _since: dict[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.seconds.update(self.read_json('seconds.json') or {})

  @contextlib.contextmanager
  def timed(self, stage: str):
    """Logs a stage's start and time; a stage entered again adds up."""
    logging.info('%s: start', stage)
    start = self._since[stage] = time.perf_counter()
    yield
    now = self._count_time()
    del self._since[stage]
    logging.info('%s: %.1f s', stage, now - start)

  def _count_time(self) -> float:
    """Writes down the time of the stage that is under way."""
    now = time.perf_counter()
    for stage, since in self._since.items():
      spent = self.seconds.get(stage, 0.0) + now - since
      self.seconds[stage] = round(spent, 3)
      self._since[stage] = now
    self.write_json('seconds.json', self.seconds)
    return now

  def append(self, line: dict):
    """Adds a line, which has a step, to metrics.jsonl; NaN becomes null."""
    if self.writes:
      self.path.mkdir(parents=True, exist_ok=True)
      append_text(self._metrics, to_json(line) + '\n')
    self._count_time()

  @property
  def _metrics(self):
    return self.path / 'metrics.jsonl'

  def has_metrics(self) -> bool:
    """Whether a search has taken a step."""
    return self._metrics.exists() and bool(self._metrics.read_bytes())

  def rewind(self, step: int):
    """Drops from metrics.jsonl what a search resumed at `step` will redo.

    A line that a crash tore is dropped too, so that `append` starts a new one.
    """
    if self.writes and self._metrics.exists():
      kept = [
        line for line in read_json_lines(self._metrics) if line['step'] < step
      ]
      write_atomically(
        self._metrics, ''.join(to_json(line) + '\n' for line in kept)
      )

  def write_json(self, name: str, content):
    """Writes `workdir/name`, whole or not at all; NumPy is accepted."""
    if self.writes:
      write_atomically(self.path / name, to_json(content, indent=2) + '\n')

  def read_json(self, name: str):
    """The content of `workdir/name`, None if there is no such file."""
    path = self.path / name
    return json.loads(path.read_text()) if path.exists() else None

  @contextlib.contextmanager
  def progress(self, total: int, done: int):
    """Shows a search's steps: a bar on a terminal, else lines in the log.

    Args:
      total: steps of the whole search.
      done: steps that have been taken.

    Yields:
      A function that takes the metrics of the step just taken.
    """
    terminal = sys.stderr.isatty()
    with tqdm(
      desc='search',
      total=total,
      initial=done,
      bar_format='{desc} {n_fmt}/{total_fmt}{postfix}, {remaining} left {bar}',
      dynamic_ncols=True,
      disable=not (terminal and self.writes),
    ) as bar:

      def show(line):
        reward, sparsity = line['reward_mean'], line['sparsity']
        shown = {'reward': f'{reward:.3f}', 'sparsity': f'{sparsity:.1%}'}
        bar.set_postfix(shown, refresh=False)  # `update` redraws, at times
        bar.update(1)
        if self.writes and not terminal:
          logging.log_every_n_seconds(
            logging.INFO,
            'search %d/%d, reward=%.3f, sparsity=%.1f%%, about %.0f s left',
            _LOG_SECONDS,
            *(line['step'] + 1, total, reward, 100.0 * sparsity),
            line['seconds'] * (total - line['step'] - 1),
          )

      yield show


def changed_keys(config, other: dict) -> list[str]:
  """Keys whose values differ between a config and one read from JSON."""
  flat = [_flat(json.loads(config.to_json())), _flat(other)]
  keys = sorted(flat[0].keys() | flat[1].keys())
  return [key for key in keys if flat[0].get(key, ...) != flat[1].get(key, ...)]


def _flat(tree, prefix=''):
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out.update(_flat(value, f'{prefix}{key}.'))
    else:
      out[prefix + key] = value
  return out


# What a run may go on with another value of: no result depends on it, but for
# the order in which numbers are summed on another mesh. The number of steps is
# not among them: the learning rates fall over the whole search.
_MAY_CHANGE = (
  'checkpoint.',
  'compare.methods',
  'compare.sparsities',
  'compare.seeds',
  'mesh.',
  'search.block',
  'search.remat',
)


@contextlib.contextmanager
def claim(workdir: pathlib.Path, config):
  """Holds the workdir against other processes, and config.json in it.

  The lock ends with the process, however that ends. A bucket has none.

  Raises:
    RequestError: the workdir can't be written, is in use, or holds a run
      with other settings.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    local = is_local(workdir)
    lock = open(workdir / 'lock' if local else os.devnull, 'w')
  except OSError as error:
    raise RequestError(
      f'workdir: cannot write to {workdir} ({error.strerror})'
    ) from error
  with lock:
    if local:
      _lock(lock, workdir)
    _write_config(workdir, config)
    yield


def _lock(file, workdir):
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise RequestError(
      f'workdir: another process is at work in {workdir}; wait for it, or use '
      'another --workdir'
    ) from error
  except OSError as error:  # some network file systems
    logging.warning('%s: cannot be locked (%s)', workdir, error.strerror)


def _write_config(workdir, config):
  path = workdir / 'config.json'
  try:
    differ = _differing(config, path) if path.exists() else ['all']
    if differ:
      write_atomically(path, config.to_json(indent=2) + '\n')
  except OSError as error:
    raise RequestError(
      f'workdir: cannot write to {workdir} ({error.strerror})'
    ) from error


def _differing(config, path) -> list[str]:
  """Keys that may differ from those in `path`, and do."""
  try:
    other = json.loads(path.read_text())
  except ValueError as error:
    raise RequestError(
      f'workdir: {path} is not valid JSON; use another --workdir'
    ) from error
  if not isinstance(other, dict):
    raise RequestError(
      f'workdir: {path} is not a configuration; use another --workdir'
    )
  differ = changed_keys(config, other)
  fixed = [key for key in differ if not key.startswith(_MAY_CHANGE)]
  if fixed:
    raise RequestError(
      f'workdir: {path.parent} holds a run with other {", ".join(fixed)}; '
      'use another --workdir or the same settings'
    )
  return differ
