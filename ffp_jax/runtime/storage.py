"""Reads files on disk or in a bucket, and writes them atomically."""

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Generator
from typing import Any, cast

from absl import logging
from etils import epath

# The metrics of a run, JSON lines in its workdir.
SEARCH_METRICS = 'metrics.jsonl'
RECOVERY_METRICS = 'recovery.jsonl'
# How a file begins that Git LFS has left in the place of the real one.
LFS_POINTER = b'version https://git-lfs'


def to_json_types(value: Any) -> Any:
  """Returns content for strict JSON: without NumPy, null for NaN and inf."""
  if hasattr(value, 'tolist'):  # NumPy
    value = value.tolist()
  if isinstance(value, dict):
    return {key: to_json_types(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [to_json_types(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def to_json(content: Any, indent: int | None = None) -> str:
  """Returns content as strict JSON; see `to_json_types`."""
  return json.dumps(to_json_types(content), indent=indent, allow_nan=False)


def read_json_lines(path: pathlib.Path) -> list[dict]:
  """Returns the objects of a file of JSON lines, without incomplete lines."""
  objects = []
  for line in path.read_bytes().decode(errors='replace').splitlines():
    try:
      objects.append(json.loads(line))
    except json.JSONDecodeError:
      logging.warning('%s: a torn line is left out', path)
  return objects


def as_path(name: str) -> pathlib.Path:
  """Returns a path given on the command line.

  A URL is a path in a bucket: an `epath.Path`, which has the same methods.
  """
  if '://' in name:
    return cast(pathlib.Path, epath.Path(name))
  return pathlib.Path(name).expanduser()


def is_local(path: pathlib.Path) -> bool:
  """Returns whether a path is in a file system, and not in a bucket.

  In a bucket objects are replaced as a whole, and nothing can be appended,
  renamed or locked.
  """
  return isinstance(path, pathlib.Path)


def append_text(path: pathlib.Path, text: str) -> None:
  """Appends to a file, which is made if it does not exist."""
  if is_local(path):
    with open(path, 'a') as file:
      _write(file, text)
  else:
    path.write_text((path.read_text() if path.exists() else '') + text)


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file so that it is never seen half written; makes its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if not is_local(path):
    path.write_text(text)
    return
  temp = path.with_name(f'.{path.name}.tmp')
  with open(temp, 'w') as file:
    _write(file, text)
  os.replace(temp, path)


def _write(file, text):
  """Writes through to the disk, so that a power cut cannot reorder writes."""
  file.write(text)
  file.flush()
  os.fsync(file.fileno())


# No space on the disk, in the quota, or in the largest file allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(error: BaseException | None) -> str | None:
  """Returns the system's message if an error comes from a full disk, or None.

  Compares texts, because libraries wrap the system's errors in their own.
  """
  while error:
    for code in _FULL:
      if os.strerror(code) in str(error):
        return os.strerror(code)
    # NumPy says only how much of an array it wrote.
    if isinstance(error, OSError) and 'requested and' in str(error):
      return os.strerror(errno.ENOSPC)
    error = error.__cause__ or error.__context__
  return None


@contextlib.contextmanager
def staged(out: pathlib.Path) -> Generator[pathlib.Path, None, None]:
  """Yields a path that becomes `out` if the block succeeds, or else is removed.

  Args:
    out: a file or directory to make; it must not exist when the block ends.

  Yields:
    A path that does not exist yet, on the file system of `out`, or on this
    machine if `out` is in a bucket.
  """
  local = is_local(out)
  folder = pathlib.Path(
    tempfile.mkdtemp(dir=out.parent if local else None, prefix=f'.{out.name}.')
  )
  # One level down, because only the owner may read mkdtemp's directory.
  stage = folder / 'new'
  try:
    yield stage
    stage.rename(out) if local else _upload(stage, out)
  finally:
    _remove(folder)


def _remove(directory):
  """Removes a directory that orbax may still write to for a moment."""
  for _ in range(50):
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
      return
    time.sleep(0.1)


def _upload(stage, out):
  """Copies the files of a directory to a bucket."""
  for path in filter(pathlib.Path.is_file, stage.rglob('*')):
    target = out / path.relative_to(stage).as_posix()
    target.parent.mkdir(parents=True, exist_ok=True)
    epath.Path(path).copy(target, overwrite=True)
