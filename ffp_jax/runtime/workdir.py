"""The files of a run: times, metrics, configuration, and the lock on them."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from ffp_jax.errors import RequestError
from ffp_jax.runtime.storage import (
  SEARCH_METRICS,
  append_text,
  is_local,
  read_json_lines,
  to_json,
  write_atomically,
)

_LOG_SECONDS = 10  # between progress lines, where there is no terminal


@dataclasses.dataclass(frozen=True)
class Workdir:
  """The directory that a run writes its times, metrics and JSON files to.

  Attributes:
    path: the directory; it need not exist until something is written.
    writes: whether this process writes; one process of a run does, the others
      only read.
    seconds: seconds by stage, in the order of `timed`, added up over all
      processes that have worked on this run; kept in seconds.json.
  """

  path: pathlib.Path
  writes: bool = True
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  _since: dict[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.seconds.update(self.read_json('seconds.json') or {})

  @contextlib.contextmanager
  def timed(self, stage: str) -> Generator[None, None, None]:
    """Logs and records the time of a stage; repeated stages add up."""
    logging.info('%s: start', stage)
    start = self._since[stage] = time.perf_counter()
    yield
    now = self._count_time()
    del self._since[stage]
    logging.info('%s: %.1f s', stage, now - start)

  def _count_time(self) -> float:
    """Records the time of running stages so far, and returns the clock."""
    now = time.perf_counter()
    for stage, since in self._since.items():
      spent = self.seconds.get(stage, 0.0) + now - since
      self.seconds[stage] = round(spent, 3)
      self._since[stage] = now
    self.write_json('seconds.json', self.seconds)
    return now

  def append(self, line: dict, name: str = SEARCH_METRICS) -> None:
    """Appends metrics to a file of them; NaN becomes null.

    Args:
      line: the metrics; 'step' is required, see `rewind`.
      name: of the file.
    """
    if self.writes:
      self.path.mkdir(parents=True, exist_ok=True)
      append_text(self.path / name, to_json(line) + '\n')
    self._count_time()

  def has_metrics(self) -> bool:
    """Returns whether a search has taken a step."""
    path = self.path / SEARCH_METRICS
    return path.exists() and bool(path.read_bytes())

  def rewind(self, step: int, name: str = SEARCH_METRICS) -> None:
    """Drops the metrics of `step` and later, which a resumed run repeats.

    A line that a crash left incomplete is dropped too.
    """
    path = self.path / name
    if self.writes and path.exists():
      kept = [line for line in read_json_lines(path) if line['step'] < step]
      write_atomically(path, ''.join(to_json(line) + '\n' for line in kept))

  def write_json(self, name: str, content: Any) -> None:
    """Writes `workdir/name` atomically; the content may have NumPy arrays."""
    if self.writes:
      write_atomically(self.path / name, to_json(content, indent=2) + '\n')

  def read_json(self, name: str) -> Any:
    """Returns the content of `workdir/name`, None if there is no such file."""
    path = self.path / name
    return json.loads(path.read_text()) if path.exists() else None

  @contextlib.contextmanager
  def progress(
    self, label: str, total: int, done: int
  ) -> Generator[Callable[[int, dict[str, str], float], None], None, None]:
    """Shows a stage's progress: a bar on a terminal, or lines in the log.

    Args:
      label: of the stage.
      total: number of steps, or tokens, of the whole stage.
      done: number of those already taken.

    Yields:
      A function to call after each step with the number done, figures to show
      by name, and the seconds that one of `total` takes.
    """
    terminal = sys.stderr.isatty()
    with tqdm(
      desc=label,
      total=total,
      initial=done,
      bar_format='{desc} {n_fmt}/{total_fmt}{postfix}, {remaining} left {bar}',
      dynamic_ncols=True,
      disable=not (terminal and self.writes),
    ) as bar:

      def show(done, figures, seconds_each):
        bar.set_postfix(figures, refresh=False)  # `update` redraws when due
        bar.update(done - bar.n)
        if self.writes and not terminal:
          logging.log_every_n_seconds(
            logging.INFO,
            '%s %d/%d, %s, about %.0f s left',
            _LOG_SECONDS,
            *(label, done, total),
            ', '.join(f'{name}={value}' for name, value in figures.items()),
            seconds_each * (total - done),
          )

      yield show


def changed_keys(config: ConfigDict, other: dict) -> list[str]:
  """Returns the dotted keys that differ from a config read from JSON."""
  flat = [_flat(json.loads(config.to_json())), _flat(other)]
  keys = sorted(flat[0].keys() | flat[1].keys())
  return [key for key in keys if flat[0].get(key, ...) != flat[1].get(key, ...)]


def _flat(tree: dict, prefix: str = '') -> dict[str, Any]:
  """Returns a nested dict with dotted keys."""
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out.update(_flat(value, f'{prefix}{key}.'))
    else:
      out[prefix + key] = value
  return out


# Keys that may change when a run resumes: no result depends on them, but for
# the order in which numbers are summed on another mesh. The number of steps is
# not among them, because the learning rates fall over the whole search.
_MAY_CHANGE = (
  'checkpoint.',
  'compare.methods',
  'compare.sparsities',
  'compare.seeds',
  'mesh.',
  'recovery.',  # has settings of its own, beside its checkpoints
  'search.block',
  'search.remat',
)


@contextlib.contextmanager
def claim(
  workdir: pathlib.Path, config: ConfigDict
) -> Generator[None, None, None]:
  """Locks a workdir against other processes, and writes config.json to it.

  The lock ends with the process, in whatever way that ends. A workdir in a
  bucket is not locked.

  Raises:
    RequestError: the workdir cannot be written to, is in use, or holds a run
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
  """Locks an open file, or raises RequestError if another process has it."""
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
  """Writes config.json, unless it is there with the same settings."""
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
  """Returns the keys that differ from the config in a file, and may.

  Raises:
    RequestError: the file is no config, or a key differs that may not.
  """
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
