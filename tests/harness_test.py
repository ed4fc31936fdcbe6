import functools
import json
import pathlib
import tempfile
from unittest import mock

import lm_eval
import numpy as np
import torch
import transformers
from absl.testing import absltest, parameterized
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ffp_jax import evaluate, export
from ffp_jax.checkpoints import model_config, weights
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import harness, harness_model
from ffp_jax.text import tokenization
from tests import testing, tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_LENGTH = 40  # of contexts, shorter than some requests
# What the tasks have in common: examples in a file beside them, no network.
_EXAMPLES = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{file}.jsonl
test_split: test
fewshot_split: test
"""
_TASKS = {
  # Choices of different lengths; the first question is empty.
  'choice': (
    'questions',
    """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
  ),
  'rolling': (
    'texts',
    """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
  ),
  'writing': (
    'questions',
    """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["e", "\\\\n"]
  max_gen_toks: 9
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: chrf
""",
  ),
}


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _words(source, count):
  text = tiny_run.text().split()
  start = source.integers(len(text) - count)
  return ' '.join(text[start : start + count])


@functools.cache
def _folder() -> pathlib.Path:
  """A model, and tasks with their examples."""
  folder = pathlib.Path(_FOLDER.name)
  tiny_run.write_model(folder / 'model')
  path = folder / 'model' / 'tokenizer_config.json'
  ends = {'eos_token': '!', 'bos_token': '"', 'pad_token': '#'}
  path.write_text(json.dumps(json.loads(path.read_text()) | ends))
  source = np.random.default_rng(0)
  questions = [
    {
      'question': _words(source, source.integers(1, 20)) if i else '',
      'choices': [' ' + _words(source, 1 + j) for j in range(3)],
      'answer': i % 3,
    }
    for i in range(12)
  ]
  texts = [{'text': _words(source, 2 + 25 * i)} for i in range(4)]
  for name, lines in ('questions', questions), ('texts', texts):
    text = '\n'.join(map(json.dumps, lines))
    (folder / f'{name}.jsonl').write_text(text)
  for name, (file, rest) in _TASKS.items():
    head = _EXAMPLES.format(name=name, folder=folder, file=file)
    (folder / f'{name}.yaml').write_text(head + rest)
  return folder


def _task(name) -> str:
  return str(_folder() / f'{name}.yaml')


def _tokenizer():
  return tokenization.load_tokenizer(_folder() / 'model')


@functools.cache
def _ours(batch_tokens=200) -> harness_model.JaxLM:
  directory = _folder() / 'model'
  config = model_config.read_model_config(directory)
  params = weights.load_params(directory, config, np.float32)
  return harness_model.JaxLM(
    params,
    config,
    _tokenizer(),
    max_length=_LENGTH,
    batch_tokens=batch_tokens,
  )


@functools.cache
def _theirs() -> HFLM:
  torch.set_num_threads(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    _folder() / 'model', dtype=torch.float32
  )
  return HFLM(model, tokenizer=_tokenizer(), batch_size=3, max_length=_LENGTH)


def _instances(kind, args):
  return [Instance(kind, {}, each, i) for i, each in enumerate(args)]


class AgainstTorchTest(parameterized.TestCase):
  """The same numbers as the harness's own Hugging Face adapter."""

  @parameterized.parameters(
    ('choice', None), ('choice', 2), ('rolling', None), ('writing', 2)
  )
  def test_task(self, name, fewshot):
    loaded = harness.load_tasks([_task(name)], _tokenizer(), fewshot)
    ours = harness.score_tasks(_ours(), loaded, None)[name]
    theirs = lm_eval.simple_evaluate(
      _theirs(),
      tasks=[_task(name)],
      num_fewshot=fewshot,
      bootstrap_iters=0,
      task_manager=TaskManager(include_defaults=False),
    )
    expected = theirs['results'][name]
    metrics = [key for key in expected if key.endswith(',none')]
    self.assertNotEmpty(metrics)
    for key in metrics:
      if 'stderr' not in key:
        got = ours[key.removesuffix(',none')]
        self.assertGreater(got, 0.0)
        self.assertAlmostEqual(got / expected[key], 1.0, delta=1e-5)
    self.assertEqual(ours['fewshot'], fewshot or 0)
    self.assertEqual(ours['examples'], 4 if name == 'rolling' else 12)

  def test_loglikelihood(self):
    source = np.random.default_rng(1)
    pairs = [
      (_words(source, count) if count else '', ' ' + _words(source, 1 + i % 4))
      for i, count in enumerate((3, 0, 40, 1, 9, 0, 90, 2, 20, 5))
    ]
    # What the model itself goes on with is likeliest, token by token.
    (said,) = _ours().generate_until(
      _instances('generate_until', [(pairs[0][0], {'max_gen_toks': 3})])
    )
    pairs.append((pairs[0][0], said))
    requests = _instances('loglikelihood', pairs)
    ours = _ours().loglikelihood(requests, disable_tqdm=True)
    theirs = _theirs().loglikelihood(requests, disable_tqdm=True)
    for (total, hit), (expected, expected_hit) in zip(
      ours, theirs, strict=True
    ):
      self.assertAlmostEqual(total, expected, delta=1e-4)
      self.assertEqual(hit, expected_hit)
    self.assertTrue(ours[-1][1])
    self.assertFalse(all(hit for _, hit in ours))

  def test_rolling_beyond_the_context(self):
    source = np.random.default_rng(2)
    texts = [(_words(source, count),) for count in (1, 8, 30, 100)]
    lengths = [len(_ours().tok_encode(text)) for (text,) in texts]
    self.assertLess(min(lengths), _LENGTH)
    self.assertGreater(max(lengths), 2 * _LENGTH)
    requests = _instances('loglikelihood_rolling', texts)
    np.testing.assert_allclose(
      _ours().loglikelihood_rolling(requests, disable_tqdm=True),
      _theirs().loglikelihood_rolling(requests, disable_tqdm=True),
      rtol=1e-5,
    )

  def test_generation(self):
    source = np.random.default_rng(3)
    prompts = [_words(source, count) for count in (1, 30, 4, 60, 9, 2, 15, 7)]
    settings = (
      {'until': ['e', '\n'], 'max_gen_toks': 12},
      {'until': [], 'max_gen_toks': 5, 'do_sample': False, 'top_p': 1.0},
    )
    args = [(p, settings[i % 2]) for i, p in enumerate(prompts)]
    requests = _instances('generate_until', args)
    ours = _ours().generate_until(requests, disable_tqdm=True)
    theirs = _theirs().generate_until(requests, disable_tqdm=True)
    self.assertEqual(ours, theirs)
    self.assertGreater(len(set(ours)), 4)

  def test_several_end_tokens(self):
    source = np.random.default_rng(3)
    prompts = [_words(source, count) for count in (1, 30, 4, 60, 9, 2, 15, 7)]
    settings = {'until': [], 'max_gen_toks': 12}
    requests = _instances('generate_until', [(p, settings) for p in prompts])
    free = _ours().generate_until(requests, disable_tqdm=True)
    model = _theirs()._model
    ends = set()
    for at in (0, 2):  # the fifth token of what follows
      ids = torch.tensor([_ours().tok_encode(prompts[at])])
      said = model.generate(ids, max_new_tokens=5, do_sample=False)
      ends.add(int(said[0, -1]))
    self.assertLen(ends, 2)
    changed = transformers.GenerationConfig(eos_token_id=[*ends])
    with mock.patch.object(model, 'generation_config', changed):
      theirs = _theirs().generate_until(requests, disable_tqdm=True)
    with mock.patch.object(_ours(), '_ends', _ours()._ends | ends):
      ours = _ours().generate_until(requests, disable_tqdm=True)
    self.assertEqual(ours, theirs)
    self.assertGreater(sum(a != b for a, b in zip(ours, free, strict=True)), 1)


class JaxLMTest(parameterized.TestCase):
  def test_batches_do_not_matter(self):
    source = np.random.default_rng(4)
    pairs = [(_words(source, 1 + i), ' a b') for i in range(9)]
    requests = _instances('loglikelihood', pairs)
    few, many = (
      _ours(tokens).loglikelihood(requests, disable_tqdm=True)
      for tokens in (1, 10**4)
    )
    np.testing.assert_allclose(few, many, rtol=1e-5)

  def test_sliced(self):
    dense = _ours()
    config = model_config.read_model_config(_folder() / 'model')
    masks = testing.random_masks(config)
    params = weights.load_params(_folder() / 'model', config, np.float32)
    small, config = export.slice_params(params, config, masks)
    pruned = harness_model.JaxLM(
      small, config, _tokenizer(), max_length=_LENGTH, batch_tokens=200
    )
    requests = _instances('loglikelihood', [('the', ' way'), ('of', ' all')])
    totals = [
      [total for total, _ in model.loglikelihood(requests, disable_tqdm=True)]
      for model in (dense, pruned)
    ]
    self.assertTrue(np.isfinite(totals).all())
    self.assertGreater(np.abs(np.subtract(*totals)).min(), 0.1)

  def test_temperature_is_the_tasks(self):
    args = [('the', {'do_sample': True, 'temperature': 100.0, 'until': [],
                     'max_gen_toks': 20})]  # fmt: skip
    greedy = [('the', {'until': [], 'max_gen_toks': 20})]
    drawn, likeliest = (
      _ours().generate_until(_instances('generate_until', x), True)
      for x in (args, greedy)
    )
    self.assertNotEqual(drawn, likeliest)

  @parameterized.parameters(
    ({'num_beams': 4}, 'num_beams'),
    ({'do_sample': True, 'temperature': 1.0, 'top_p': 0.9}, 'top_p'),
    ({'max_gen_toks': _LENGTH}, 'no room'),
  )
  def test_what_is_not_supported(self, settings, word):
    requests = _instances('generate_until', [('the', settings)])
    with self.assertRaisesRegex(RequestError, rf'\Atasks: [^\n]*{word}'):
      _ours().generate_until(requests, disable_tqdm=True)


class EvaluateTest(absltest.TestCase):
  """The command, on a mesh of all devices."""

  def evaluated(self, **changes):
    settings = {
      'fewshot': None,
      'limit': None,
      'context': _LENGTH,
      'batch_tokens': 200,
      'dtype': 'float32',
    }
    names = [_task('choice'), _task('writing')]
    return evaluate.evaluate_tasks(
      str(_folder() / 'model'), names, **settings | changes
    )

  def test_tasks(self):
    found = self.evaluated()
    for name in 'choice', 'writing':
      loaded = harness.load_tasks([_task(name)], _tokenizer())
      ours = harness.score_tasks(_ours(), loaded, None)[name]
      self.assertEqual(found['tasks'][name].keys(), ours.keys())
      for key, value in ours.items():
        self.assertAlmostEqual(found['tasks'][name][key], value, places=5)
    self.assertIn('acc_stderr', found['tasks']['choice'])
    self.assertFalse(found['pruned'])
    json.dumps(found)

  def test_end_tokens_of_the_model(self):
    path = _folder() / 'model' / 'generation_config.json'
    path.write_text(json.dumps({'eos_token_id': [5, 7]}))
    self.addCleanup(path.unlink)
    eos = _tokenizer().eos_token_id
    with mock.patch.object(
      harness_model, 'JaxLM', wraps=harness_model.JaxLM
    ) as made:
      self.evaluated(limit=1)
    self.assertEqual(made.call_args.kwargs['ends'], {5, 7, eos})

  def test_limit_and_the_models_own_context(self):
    found = self.evaluated(limit=2, context=None)
    self.assertEqual(found['tasks']['choice']['examples'], 2)
    self.assertEqual(found['context'], 64)

  def test_rows_of_a_report(self):
    figures = {'acc': 0.5, 'acc_stderr': 0.1, 'examples': 3, 'version': 1.0}
    found = {'tasks': {'a': figures, 'b': {'ppl': 2.0, 'fewshot': 0}}}
    self.assertEqual(evaluate.task_rows(found), {'a, acc': 0.5, 'b, ppl': 2.0})


class LoadTest(absltest.TestCase):
  def test_no_such_task(self):
    with self.assertRaisesRegex(RequestError, r'\Atasks: cannot load a.yaml'):
      harness.load_tasks(['a.yaml'], _tokenizer())

  def test_no_end_of_sequence(self):
    tokenizer = _tokenizer()
    tokenizer.eos_token = None
    with self.assertRaisesRegex(RequestError, 'end-of-sequence'):
      harness.load_tasks([_task('choice')], tokenizer)

  def test_examples_are_the_same_each_time(self):
    prompts = []
    for _ in range(2):
      loaded = harness.load_tasks([_task('choice')], _tokenizer(), 3)
      task = loaded['tasks']['choice']
      task.build_all_requests(limit=2)
      prompts.append([x.args for x in task.instances])
    self.assertEqual(*prompts)


if __name__ == '__main__':
  absltest.main()
