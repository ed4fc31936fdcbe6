"""Reading of text files as documents, one at a time."""

import lzma
import pathlib
import zlib
from collections.abc import Iterator

from ffp_jax.errors import RequestError
from ffp_jax.runtime.storage import LFS_POINTER
from ffp_jax.text import records
from ffp_jax.text.encoded_files import PACKED, decoded, open_packed

_MESSAGE_KEYS = ('content', 'value', 'text')  # of the text of a chat's message

# Files that describe a data set, of the hub or saved by `datasets`.
_METADATA = (
  *('readme.md', 'readme.txt', 'license.md', 'license.txt', 'state.json'),
  *('dataset_info.json', 'dataset_infos.json', 'dataset_dict.json'),
)
# Errors of damaged files, beside ValueError and RuntimeError.
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
_PLAIN = ('.txt', '.md')
FORMATS = (
  f'{", ".join([*_PLAIN, *records.READERS])} (or packed: '
  f'{", ".join(PACKED)}), {", ".join(records.COLUMNAR)}'
)


def _kind(path: pathlib.Path) -> tuple[str, str] | None:
  """Returns a file's format and compression by its name, None if unknown."""
  *_, inner, last = '', '', *(suffix.lower() for suffix in path.suffixes)
  if last in PACKED:
    return (inner, last) if inner in (*_PLAIN, *records.READERS) else None
  known = (*_PLAIN, *records.READERS, *records.COLUMNAR)
  return (last, '') if last in known else None


def list_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the text files of a path, sorted by name.

  Args:
    path: a file of one of FORMATS, or a directory of such files. Files of
      other formats, hidden files, metadata of data sets and subdirectories
      are left out.

  Returns:
    The files; none if the path is neither a directory nor of such a format.

  Raises:
    RequestError: there is no such file.
  """
  try:
    if path.is_dir():
      found = sorted(x for x in path.iterdir() if _kind(x) and x.is_file())
      found = [
        x
        for x in found
        if not x.name.startswith('.') and x.name.lower() not in _METADATA
      ]
      if not found:
        raise RequestError(
          f'data: {path} is a directory without {FORMATS}; its '
          'subdirectories are not searched'
        )
      return found
    if _kind(path) and not path.is_file():
      raise RequestError(f'data: no file {str(path)!r}; check the path')
  except OSError as error:
    raise RequestError(f'data: {path}: {error.strerror}') from error
  return [path] if _kind(path) else []


def _read_plain(path, limit) -> str:
  """Returns the text of a plain file, `limit` bytes of it or somewhat more."""
  with open_packed(path) as file:
    # Twice the limit, as a line end may shrink from two bytes to one; and four
    # bytes more, as the last character may be cut.
    raw = file.read(2 * limit + 4)
    text = decoded(path, raw, final=not file.read(1))
  return text.replace('\r\n', '\n').replace('\r', '\n')


def _document(value, where) -> str | None:
  """Returns the text of a field, None for null.

  Args:
    value: text, UTF-8 bytes, None, or a chat: a list of objects, whose
      messages are joined by blank lines.
    where: file, place and field, for messages.
  """
  if isinstance(value, bytes):
    value = decoded(where, value)
  if isinstance(value, list) and all(isinstance(x, dict) for x in value):
    messages = [[x[key] for key in _MESSAGE_KEYS if key in x] for x in value]
    if any(messages) or not value:
      parts = (_document(x[0], where) for x in messages if x)
      return '\n\n'.join(filter(None, parts)) or None
  if value is not None and not isinstance(value, str):
    raise RequestError(f'data: {where} is {type(value).__name__}, not text')
  try:
    (value or '').encode()
  except UnicodeEncodeError as error:
    half = value[error.start].encode('unicode_escape').decode()
    raise RequestError(
      f'data: {where} has {half}, half of a surrogate pair; remove it'
    ) from error
  return value


def read_documents(
  path: pathlib.Path, limit: int, field: str = ''
) -> Iterator[str | None]:
  """Yields the documents of a file, reading on demand; None for null ones.

  Args:
    path: from `list_files`. JSON is an array of objects, or a sequence of
      objects; the first line of CSV names the fields.
    limit: bytes of a document to read at most, or little more; a plain text
      is one document.
    field: the field with the document, for JSON, CSV and the columnar
      formats; 'a.b' is b in the object a. '' for the first of
      records.FIELDS that there is.

  Raises:
    RequestError: the file is binary, not UTF-8 or not of the format that its
      name says, or a document is not a text.
  """
  kind, packing = _kind(path) or ('', '')
  try:
    with path.open('rb') as file:
      head = file.read(len(LFS_POINTER))
    if head == LFS_POINTER:
      raise RequestError(
        f'data: {path} is a Git LFS pointer; fetch it with git lfs pull'
      )
    if not head:
      return
    if kind in _PLAIN:
      yield _read_plain(path, limit)
      return
    reader = (records.READERS | records.COLUMNAR)[kind]
    for where, record in reader(path, limit, field):
      name, value = records.pick(record, field, where)
      yield _document(value, f'{where}: {name!r}')
  except RequestError:
    raise
  except (*_DAMAGED, ValueError, RuntimeError) as error:
    raise RequestError(
      f'data: {path} is not readable {kind}{packing} text ({error})'
    ) from error
