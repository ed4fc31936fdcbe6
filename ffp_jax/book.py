"""What a run writes down as it goes: times, metrics, JSON files."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import sys
import time

from absl import logging
from tqdm import tqdm

_LOG_SECONDS = 10  # between progress lines where there is no terminal


@dataclasses.dataclass(frozen=True)
class Book:
  """Where a run writes its times, metrics and JSON files.

  Attributes:
    workdir: need not exist until something is written.
    seconds: by stage, in the order of `timed`.
  """

  workdir: pathlib.Path
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)

  @contextlib.contextmanager
  def timed(self, stage: str):
    """Logs a stage's start and time; a stage entered again adds up."""
    logging.info('%s: start', stage)
    start = time.perf_counter()
    yield
    spent = time.perf_counter() - start
    logging.info('%s: %.1f s', stage, spent)
    self.seconds[stage] = round(self.seconds.get(stage, 0.0) + spent, 3)

  def append(self, line: dict):
    """Adds a line, which has a step, to metrics.jsonl; NaN becomes null."""
    self.workdir.mkdir(parents=True, exist_ok=True)
    with open(self.workdir / 'metrics.jsonl', 'a') as file:
      file.write(_json(line) + '\n')  # flushed as it closes

  def rewind(self, step: int):
    """Drops from metrics.jsonl what a search resumed at `step` will redo.

    A line that a crash tore is dropped too, so that `append` starts a new one.
    """
    path = self.workdir / 'metrics.jsonl'
    if path.exists():
      kept = [line for line in lines(path) if line['step'] < step]
      replace(path, ''.join(_json(line) + '\n' for line in kept))

  def write_json(self, name: str, content):
    """Writes `workdir/name`, whole or not at all; NumPy is accepted."""
    replace(self.workdir / name, _json(content, indent=2) + '\n')

  def read_json(self, name: str):
    """The content of `workdir/name`, None if there is no such file."""
    path = self.workdir / name
    return json.loads(path.read_text()) if path.exists() else None

  def progress(self, total: int, initial: int) -> tqdm:
    """The search's bar on a terminal, else the same as lines in the log.

    Use `set_postfix` before `update`, to show this step's values.
    """
    form = '{desc} {n_fmt}/{total_fmt}{postfix}, {remaining} left'
    common = {'total': total, 'initial': initial, 'desc': 'search'}
    if sys.stderr.isatty():
      return tqdm(**common, bar_format=form + ' {bar}', dynamic_ncols=True)
    # miniters, lest tqdm guess how many steps fill the interval.
    return _LogBar(
      **common,
      bar_format=form,
      mininterval=_LOG_SECONDS,
      miniters=1,
      file=io.StringIO(),
    )


class _LogBar(tqdm):
  """A bar that logs a plain line whenever tqdm would redraw."""

  _shown = None

  def display(self, msg=None, pos=None):
    del msg, pos
    if self._shown != (self.n, self.postfix):  # close repeats the last one
      self._shown = (self.n, self.postfix)
      logging.info('%s', str(self))  # now; the bar moves on

  def set_postfix(self, **values):
    # tqdm's own redraws at once, as often as it is called.
    super().set_postfix(refresh=False, **values)


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
  for line in path.read_text(errors='replace').splitlines():
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      logging.warning('%s: a torn line is left out', path)
  return found


def replace(path, text):
  """Writes a file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temp = path.with_name(f'.{path.name}.tmp')
  temp.write_text(text)
  os.replace(temp, path)
