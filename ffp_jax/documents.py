"""Text files to documents, one at a time; no file is ever read whole."""

import codecs
import gzip
import itertools
import json
import pathlib
import zlib
from collections.abc import Iterator

from ffp_jax.config import RequestError

_FIELDS = ('text', 'sentence')  # the first that is there
_ROWS = 64  # of a columnar file, in memory at once


def _field(names, where) -> str:
  for field in _FIELDS:
    if field in names:
      return field
  raise RequestError(
    f'data: {where} has no field {" or ".join(map(repr, _FIELDS))}; '
    f'it has {", ".join(map(repr, names)) or "none"}'
  )


def _decoded(path, raw: bytes, *, start=0, final=True) -> str:
  """Text of bytes that begin at byte `start` of a file."""
  nul = raw.find(b'\0')
  if nul >= 0:
    raise RequestError(
      f'data: {path} is binary, not UTF-8 text (a NUL at byte {start + nul:,})'
    )
  try:
    return codecs.getincrementaldecoder('utf-8')().decode(raw, final)
  except UnicodeDecodeError as error:
    raise RequestError(
      f'data: {path} is not UTF-8 text (byte {start + error.start:,}); '
      'convert it to UTF-8'
    ) from error


def _plain(path, limit):
  with path.open('rb') as file:
    # Twice, as a line end may shrink from two bytes to one; four more, as the
    # last character may be torn.
    raw = file.read(2 * limit + 4)
    text = _decoded(path, raw, final=not file.read(1))
  text = text.removeprefix('\ufeff')  # byte order mark
  yield text.replace('\r\n', '\n').replace('\r', '\n')


def _json_lines(path, limit):
  unpack = gzip.open if path.suffix == '.gz' else open
  with unpack(path, 'rb') as file:
    for number in itertools.count(1):
      start = file.tell()
      line = file.readline(limit + 1)
      if not line:
        return
      where = f'{path}, line {number:,}'
      text = _decoded(path, line, start=start, final=len(line) <= limit)
      if len(line) > limit:
        raise RequestError(
          f'data: {where} is longer than {limit:,} bytes; give one document '
          'a line'
        )
      if not text.strip():
        continue
      try:
        record = json.loads(text)
      except (ValueError, RecursionError) as error:
        raise RequestError(f'data: {where} is not JSON ({error})') from error
      if not isinstance(record, dict):
        raise RequestError(f'data: {where} is not a JSON object')
      yield record[_field(record, where)]


def _parquet(path, limit):
  import pyarrow.parquet  # heavy, and only here

  with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
    field = _field(file.schema_arrow.names, path)
    for batch in file.iter_batches(_ROWS, columns=[field]):
      yield from (value.as_py() for value in batch.column(0))


def _arrow(path, limit):
  import pyarrow.ipc

  with pyarrow.memory_map(str(path)) as source:
    if source.read(6) == b'ARROW1':  # the file format, with random access
      reader = pyarrow.ipc.open_file(source)
      batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
      source.seek(0)
      batches = reader = pyarrow.ipc.open_stream(source)
    field = _field(reader.schema.names, path)
    for batch in batches:
      yield from (value.as_py() for value in batch[field])


_READERS = {
  '.txt': _plain,
  '.jsonl': _json_lines,
  '.jsonl.gz': _json_lines,
  '.json.gz': _json_lines,
  '.parquet': _parquet,
  '.arrow': _arrow,
}
FORMATS = ', '.join(_READERS)


def _suffix(path: pathlib.Path) -> str | None:
  """Which of FORMATS a file's name says, None for none of them."""
  found = (s for s in _READERS if path.name[1:].endswith(s))
  return next(found, None)


def files(path: pathlib.Path) -> list[pathlib.Path]:
  """The text files that a path stands for, by name.

  Args:
    path: a file of one of FORMATS, or a directory, of which files of other
      formats, hidden ones and subdirectories are left out.

  Raises:
    RequestError: there is no such file.
  """
  try:
    if path.is_dir():
      found = sorted(x for x in path.iterdir() if _suffix(x) and x.is_file())
      found = [x for x in found if not x.name.startswith('.')]
      if not found:
        raise RequestError(f'data: {path} is a directory without {FORMATS}')
      return found
    if _suffix(path) and not path.is_file():
      raise RequestError(f'data: no file {str(path)!r}; check the path')
  except OSError as error:
    raise RequestError(f'data: {path}: {error.strerror}') from error
  return [path] if _suffix(path) else []


def read(path: pathlib.Path, limit: int) -> Iterator[str]:
  """The documents of a file, lazily.

  Args:
    path: one of `files`. JSON is one object a line; it and the columnar
      formats have the document in the field 'text', or else 'sentence'.
    limit: bytes beyond which a document is of no use; a plain text is one
      document, of which little more is read.

  Raises:
    RequestError: binary, not UTF-8, not of the format its name says, or a
      document is missing or not a text.
  """
  suffix = _suffix(path)
  try:
    if not path.stat().st_size:
      return
    for number, text in enumerate(_READERS[suffix](path, limit), 1):
      if not isinstance(text, str):
        kind = 'missing' if text is None else f'{type(text).__name__}, not text'
        raise RequestError(f'data: {path}: document {number:,} is {kind}')
      text.encode()  # JSON may hold half of a surrogate pair
      yield text
  except RequestError:
    raise
  # What gzip, zlib, pyarrow and codecs raise about a broken file.
  except (OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
    raise RequestError(
      f'data: {path} is not readable {suffix} text ({error})'
    ) from error
