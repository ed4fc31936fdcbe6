"""What a run writes down as it goes: times, metrics, JSON files."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import sys
import time

from absl import logging
from etils import epath
from tqdm import tqdm

_LOG_SECONDS = 10  # between progress lines where there is no terminal


@dataclasses.dataclass(frozen=True)
class Book:
  """Where a run writes its times, metrics and JSON files.

  Attributes:
    workdir: need not exist until something is written.
    writes: False in all processes of a run but one, which only read.
    seconds: by stage, in the order of `timed`, over all processes that have
      worked on this run; kept in seconds.json.
  """

  workdir: pathlib.Path
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
      self.workdir.mkdir(parents=True, exist_ok=True)
      _append(self._metrics, _json(line) + '\n')
    self._count_time()

  @property
  def _metrics(self):
    return self.workdir / 'metrics.jsonl'

  def has_metrics(self) -> bool:
    """Whether a search has taken a step."""
    return self._metrics.exists() and bool(self._metrics.read_bytes())

  def rewind(self, step: int):
    """Drops from metrics.jsonl what a search resumed at `step` will redo.

    A line that a crash tore is dropped too, so that `append` starts a new one.
    """
    if self.writes and self._metrics.exists():
      kept = [line for line in lines(self._metrics) if line['step'] < step]
      replace(self._metrics, ''.join(_json(line) + '\n' for line in kept))

  def write_json(self, name: str, content):
    """Writes `workdir/name`, whole or not at all; NumPy is accepted."""
    if self.writes:
      replace(self.workdir / name, _json(content, indent=2) + '\n')

  def read_json(self, name: str):
    """The content of `workdir/name`, None if there is no such file."""
    path = self.workdir / name
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


def plain(value):
  """The same content for strict JSON: no NumPy, null for NaN and inf."""
  if hasattr(value, 'tolist'):  # NumPy
    value = value.tolist()
  if isinstance(value, dict):
    return {key: plain(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [plain(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _json(content, indent=None) -> str:
  return json.dumps(plain(content), indent=indent, allow_nan=False)


def lines(path) -> list[dict]:
  """The objects of a file of JSON lines; a torn line is left out."""
  found = []
  for line in path.read_bytes().decode(errors='replace').splitlines():
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      logging.warning('%s: a torn line is left out', path)
  return found


def place(name: str):
  """A path from the command line: of a file system, or of a bucket."""
  return epath.Path(name) if '://' in name else pathlib.Path(name).expanduser()


def is_local(path) -> bool:
  """Whether a path is of a file system; in a bucket objects are replaced
  whole, and nothing can be appended, renamed or locked."""
  return isinstance(path, pathlib.Path)


def _append(path, text):
  if is_local(path):
    with open(path, 'a') as file:
      _write(file, text)
  else:
    path.write_text((path.read_text() if path.exists() else '') + text)


def replace(path, text):
  """Writes a file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if not is_local(path):
    path.write_text(text)
    return
  temp = path.with_name(f'.{path.name}.tmp')
  with open(temp, 'w') as file:
    _write(file, text)
  os.replace(temp, path)


def _write(file, text):
  """As far as the disk, so that a power cut can't reorder what is written."""
  file.write(text)
  file.flush()
  os.fsync(file.fileno())


# Disk, quota, and the largest file that is allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(error: BaseException) -> str | None:
  """What the system says of a full disk, None if `error` isn't of one.

  Goes by the text, as libraries wrap the system's errors in their own.
  """
  while error:
    for code in _FULL:
      if os.strerror(code) in str(error):
        return os.strerror(code)
    error = error.__cause__ or error.__context__
  return None
