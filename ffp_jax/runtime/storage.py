"""Files on disk or in a bucket: written whole or not at all, and read back."""

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
import tempfile
import time

from absl import logging
from etils import epath


def to_json_types(value):
  """The same content for strict JSON: no NumPy, null for NaN and inf."""
  if hasattr(value, 'tolist'):  # NumPy
    value = value.tolist()
  if isinstance(value, dict):
    return {key: to_json_types(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [to_json_types(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def to_json(content, indent=None) -> str:
  return json.dumps(to_json_types(content), indent=indent, allow_nan=False)


def read_json_lines(path) -> list[dict]:
  """The objects of a file of JSON lines; a torn line is left out."""
  found = []
  for line in path.read_bytes().decode(errors='replace').splitlines():
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      logging.warning('%s: a torn line is left out', path)
  return found


def as_path(name: str):
  """A path from the command line: of a file system, or of a bucket."""
  return epath.Path(name) if '://' in name else pathlib.Path(name).expanduser()


def is_local(path) -> bool:
  """Whether a path is of a file system; in a bucket objects are replaced
  whole, and nothing can be appended, renamed or locked."""
  return isinstance(path, pathlib.Path)


def append_text(path, text):
  if is_local(path):
    with open(path, 'a') as file:
      _write(file, text)
  else:
    path.write_text((path.read_text() if path.exists() else '') + text)


def write_atomically(path, text):
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
    # NumPy says only how much of an array it wrote.
    if isinstance(error, OSError) and 'requested and' in str(error):
      return os.strerror(errno.ENOSPC)
    error = error.__cause__ or error.__context__
  return None


@contextlib.contextmanager
def staged(out: pathlib.Path):
  """A path that is renamed to `out` if the block ends well, else removed.

  Args:
    out: a file or directory to make; there must be none when the block ends.

  Yields:
    A path that doesn't exist yet, on the same file system; for a bucket, on
    this machine's.
  """
  local = is_local(out)
  home = pathlib.Path(
    tempfile.mkdtemp(dir=out.parent if local else None, prefix=f'.{out.name}.')
  )
  # One level down, because mkdtemp's directory is readable by its owner only.
  stage = home / 'new'
  try:
    yield stage
    stage.rename(out) if local else _upload(stage, out)
  finally:
    _remove(home)


def _remove(directory):
  """Threads of orbax may write on for a moment after an error."""
  for _ in range(50):
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
      return
    time.sleep(0.1)


def _upload(stage, out):
  for path in filter(pathlib.Path.is_file, stage.rglob('*')):
    target = out / path.relative_to(stage).as_posix()
    target.parent.mkdir(parents=True, exist_ok=True)
    epath.Path(path).copy(target, overwrite=True)
