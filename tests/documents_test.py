import gzip
import json
import os
import pathlib
import tempfile
import tracemalloc

import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from ffp_jax import documents
from ffp_jax.config import RequestError

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
    return list(documents.read(path, limit))

  def assert_refused(self, path, *words):
    """RequestError of one line, with the path and every word in it."""
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
    # So that a row group is as large in the file.
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

  def test_another_encoding(self):
    path = self.file('a.txt', 'x\n'.encode('utf-16'))
    self.assert_refused(path, 'not UTF-8 text')

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
    # JSON asks for escapes below U+0020 only; these are common in web text.
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
    ('{"content": "a", "id": 1}', "line 2 has no field 'text' or 'sentence'; "
     "it has 'content', 'id'"),
    ('{"text": 3}', 'document 2 is int, not text'),
    ('{"text": null}', 'document 2 is missing'),
    (r'{"text": "\ud83d"}', 'surrogates'),
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
    for field in ('text', 'sentence'):
      for values in (list(_DOCUMENTS), long, shared):
        _columns(path, kind, {'id': [1, 2, 3], field: values})
        self.assertEqual(self.read(path), list(_DOCUMENTS))

  @parameterized.parameters('parquet', 'file', 'stream')
  def test_without_text(self, kind):
    path = self.folder / ('a.parquet' if kind == 'parquet' else 'a.arrow')
    for columns, words in (
      ({'content': ['a'], 'id': [1]}, "it has 'content', 'id'"),
      ({'text': ['a', None]}, 'document 2 is missing'),
      ({'text': [1, 2]}, 'document 1 is int, not text'),
      ({'text': [b'a']}, 'document 1 is bytes, not text'),
      ({'text': [['a', 'b']]}, 'document 1 is list, not text'),
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


class MemoryTest(_TestCase):
  """No more is read than asked for: the rest is too large to be read."""

  def peak(self, call):
    """Bytes of Python's memory at most, or of pyarrow's at the end."""
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
    reader = documents.read(path, 100_000)
    self.assertLess(
      self.peak(lambda: [next(reader) for _ in range(1000)]), 2**21
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
    reader = documents.read(path, 100_000)
    peak = self.peak(
      lambda: self.assertEqual([next(reader) for _ in range(100)], texts[:100])
    )
    self.assertLess(peak, 2**24)


class FilesTest(_TestCase):
  def test_a_file(self):
    for name in ('a.txt', 'b.c.json.gz'):
      path = self.file(name, 'x')
      self.assertEqual(documents.files(path), [path])

  @parameterized.parameters('a.csv', 'a', 'a.txt.gz', '.txt', 'a.json', 'atxt')
  def test_another_format(self, name):
    self.assertEqual(documents.files(self.file(name, 'x')), [])

  def test_directory(self):
    for name in ('b.txt', 'a.parquet', 'c.json.gz', 'B.jsonl', 'd.txt.bak',
                 '.hidden.txt', 'README', 'state.json', '.txt'):  # fmt: skip
      self.file(name, 'x')
    (self.folder / 'e.txt').mkdir()
    self.assertEqual(
      [path.name for path in documents.files(self.folder)],
      ['B.jsonl', 'a.parquet', 'b.txt', 'c.json.gz'],
    )

  @parameterized.parameters((), ('.a.txt',), ('a.csv', 'b.json'))
  def test_directory_without_any(self, *names):
    for name in names:
      self.file(name, 'x')
    with self.assertRaisesRegex(
      RequestError, rf'\Adata: {self.folder} is a directory without [^\n]*\Z'
    ):
      documents.files(self.folder)

  @parameterized.parameters('a.txt', 'b/c.jsonl', 'a' * 300 + '.txt')
  def test_missing(self, name):
    with self.assertRaisesRegex(RequestError, rf'\Adata: [^\n]*{name}[^\n]*\Z'):
      documents.files(self.folder / name)

  def test_a_pipe_is_not_waited_for(self):
    os.mkfifo(self.folder / 'a.txt')
    with self.assertRaisesRegex(RequestError, 'no file'):
      documents.files(self.folder / 'a.txt')


if __name__ == '__main__':
  absltest.main()
