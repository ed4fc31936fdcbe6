"""Files of JSON, CSV, Parquet and Arrow to records, one at a time."""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re

from ffp_jax.errors import RequestError

# What holds the document if nobody says: the first that is there.
FIELDS = ('text', 'sentence', 'content', 'messages', 'conversations')
_ROWS = 64  # of a columnar file, in memory at once
_CHUNK = 2**18  # bytes of JSON

_JSON = json.JSONDecoder()
_UTF16 = 'UTF-16; convert it: iconv -f UTF-16 -t UTF-8'
# How files begin that are not UTF-8 text, and what helps.
_OTHERS = {
  codecs.BOM_UTF32_LE: 'UTF-32; convert it: iconv -f UTF-32 -t UTF-8',
  codecs.BOM_UTF16_LE: _UTF16,
  codecs.BOM_UTF16_BE: _UTF16,
  b'\x1f\x8b': 'packed by gzip; end its name in .gz',
  b'\x28\xb5\x2f\xfd': 'packed by zstd; end its name in .zst',
  b'\xfd7zXZ\0': 'packed by xz; end its name in .xz',
  b'PK\x03\x04': 'a ZIP archive; unpack it',
  b'%PDF-': 'PDF; convert it to text',
}
_ADVICE = {
  'Invalid \\': 'a backslash in a string is written twice',
  'Invalid control': 'a line end or tab in a string is written \\n or \\t',
  'Expecting value': 'no comma or other text may stand between objects',
  'Expecting property': 'a key is in double quotes, and follows any comma',
}


def _open_zstd(path, mode):
  import pyarrow

  return io.BufferedReader(pyarrow.CompressedInputStream(str(path), 'zstd'))


PACKED = {
  '.gz': gzip.open,
  '.bz2': bz2.open,
  '.xz': lzma.open,
  '.zst': _open_zstd,
}


def open_packed(path):
  """Opens a file as bytes, unpacked as its name says."""
  return PACKED.get(path.suffix.lower(), open)(path, 'rb')


def decoded(path, raw: bytes, *, start=0, final=True) -> str:
  """Returns the text of bytes that begin at byte `start` of a file.

  A byte order mark is dropped.
  """
  for magic, kind in _OTHERS.items():
    if not start and raw.startswith(magic):
      raise RequestError(f'data: {path} is not UTF-8 text but {kind}')
  nul = raw.find(b'\0')
  if nul >= 0:
    raise RequestError(
      f'data: {path} is binary or UTF-16, not UTF-8 text (a NUL at byte '
      f'{start + nul:,})'
    )
  try:
    text = codecs.getincrementaldecoder('utf-8')().decode(raw, final)
  except UnicodeDecodeError as error:
    raise RequestError(
      f'data: {path} is not UTF-8 text (byte {start + error.start:,}); '
      'convert it to UTF-8'
    ) from error
  return text if start else text.removeprefix('\ufeff')


def _too_long(where, limit) -> RequestError:
  return RequestError(
    f'data: {where} is longer than {limit:,} bytes; cut it into documents'
  )


def _chunks(path, limit):
  """Yields text up to the last '}' so far, and whether that is too far away.

  If so, the text goes on for more than `limit` bytes.
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


def _parsed(text, begin, where):
  """Returns a JSON value and its end, or None where the text is torn."""
  try:
    return _JSON.raw_decode(text, begin)
  except json.JSONDecodeError as error:
    # The text ends in '}' or with the file, never within an escape.
    if error.pos >= len(text) or error.msg.startswith('Unterminated'):
      return None
    advice = (x for start, x in _ADVICE.items() if error.msg.startswith(start))
    near = ' '.join(text[max(error.pos - 12, begin) : error.pos + 24].split())
    said = '; '.join([f'{error.msg} near: {near}', *advice])
    raise RequestError(f'data: {where} is not JSON ({said})') from error
  except (ValueError, RecursionError) as error:  # endless numbers, deep lists
    raise RequestError(f'data: {where} is not JSON ({error})') from error


def _json(path, limit, field):
  """Yields the objects of an array, or objects that follow one another."""
  with open_packed(path) as file:
    blank = codecs.BOM_UTF8 + b' \t\r\n'
    array = file.read(_CHUNK).lstrip(blank).startswith(b'[')
  gap = re.compile('[\ufeff \t\r\n' + (r',\[\]]*' if array else ']*'))
  text, line, number = '', 1, 1
  for more, over in _chunks(path, limit):
    text, at = text + more, 0
    while True:
      begin = gap.match(text, at).end()
      line += text.count('\n', at, begin)
      where = f'{path}, ' + (f'object {number:,}, ' if array else '')
      where += f'line {line:,}'
      found = _parsed(text, begin, where) if begin < len(text) else None
      at = found[1] if found else begin
      size = (at if found else len(text)) - begin
      if size > limit or (over and not found):
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
  """Yields the lines of a file, with '\n' at their ends."""
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


def _table(path, limit, field):
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
  """Returns the names in a CSV file's first line, and what parts them.

  That is what its name says, or, with a known name, ',', ';' or a tab.
  """
  usual = '\t,;' if '.tsv' in path.name.lower() else ',;\t'
  try:
    found = [next(csv.reader([line], delimiter=x), []) for x in usual]
  except csv.Error as error:
    raise RequestError(f'data: {path}, line 1: not CSV ({error})') from error
  wanted = {field} if field else set(FIELDS)
  best = max(range(3), key=lambda i: (bool(wanted & {*found[i]}), -i))
  return found[best], usual[best]


def _blank(columns) -> dict:
  """Returns a row of a columnar file without values."""
  import pyarrow

  is_struct = pyarrow.types.is_struct
  return {
    x.name: _blank(x.type) if is_struct(x.type) else None for x in columns
  }


def _column(path, schema, field) -> str:
  """Returns the name of the column that holds the documents."""
  row = _blank(schema)
  name, _ = pick(row, field, path)
  return name if name in row else name.partition('.')[0]


def _parquet(path, limit, field):
  import pyarrow.parquet  # heavy, and only here

  with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
    name = _column(path, file.schema_arrow, field)
    batches = file.iter_batches(_ROWS, columns=[name])
    yield from _cells(path, name, (batch.column(0) for batch in batches))


def _arrow(path, limit, field):
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
  """Returns {'a.b': value} of {'a': {'b': value}}."""
  out = {}
  for name, value in record.items():
    if isinstance(value, dict) and value:
      out |= _flat(value, f'{prefix}{name}.')
    else:
      out[prefix + name] = value
  return out


def pick(record: dict, field, where):
  """Returns the name and the value of the field that holds the document."""
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


# Each yields (file and place in it, dict), given a path, the bytes beyond which
# a record is refused, and the field that will be picked.
READERS = {
  '.json': _json,
  '.jsonl': _json,
  '.ndjson': _json,
  '.csv': _table,
  '.tsv': _table,
}
COLUMNAR = {'.parquet': _parquet, '.arrow': _arrow}
