"""Reading of JSON, CSV, Parquet and Arrow files as records, one at a time.

No file is ever read whole. Every reader yields (file and place in it, record),
given a path, the bytes beyond which a record is refused, and the field that
will be picked.
"""

import codecs
import csv
import itertools
import json
import pathlib
import re
from typing import Any

from ffp_jax.errors import RequestError
from ffp_jax.text.encoded_files import decoded, open_packed

# Names of the field with the document, if none is given; the first is taken.
FIELDS = ('text', 'sentence', 'content', 'messages', 'conversations')
_ROWS = 64  # of a columnar file in memory at once
_CHUNK = 2**18  # bytes of JSON to read at once

_JSON = json.JSONDecoder()
_ADVICE = {
  'Invalid \\': 'a backslash in a string is written twice',
  'Invalid control': 'a line end or tab in a string is written \\n or \\t',
  'Expecting value': 'no comma or other text may stand between objects',
  'Expecting property': 'a key is in double quotes, and follows any comma',
}


def _too_long(where, limit) -> RequestError:
  return RequestError(
    f'data: {where} is longer than {limit:,} bytes; cut it into documents'
  )


def _chunks(path, limit):
  """Yields pieces of a text, each up to the last '}' that was read.

  Yields:
    (text, whether more than `limit` bytes follow without a '}').
  """
  start, raw = 0, b''
  with open_packed(path) as file:
    while more := file.read(_CHUNK):
      raw += more
      cut = raw.rfind(b'}') + 1
      if len(raw) - cut > limit:
        yield decoded(path, raw, start=start, final=False), True
      yield decoded(path, raw[:cut], start=start), False
      start, raw = start + cut, raw[cut:]
    yield decoded(path, raw, start=start), False


def _parse(text, begin, where):
  """Returns a JSON value and its end, or None if the text ends within it."""
  try:
    return _JSON.raw_decode(text, begin)
  except json.JSONDecodeError as error:
    # The text ends with '}' or with the file, never within an escape.
    if error.pos >= len(text) or error.msg.startswith('Unterminated'):
      return None
    advice = (x for start, x in _ADVICE.items() if error.msg.startswith(start))
    near = ' '.join(text[max(error.pos - 12, begin) : error.pos + 24].split())
    problem = '; '.join([f'{error.msg} near: {near}', *advice])
    raise RequestError(f'data: {where} is not JSON ({problem})') from error
  except (ValueError, RecursionError) as error:  # long numbers, deep lists
    raise RequestError(f'data: {where} is not JSON ({error})') from error


def _read_json(path, limit, field):
  """Yields the objects of an array, or of a sequence of objects."""
  with open_packed(path) as file:
    blank = codecs.BOM_UTF8 + b' \t\r\n'
    array = file.read(_CHUNK).lstrip(blank).startswith(b'[')
  gap = re.compile('[\ufeff \t\r\n' + (r',\[\]]*' if array else ']*'))
  text, line, number = '', 1, 1
  for more, is_too_long in _chunks(path, limit):
    text, at = text + more, 0
    while True:
      skipped = gap.match(text, at)
      begin = skipped.end() if skipped else at
      line += text.count('\n', at, begin)
      where = f'{path}, ' + (f'object {number:,}, ' if array else '')
      where += f'line {line:,}'
      found = _parse(text, begin, where) if begin < len(text) else None
      at = found[1] if found else begin
      size = (at if found else len(text)) - begin
      if size > limit or (is_too_long and not found):
        raise _too_long(where, limit)
      if not found:
        break
      if not isinstance(found[0], dict):
        raise RequestError(f'data: {where} is not a JSON object')
      yield where, found[0]
      line += text.count('\n', begin, at)
      number += 1
    text = text[at:]
  if text:
    raise RequestError(f'data: {where} is not JSON (it ends too early)')


def _lines(path, limit):
  r"""Yields the lines of a file, with '\n' at their ends."""
  with open_packed(path) as file:
    start = 0
    for number in itertools.count(1):
      line = file.readline(limit + 1)
      if not line:
        return
      if len(line) > limit:
        raise _too_long(f'{path}, line {number:,}', limit)
      yield decoded(path, line, start=start).replace('\r\n', '\n')
      start += len(line)


def _read_csv(path, limit, field):
  """Yields the rows of a CSV file; the first line names the fields."""
  csv.field_size_limit(limit)
  lines = _lines(path, limit)
  header = next(lines, '')
  names, delimiter = _header(path, header, field)
  pick(dict.fromkeys(names), field, f'{path}, line 1')
  rows = csv.reader(lines, delimiter=delimiter, strict=True)
  while True:
    where = f'{path}, line {rows.line_num + 2:,}'
    try:
      row = next(rows, None)
    except csv.Error as error:
      raise RequestError(
        f'data: {where}: not CSV ({error}); a quote within quotes is written '
        'twice, ""'
      ) from error
    if row is None:
      return
    if any(row[len(names) :]):
      raise RequestError(
        f'data: {where} has {len(row)} cells, the header {len(names)}; put '
        f'text with {delimiter!r} in it in quotes'
      )
    if row:
      missing = itertools.repeat(None, len(names) - len(row))
      yield where, dict(zip(names, [*row, *missing], strict=False))


def _header(path, line, field):
  """Returns the names in a CSV file's first line, and the delimiter.

  The delimiter is the one that the file's name says, unless another of ',',
  ';' and tab gives a field that is known or asked for.
  """
  usual = '\t,;' if '.tsv' in path.name.lower() else ',;\t'
  try:
    found = [next(csv.reader([line], delimiter=x), []) for x in usual]
  except csv.Error as error:
    raise RequestError(f'data: {path}, line 1: not CSV ({error})') from error
  wanted = {field} if field else set(FIELDS)
  best = max(range(3), key=lambda i: (bool(wanted & {*found[i]}), -i))
  return found[best], usual[best]


def _empty_row(columns) -> dict:
  """Returns a row of a columnar file without values."""
  import pyarrow

  is_struct = pyarrow.types.is_struct
  return {
    x.name: _empty_row(x.type) if is_struct(x.type) else None for x in columns
  }


def _column(path, schema, field) -> str:
  """Returns the name of the column with the documents."""
  row = _empty_row(schema)
  name, _ = pick(row, field, path)
  return name if name in row else name.partition('.')[0]


def _read_parquet(path, limit, field):
  import pyarrow.parquet  # slow to import

  with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
    name = _column(path, file.schema_arrow, field)
    batches = file.iter_batches(_ROWS, columns=[name])
    yield from _cells(path, name, (batch.column(0) for batch in batches))


def _read_arrow(path, limit, field):
  import pyarrow.ipc

  with pyarrow.memory_map(str(path)) as source:
    if source.read(6) == b'ARROW1':  # the file format, with random access
      reader = pyarrow.ipc.open_file(source)
      batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
      source.seek(0)
      batches = reader = pyarrow.ipc.open_stream(source)
    name = _column(path, reader.schema, field)
    at = reader.schema.names.index(name)
    yield from _cells(path, name, (batch.column(at) for batch in batches))


def _cells(path, name, columns):
  values = (value.as_py() for column in columns for value in column)
  for number, value in enumerate(values, 1):
    yield f'{path}, row {number:,}', {name: value}


def _flat(record: dict, prefix='') -> dict:
  """Turns {'a': {'b': value}} into {'a.b': value}."""
  out = {}
  for name, value in record.items():
    if isinstance(value, dict) and value:
      out |= _flat(value, f'{prefix}{name}.')
    else:
      out[prefix + name] = value
  return out


def pick(
  record: dict, field: str, where: pathlib.Path | str
) -> tuple[str, Any]:
  """Returns the name and the value of the field with the document.

  Args:
    record: to pick from.
    field: its name, 'a.b' for b in the object a; '' for the first of FIELDS.
    where: file and place, for messages.

  Raises:
    RequestError: the record has no such field.
  """
  wanted = [field] if field else FIELDS
  for name in wanted:
    if name in record:
      return name, record[name]
  flat = _flat(record)
  if field in flat:
    return field, flat[field]
  if field and record.get(field.partition('.')[0], ...) is None:
    return field, None
  names = ', '.join(repr(name[:40]) for name in [*flat][:12])
  raise RequestError(
    f'data: {where} has no field {" or ".join(map(repr, wanted))}; it has '
    f'{names or "none"}; name the one to read (text.field, --field)'
  )


READERS = {
  '.json': _read_json,
  '.jsonl': _read_json,
  '.ndjson': _read_json,
  '.csv': _read_csv,
  '.tsv': _read_csv,
}
COLUMNAR = {'.parquet': _read_parquet, '.arrow': _read_arrow}
