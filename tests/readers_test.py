import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pathlib
import tempfile
import tracemalloc

import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from ffp_jax.errors import RequestError
from ffp_jax.text import readers

_DOCUMENTS = ('First line.\nSecond.', 'Zweites Stück: 日本語 👍🏽', '  third  ')
_LIMIT = 100_000


class _TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def file(self, name, content) -> pathlib.Path:
    path = self.folder / name
    if isinstance(content, str):
      content = content.encode()
    path.write_bytes(gzip.compress(content) if '.gz' in name else content)
    return path

  def read(self, path, limit=_LIMIT):
    return list(readers.read_documents(path, limit))

  def assert_refused(self, path, *words):
    """Expects a RequestError of one line with the path and every word."""
    with self.assertRaises(RequestError) as caught:
      self.read(path)
    message = str(caught.exception)
    self.assertNotIn('\n', message)
    for word in ('data: ', str(path), *words):
      self.assertIn(word, message)


def _columns(path, kind, columns, rows_a_batch=2):
  """Writes {field: values} in a columnar format."""
  table = pyarrow.table(columns)
  if kind == 'parquet':
    # Without compression, so that a row group is as large in the file.
    pyarrow.parquet.write_table(
      table, path, row_group_size=rows_a_batch, compression='none'
    )
    return path
  writer = {'file': pyarrow.ipc.new_file, 'stream': pyarrow.ipc.new_stream}
  with writer[kind](path, table.schema) as sink:
    sink.write_table(table, max_chunksize=rows_a_batch)
  return path


class TextTest(_TestCase):
  def test_is_one_document(self):
    text = '\n\n'.join(_DOCUMENTS)
    self.assertEqual(self.read(self.file('a.txt', text)), [text])

  @parameterized.parameters('a\r\nb\rc\n', '\ufeffa\nb\nc\n')
  def test_line_ends_and_byte_order_mark(self, text):
    self.assertEqual(self.read(self.file('a.txt', text)), ['a\nb\nc\n'])

  @parameterized.parameters('é', '日', '👍')
  def test_a_character_torn_by_the_limit_is_no_error(self, character):
    text = character * 100
    for limit in range(10, 20):
      (got,) = self.read(self.file('a.txt', text), limit)
      self.assertStartsWith(text, got)
      self.assertGreater(len(got.encode()), limit)  # so that a cut is seen

  @parameterized.parameters(
    (b'caf\xe9 noir', 3), ('é日👍'.encode() + b'\xff', 9), (b'a\r\n\xc3', 3),
  )  # fmt: skip
  def test_not_utf8(self, content, byte):
    path = self.file('a.txt', content)
    self.assert_refused(path, 'not UTF-8', f'byte {byte})', 'convert')

  def test_binary(self):
    path = self.file('a.txt', 'é\r\n'.encode() * 1000 + b'\0\xff')
    self.assert_refused(path, 'binary', 'NUL at byte 4,000)')

  @parameterized.parameters('utf-16', 'utf-16-be', 'utf-32')
  def test_another_encoding(self, encoding):
    name = encoding[:6].upper()
    mark = '\ufeff' if encoding == 'utf-16-be' else ''
    for file in ('a.txt', 'a.md.gz', 'a.jsonl', 'a.csv'):
      path = self.file(file, f'{mark}text\nx{{}}\n'.encode(encoding))
      self.assert_refused(path, 'not UTF-8 text', f'iconv -f {name} -t UTF-8')

  def test_utf16_without_a_mark(self):
    path = self.file('a.txt', 'x\n'.encode('utf-16-le'))
    self.assert_refused(path, 'UTF-16', 'NUL at byte 1)')

  @parameterized.parameters(
    (gzip.compress(b'a'), '.gz'), (lzma.compress(b'a'), '.xz'),
    (pyarrow.compress(b'a', 'zstd', asbytes=True), '.zst'),
    (b'PK\3\4', 'ZIP'), (b'%PDF-1.7', 'PDF'),
  )  # fmt: skip
  def test_a_name_that_says_less(self, content, word):
    for name in ('a.txt', 'a.jsonl', 'a.tsv'):
      self.assert_refused(self.file(name, content), 'not UTF-8 text but', word)

  def test_a_directory_of_that_name_is_not_read_as_a_file(self):
    (self.folder / 'a.txt').mkdir()
    self.assert_refused(self.folder / 'a.txt', 'not readable .txt')


class JsonLinesTest(_TestCase):
  @parameterized.product(
    name=('a.jsonl', 'a.jsonl.gz', 'c4.00-of-01.json.gz'),
    ascii_only=(False, True),
    end=('\n', '\r\n', '\n \n\n'),
  )
  def test_documents(self, name, ascii_only, end):
    lines = (
      json.dumps({'url': 'u', 'text': x}, ensure_ascii=ascii_only)
      for x in _DOCUMENTS
    )
    path = self.file(name, end.join(lines))
    self.assertEqual(self.read(path), list(_DOCUMENTS))

  @parameterized.parameters('\u2028', '\u2029', '\x85')
  def test_strings_may_hold_unicode_line_ends(self, end):
    # JSON needs escapes below U+0020 only; these are common in web text.
    line = json.dumps({'text': f'one{end}line'}, ensure_ascii=False)
    path = self.file('a.jsonl', f'{line}\n{line}')
    self.assertEqual(self.read(path), [f'one{end}line'] * 2)

  def test_sentence_where_there_is_no_text(self):
    path = self.file('a.jsonl', '{"sentence": "a"}\n{"sentence":1,"text":"b"}')
    self.assertEqual(self.read(path), ['a', 'b'])

  @parameterized.parameters(
    ('no json', 'line 2 is not JSON'),
    ('{"text": ', 'line 2 is not JSON'),
    ('[' * 100_000, 'line 2 is'),
    ('["text"]', 'line 2 is not a JSON object'),
    ('"text"', 'line 2 is not a JSON object'),
    ('7', 'line 2 is not a JSON object'),
    ('{}', 'it has none'),
    ('{"body": "a", "id": 1}', "line 2 has no field 'text' or 'sentence' or ",
     "; it has 'body', 'id'; name the one to read (text.field, --field)"),
    ('{"data": {"text": "a", "n": {"m": 1}}}',
     "it has 'data.text', 'data.n.m'"),
    ('{"text": 3}', "line 2: 'text' is int, not text"),
    ('{"text": [1]}', "line 2: 'text' is list, not text"),
    ('{"messages": [{"role": "a"}]}', "line 2: 'messages' is list, not text"),
    ('{"messages": [{"content": 7}]}', "line 2: 'messages' is int, not text"),
    (r'{"text": "\ud83d"}', r"line 2: 'text' has \ud83d, half of a surrogate"),
    ('{"text": "a"},', 'line 2 is not JSON', 'no comma'),
    ('{"text": "a",}', 'line 2 is not JSON', 'follows any comma'),
    ("{'text': 'a'}", 'line 2 is not JSON', 'double quotes'),
    (r'{"text": "C:\data"}', r'line 2 is not JSON (Invalid \escape near: ',
     r'C:\data"', 'backslash in a string is written twice'),
    (r'{"text": "C:\users"}', 'line 2 is not JSON', 'backslash'),
    ('{"text": "a\tb"}', 'line 2 is not JSON', r'is written \n or \t'),
    ('{"text": "a"\n{"text": "b"}', 'line 2 is not JSON'),
    ('{"n": ' + '1' * 5000 + '}', 'line 2 is not JSON'),
    ('{"text":' * 100_000, 'line 2 is not JSON'),
    ('{"text": "\0"}', 'NUL at byte 25)'),
    (b'{"text": "\xe9"}', 'not UTF-8', 'byte 25)'),
    ('{"text": "' + 'a' * _LIMIT + '"}', 'line 2 is longer than 100,000 bytes'),
  )  # fmt: skip
  def test_bad_lines(self, line, *words):
    line = line.encode() if isinstance(line, str) else line
    for name in ('a.jsonl', 'a.jsonl.gz'):
      path = self.file(name, '{"text": "é"}\n'.encode() + line)
      self.assert_refused(path, *words)

  def test_broken_gzip(self):
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, content in {
      'plain.jsonl.gz': b'{"text": "a"}\n',
      'torn.jsonl.gz': packed[: len(packed) // 2],
      'body.json.gz': packed[:20] + b'\xff' * 20 + packed[40:],
    }.items():
      path = self.folder / name
      path.write_bytes(content)
      self.assert_refused(path, 'not readable')


class ColumnsTest(_TestCase):
  @parameterized.parameters('parquet', 'file', 'stream')
  def test_documents(self, kind):
    path = self.folder / ('a.parquet' if kind == 'parquet' else 'a.arrow')
    long = pyarrow.array(_DOCUMENTS, pyarrow.large_string())
    shared = pyarrow.array(_DOCUMENTS).dictionary_encode()
    raw = [x.encode() for x in _DOCUMENTS]
    large = pyarrow.array(raw, pyarrow.large_binary())
    view = pyarrow.array(_DOCUMENTS, pyarrow.string_view())
    for field in ('text', 'sentence'):
      for values in (list(_DOCUMENTS), long, shared, raw, large, view):
        _columns(path, kind, {'id': [1, 2, 3], field: values})
        self.assertEqual(self.read(path), list(_DOCUMENTS))

  @parameterized.parameters('parquet', 'file', 'stream')
  def test_without_text(self, kind):
    path = self.folder / ('a.parquet' if kind == 'parquet' else 'a.arrow')
    for columns, words in (
      ({'body': ['a'], 'id': [1]}, "it has 'body', 'id'"),
      ({'data': [{'text': 'a', 'n': 1}]}, "it has 'data.text', 'data.n'"),
      ({'text': [1, 2]}, "row 1: 'text' is int, not text"),
      ({'text': [b'a', b'\xe9']}, "row 2: 'text' is not UTF-8 text (byte 0)"),
      ({'text': [['a', 'b']]}, "row 1: 'text' is list, not text"),
    ):
      _columns(path, kind, columns)
      self.assert_refused(path, words)

  @parameterized.parameters('a.parquet', 'a.arrow')
  def test_of_another_format(self, name):
    for content in (bytes(range(256)) * 8, b'ARROW1\0\0', b'PAR1' * 3, b'x'):
      self.assert_refused(self.file(name, content), 'not readable')

  @parameterized.parameters('parquet', 'file', 'stream')
  def test_truncated(self, kind):
    path = self.folder / ('a.parquet' if kind == 'parquet' else 'a.arrow')
    _columns(path, kind, {'text': [str(i) * 100 for i in range(100)]})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    self.assert_refused(path, 'not readable')


_PACK = {
  'gz': gzip.compress,
  'bz2': bz2.compress,
  'xz': lzma.compress,
  'zst': lambda raw: bytes(_zstd(raw)),
}


def _zstd(raw):
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, 'zstd') as out:
    out.write(raw)
  return sink.getvalue()


def _csv(rows, delimiter=',', end='\r\n'):
  sink = io.StringIO()
  csv.writer(sink, delimiter=delimiter, lineterminator=end).writerows(rows)
  return sink.getvalue()


class JsonTest(_TestCase):
  @parameterized.product(
    name=('a.json', 'a.jsonl', 'a.JSON', 'a.ndjson', 'a.json.gz'),
    indent=(None, 2),
    mark=('', '\ufeff'),
  )
  def test_array(self, name, indent, mark):
    records = [{'id': [{}], 'text': x} for x in _DOCUMENTS]
    content = mark + json.dumps(records, indent=indent, ensure_ascii=False)
    self.assertEqual(self.read(self.file(name, content)), [*_DOCUMENTS])

  @parameterized.parameters(2, None)
  def test_objects_that_follow_one_another(self, indent):
    lines = [json.dumps({'text': x}, indent=indent) for x in _DOCUMENTS]
    path = self.file('a.json', '\n'.join(lines))
    self.assertEqual(self.read(path), [*_DOCUMENTS])

  def test_byte_order_marks_of_files_put_together(self):
    path = self.file(
      'a.jsonl', '\ufeff{"text": "a"}\n\ufeff{"text": "\ufeffb"}'
    )
    self.assertEqual(self.read(path), ['a', '\ufeffb'])

  def test_array_larger_than_what_is_read_at_once(self):
    texts = [f'é}}{i}' * 5000 for i in range(60)]
    for dump in (
      json.dumps([{'text': x} for x in texts], ensure_ascii=False),
      '\n'.join(json.dumps({'text': x}, ensure_ascii=False) for x in texts),
    ):
      self.assertGreater(len(dump), 4 * 2**18)
      self.assertEqual(self.read(self.file('a.json', dump)), texts)

  @parameterized.parameters(
    ('[{"text": "a"},\n{"text": "b', 'object 2, line 2 is not JSON'),
    ('[{"text": "a"},\n{"text": 3}]', "object 2, line 2: 'text' is int"),
    ('[{"text": "a"}, "b"]', 'object 2, line 1 is not a JSON object'),
    ('[{"text": "a"}, {"body": "b"}]', "object 2, line 1 has no field"),
    ('[{"text": "a" "b"}]', 'object 1, line 1 is not JSON'),
  )  # fmt: skip
  def test_bad_array(self, content, *words):
    self.assert_refused(self.file('a.json', content), *words)

  def test_empty(self):
    for content in ('[]', '[\n]\n', '\n'):
      self.assertEmpty(self.read(self.file('a.json', content)))


class TableTest(_TestCase):
  texts = ('a "word", two', 'line\nline; \tend', '', *_DOCUMENTS)

  @parameterized.product(
    name=('a.csv', 'a.tsv', 'A.CSV', 'a.csv.gz'),
    delimiter=(',', ';', '\t'),
    mark=('', '\ufeff'),
    end=('\r\n', '\n'),
  )
  def test_rows(self, name, delimiter, mark, end):
    rows = [['id', 'text'], *([i, x] for i, x in enumerate(self.texts))]
    path = self.file(name, mark + _csv(rows, delimiter, end))
    self.assertEqual(self.read(path), [*self.texts])

  def test_one_column(self):
    content = 'text\nsome, words\n'
    self.assertEqual(self.read(self.file('a.tsv', content)), ['some, words'])

  def test_short_and_blank_rows(self):
    path = self.file('a.csv', 'id,text\n1,a\n\n2\n3,\n4,b,\n')
    self.assertEqual(self.read(path), ['a', None, '', 'b'])

  @parameterized.parameters(
    ('words\nmore\n', 'line 1 has no field', "it has 'words'"),
    ('text\nok\na, b\n', 'line 3 has 2 cells, the header 1', 'in quotes'),
    ('text\n"a\nb"\n"c\nd\n', 'line 4: not CSV', 'twice, ""'),
    ('text\n"a \\"b\\" c"\n', 'line 2: not CSV', 'twice, ""'),
    ('text\n' + 'a' * _LIMIT + 'a\n', 'line 2 is longer than 100,000 bytes'),
    (b'text\ncaf\xe9\n', 'not UTF-8 text (byte 8)'),
    ('text\na\0\n', 'NUL at byte 6)'),
  )  # fmt: skip
  def test_bad(self, content, *words):
    self.assert_refused(self.file('a.csv', content), *words)


class FieldTest(_TestCase):
  def test_known_names_in_order(self):
    names = ('text', 'sentence', 'content')
    for i, name in enumerate(names):
      columns = {x: [x] for x in reversed(names[i:])}
      row = {x: x for x in columns}
      paths = (
        self.file('a.jsonl', json.dumps(row)),
        self.file('a.csv', _csv([row, row.values()])),
        _columns(self.folder / 'a.parquet', 'parquet', columns),
        _columns(self.folder / 'a.arrow', 'file', columns),
      )
      for path in paths:
        self.assertEqual(self.read(path), [name])

  def test_another(self):
    columns = {'text': ['a'], 'body': ['b'], 'data': [{'x': {'y': 'c'}}]}
    row = {'text': 'a', 'body': 'b', 'data': {'x': {'y': 'c'}}}
    for path in (
      self.file('a.jsonl', json.dumps(row)),
      self.file('a.csv', 'text,body,data.x.y\na,b,c\n'),
      _columns(self.folder / 'a.parquet', 'parquet', columns),
      _columns(self.folder / 'a.arrow', 'stream', columns),
    ):
      for field, want in (('body', 'b'), ('data.x.y', 'c')):
        self.assertEqual([*readers.read_documents(path, _LIMIT, field)], [want])
      with self.assertRaisesRegex(RequestError, "has no field 'no'; it has"):
        [*readers.read_documents(path, _LIMIT, 'no')]

  def test_a_parent_that_is_null(self):
    path = self.file('a.jsonl', '{"data": null}\n{"data": {"body": "b"}}')
    self.assertEqual(
      [*readers.read_documents(path, _LIMIT, 'data.body')], [None, 'b']
    )

  def test_a_plain_text_has_none(self):
    path = self.file('a.txt', 'a')
    self.assertEqual([*readers.read_documents(path, _LIMIT, 'body')], ['a'])

  def test_null(self):
    columns = {'text': [None, 'a', '', None]}
    for path in (
      self.file(
        'a.jsonl', '\n'.join(json.dumps({'text': x}) for x in columns['text'])
      ),
      _columns(self.folder / 'a.parquet', 'parquet', columns),
      _columns(self.folder / 'a.arrow', 'file', columns),
    ):
      self.assertEqual(self.read(path), [None, 'a', '', None])


class ChatTest(_TestCase):
  @parameterized.parameters(
    ('messages', 'role', 'content'), ('conversations', 'from', 'value')
  )
  def test_joined(self, field, who, said):
    chat = [{who: 'user', said: 'a\nb'}, {who: 'x', said: 'c'}]
    rows = [chat, [], None, [{who: 'user', said: None}, {who: 'x', said: 'd'}]]
    want = ['a\nb\n\nc', None, None, 'd']
    path = self.file('a.jsonl', '\n'.join(json.dumps({field: x}) for x in rows))
    self.assertEqual(self.read(path), want)
    _columns(self.folder / 'a.parquet', 'parquet', {field: rows})
    self.assertEqual(self.read(self.folder / 'a.parquet'), want)

  def test_parts_of_a_message(self):
    parts = [{'type': 'text', 'text': 'a'}, {'type': 'image_url', 'image': {}}]
    chat = [
      {'role': 'user', 'content': [*parts, {'type': 'text', 'text': 'b'}]},
      {'role': 'assistant', 'content': 'c'},
    ]
    path = self.file('a.json', json.dumps([{'messages': chat}]))
    self.assertEqual(self.read(path), ['a\n\nb\n\nc'])


class PackedTest(_TestCase):
  @parameterized.parameters(*_PACK)
  def test_every_format(self, packing):
    for kind, content, want in (
      ('txt', 'é\r\nb', ['é\nb']),
      ('md', '\ufeff# a', ['# a']),
      ('jsonl', '{"text": "a"}\n{"text": "b"}', ['a', 'b']),
      ('json', '[{"text": "a"}, {"text": "b"}]', ['a', 'b']),
      ('csv', 'text\na\nb\n', ['a', 'b']),
      ('tsv', 'text\tid\na\t1\n', ['a']),
    ):
      for name in (f'a.{kind}.{packing}', f'A.{kind}.{packing}'.upper()):
        path = self.folder / name
        path.write_bytes(_PACK[packing](content.encode()))
        self.assertEqual(readers.list_files(path), [path])
        self.assertEqual(self.read(path), want)

  @parameterized.product(
    packing=tuple(_PACK), kind=('txt', 'jsonl', 'csv'), whole=(True, False)
  )
  def test_broken(self, packing, kind, whole):
    content = b'text\n' + bytes(f'{[*range(3000)]}', 'utf-8')
    packed = _PACK[packing](content)
    path = self.folder / f'a.{kind}.{packing}'
    path.write_bytes(content if whole else packed[: len(packed) // 2])
    self.assert_refused(path, f'not readable .{kind}.{packing}')


class PointerTest(_TestCase):
  @parameterized.parameters(
    'a.txt', 'a.md', 'a.jsonl', 'a.json', 'a.csv', 'a.parquet', 'A.ARROW',
    'a.txt.gz', 'a.jsonl.zst',
  )  # fmt: skip
  def test_of_git_lfs(self, name):
    path = self.folder / name
    path.write_text(
      'version https://git-lfs.github.com/spec/v1\noid sha256:a\n'
    )
    self.assert_refused(path, 'is a Git LFS pointer', 'git lfs pull')


class MemoryTest(_TestCase):
  """Checks that no more is read than needed, with files that are too large."""

  def peak(self, call):
    """Returns Python's peak memory in bytes, or pyarrow's at the end."""
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
      call()
      python = tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()
    return max(python, pyarrow.total_allocated_bytes() - before)

  def test_text(self):
    path = self.file('a.txt', 'some words\n' * 30_000)
    os.truncate(path, 2**40)  # a hole; it would be refused as binary too
    limit = 100_000
    self.assertLess(self.peak(lambda: self.read(path, limit)), 20 * limit)

  @parameterized.parameters('a.jsonl.gz', 'a.json.gz')
  def test_lines_of_a_gzip_bomb(self, name):
    member = gzip.compress(b'{"text": "some words"}\n' * 50_000)
    path = self.folder / name
    path.write_bytes(member * 200)  # 230 MB
    reader = readers.read_documents(path, 100_000)
    self.assertLess(
      self.peak(lambda: [next(reader) for _ in range(1000)]), 2**21
    )

  def test_one_array_in_one_line(self):
    path = self.folder / 'a.json.gz'
    member = gzip.compress(b'{"text": "some words"},' * 50_000)
    path.write_bytes(gzip.compress(b'[') + member * 200)
    reader = readers.read_documents(path, 100_000)
    self.assertLess(
      self.peak(lambda: [next(reader) for _ in range(1000)]), 2**21
    )

  @parameterized.parameters('', '"')
  def test_one_row_of_a_gzip_bomb(self, quote):
    path = self.folder / 'a.csv.gz'
    member = gzip.compress((b'a' * 1023 + b'\n' if quote else b'a') * 2**10)
    start = gzip.compress(f'text\n{quote}'.encode())
    path.write_bytes(start + member * 1000)
    self.assertLess(
      self.peak(lambda: self.assert_refused(path, 'line 2')), 2**22
    )

  def test_one_line_of_a_gzip_bomb(self):
    path = self.folder / 'a.jsonl.gz'
    member = gzip.compress(b'a' * 2**20)
    path.write_bytes(gzip.compress(b'{"text": "') + member * 1000)
    self.assertLess(
      self.peak(lambda: self.assert_refused(path, 'line 1 is longer')), 2**22
    )

  @parameterized.parameters('parquet', 'file', 'stream')
  def test_columns(self, kind):
    # One row group of 100 MB.
    path = self.folder / ('a.parquet' if kind == 'parquet' else 'a.arrow')
    texts = [f'{i} ' * 500 for i in range(40_000)]
    _columns(path, kind, {'text': texts}, rows_a_batch=40_000)
    reader = readers.read_documents(path, 100_000)
    peak = self.peak(
      lambda: self.assertEqual([next(reader) for _ in range(100)], texts[:100])
    )
    self.assertLess(peak, 2**24)


class FilesTest(_TestCase):
  def test_a_file(self):
    for name in ('a.txt', 'b.c.json.gz', 'A.TXT', 'c.Md.GZ', 'd.PARQUET'):
      path = self.file(name, 'x')
      self.assertEqual(readers.list_files(path), [path])

  @parameterized.parameters(
    'a.docx', 'a', 'a.parquet.gz', '.txt', '.txt.gz', 'a.gz', 'a.txt.zip',
    'atxt',
  )  # fmt: skip
  def test_another_format(self, name):
    self.assertEqual(readers.list_files(self.file(name, 'x')), [])

  def test_directory(self):
    for name in ('b.txt', 'a.parquet', 'c.json.gz', 'B.jsonl', 'd.txt.bak',
                 '.hidden.txt', 'README', 'state.json', '.txt'):  # fmt: skip
      self.file(name, 'x')
    (self.folder / 'e.txt').mkdir()
    self.assertEqual(
      [path.name for path in readers.list_files(self.folder)],
      ['B.jsonl', 'a.parquet', 'b.txt', 'c.json.gz'],
    )

  @parameterized.parameters((), ('.a.txt',), ('a.html', 'README.md'))
  def test_directory_without_any(self, *names):
    for name in names:
      self.file(name, 'x')
    with self.assertRaisesRegex(
      RequestError, rf'\Adata: {self.folder} is a directory without [^\n]*\Z'
    ):
      readers.list_files(self.folder)

  @parameterized.parameters('a.txt', 'b/c.jsonl', 'a' * 300 + '.txt')
  def test_missing(self, name):
    with self.assertRaisesRegex(RequestError, rf'\Adata: [^\n]*{name}[^\n]*\Z'):
      readers.list_files(self.folder / name)

  def test_a_pipe_is_not_waited_for(self):
    os.mkfifo(self.folder / 'a.txt')
    with self.assertRaisesRegex(RequestError, 'no file'):
      readers.list_files(self.folder / 'a.txt')


if __name__ == '__main__':
  absltest.main()
