"""Text files to documents, one at a time; no file is ever read whole."""

import lzma
import pathlib
import zlib
from collections.abc import Iterator

from ffp_jax.errors import RequestError
from ffp_jax.text import records

_SAID = ('content', 'value', 'text')  # in a message of a chat

# Of a data set of the hub, or of what `datasets` saves: about it, not of it.
_ABOUT = (
  *('readme.md', 'readme.txt', 'license.md', 'license.txt', 'state.json'),
  *('dataset_info.json', 'dataset_infos.json', 'dataset_dict.json'),
)
# With ValueError and RuntimeError, what unpackers, pyarrow and codecs raise.
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
_POINTER = b'version https://git-lfs'
_PLAIN = ('.txt', '.md')
FORMATS = (
  f'{", ".join([*_PLAIN, *records.READERS])} (or packed: '
  f'{", ".join(records.PACKED)}), {", ".join(records.COLUMNAR)}'
)


def _kind(path: pathlib.Path) -> tuple[str, str] | None:
  """Returns a file's format and packing by its name, None for no text."""
  *_, inner, last = '', '', *(suffix.lower() for suffix in path.suffixes)
  if last in records.PACKED:
    return (inner, last) if inner in (*_PLAIN, *records.READERS) else None
  known = (*_PLAIN, *records.READERS, *records.COLUMNAR)
  return (last, '') if last in known else None


def list_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the text files that a path stands for, by name.

  Args:
    path: a file of one of FORMATS, or a directory, of which files of other
      formats, hidden ones, those about a data set and subdirectories are
      left out.

  Raises:
    RequestError: there is no such file.
  """
  try:
    if path.is_dir():
      found = sorted(x for x in path.iterdir() if _kind(x) and x.is_file())
      found = [
        x
        for x in found
        if not x.name.startswith('.') and x.name.lower() not in _ABOUT
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


def _plain(path, limit) -> str:
  with records.open_packed(path) as file:
    # Twice, as a line end may shrink from two bytes to one; four more, as the
    # last character may be torn.
    raw = file.read(2 * limit + 4)
    text = records.decoded(path, raw, final=not file.read(1))
  return text.replace('\r\n', '\n').replace('\r', '\n')


def _document(value, where) -> str | None:
  """Returns a field's text; of a chat, its messages with blank lines between.

  Args:
    value: text, UTF-8 bytes, a chat (a list of objects), or None.
    where: file, place and field.
  """
  if isinstance(value, bytes):
    value = records.decoded(where, value)
  if isinstance(value, list) and all(isinstance(x, dict) for x in value):
    said = [[x[key] for key in _SAID if key in x] for x in value]
    if any(said) or not value:
      parts = (_document(x[0], where) for x in said if x)
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
  """Yields the documents of a file, lazily; None for those that are null.

  Args:
    path: one of `files`. JSON is an array of objects, or objects that follow
      one another; the first line of CSV names the fields.
    limit: bytes beyond which a document is of no use; a plain text is one
      document, of which little more is read.
    field: of JSON, CSV and the columnar formats, what holds the document;
      'a.b' is b in the object a. '' for the first of records.FIELDS.

  Raises:
    RequestError: binary, not UTF-8, not of the format its name says, or a
      document is not a text.
  """
  kind, packing = _kind(path)
  try:
    with path.open('rb') as file:
      head = file.read(len(_POINTER))
    if head == _POINTER:
      raise RequestError(
        f'data: {path} is a Git LFS pointer; fetch it with git lfs pull'
      )
    if not head:
      return
    if kind in _PLAIN:
      yield _plain(path, limit)
      return
    reader = (records.READERS | records.COLUMNAR)[kind]
    for where, record in reader(path, limit, field):
      name, value = records.pick(record, field, where)
      yield _document(value, f'{where}: {name!r}')
  except RequestError:
    raise
  except (*_BROKEN, ValueError, RuntimeError) as error:
    raise RequestError(
      f'data: {path} is not readable {kind}{packing} text ({error})'
    ) from error
