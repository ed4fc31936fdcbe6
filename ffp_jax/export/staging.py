"""Files that appear under their name when they are complete."""

import contextlib
import pathlib
import shutil
import tempfile
import time

from etils import epath

from ffp_jax.runtime import workdir


@contextlib.contextmanager
def staged(out: pathlib.Path):
  """A path that is renamed to `out` if the block ends well, else removed.

  Args:
    out: a file or directory to make; there must be none when the block ends.

  Yields:
    A path that doesn't exist yet, on the same file system; for a bucket, on
    this machine's.
  """
  local = workdir.is_local(out)
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


def disk_full(error: Exception) -> bool:
  """Whether an error is of a full disk, NumPy's own included.

  NumPy says only how much of an array it wrote.
  """
  torn = isinstance(error, OSError) and 'requested and' in str(error)
  return torn or workdir.disk_full(error) is not None
