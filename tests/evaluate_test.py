import contextlib
import functools
import io
import itertools
import json
import pathlib
import shutil
import sys
import tempfile
import types
from unittest import mock

import huggingface_hub
import numpy as np
import torch
import transformers
from absl import flags
from absl.testing import absltest, parameterized
from huggingface_hub import errors

from ffp_jax import evaluate, evaluation
from ffp_jax.checkpoints import model_config, weights
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import scoring
from ffp_jax.text import corpora, tokenization
from tests import tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_BOS = tiny_run.VOCAB - 1


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


@functools.cache
def _model() -> pathlib.Path:
  path = pathlib.Path(_FOLDER.name) / 'model'
  tiny_run.write_model(path)
  return path


@functools.cache
def _model_with_bos() -> pathlib.Path:
  """The same with a tokenizer that begins every text with BOS."""
  path = pathlib.Path(_FOLDER.name) / 'with_bos'
  shutil.copytree(_model(), path)
  file = path / 'tokenizer.json'
  tokenizer = json.loads(file.read_text())
  (word,) = (k for k, i in tokenizer['model']['vocab'].items() if i == _BOS)
  tokenizer['post_processor'] = {
    'type': 'TemplateProcessing',
    'single': [
      {'SpecialToken': {'id': word, 'type_id': 0}},
      {'Sequence': {'id': 'A', 'type_id': 0}},
    ],
    'pair': [],
    'special_tokens': {word: {'id': word, 'ids': [_BOS], 'tokens': [word]}},
  }
  file.write_text(json.dumps(tokenizer))
  config = path / 'tokenizer_config.json'
  config.write_text(
    json.dumps(json.loads(config.read_text()) | {'bos_token': word})
  )
  return path


@functools.cache
def _text() -> pathlib.Path:
  path = pathlib.Path(_FOLDER.name) / 'text.txt'
  path.write_text(tiny_run.text(1)[:700])
  return path


@functools.cache
def _torch(directory):
  """(model, token ids [1,N]) as the scripts of the papers have them."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  ids = tokenizer(_text().read_text(), return_tensors='pt').input_ids
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32
  )
  return model.eval(), ids


@torch.no_grad()
def _torch_gptq(directory, context):
  """(perplexity, tokens scored), by the formula of the pruning papers."""
  model, ids = _torch(directory)
  count = ids.numel() // context
  total, scored = 0.0, 0
  for i in range(count):
    window = ids[:, i * context : (i + 1) * context]
    logits, target = model(window).logits[:, :-1], window[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[0], target[0])
    total += loss.double() * context
    scored += target.numel()
  return torch.exp(total / (count * context)).item(), scored


@torch.no_grad()
def _torch_sliding(directory, context, stride, length=None):
  """(perplexity, tokens scored), with labels of -100 as Hugging Face has it."""
  model, ids = _torch(directory)
  ids = ids[:, :length]
  total, scored, before = 0.0, 0, 0
  for start in itertools.count(0, stride):
    end = min(start + context, ids.shape[1])
    window = ids[:, start:end]
    labels = window.clone()
    labels[:, : -(end - before)] = -100
    # The library shifts the labels and takes the mean of those not -100.
    count = (labels[:, 1:] != -100).sum().item()
    if count:
      total += model(window, labels=labels).loss.double() * count
    scored += count
    before = end
    if end == ids.shape[1]:
      return torch.exp(total / scored).item(), scored


def _evaluate(directory, **changes):
  settings = {'context': 32, 'dtype': 'float32'} | changes
  return evaluate.evaluate(str(directory), str(_text()), **settings)


class ProtocolTest(parameterized.TestCase):
  @parameterized.product(context=(2, 32, 50), bos=(False, True))
  def test_gptq(self, context, bos):
    directory = _model_with_bos() if bos else _model()
    got = _evaluate(directory, context=context)
    ppl, scored = _torch_gptq(directory, context)
    self.assertLess(abs(got['ppl'] / ppl - 1), 1e-5)
    length = _torch(directory)[1].numel()
    self.assertEqual(
      got['protocol'],
      {
        'name': 'gptq',
        'text': str(_text()),
        'split': 'all of the text',
        'context': context,
        'stride': context,
        'bos': bos,
        'windows': length // context,
        'tokens': scored,
      },
    )

  @parameterized.parameters(
    (32, 16), (32, 5), (32, 31), (32, 32), (50, None), (64, 3)
  )
  def test_sliding(self, context, stride):
    got = _evaluate(
      _model_with_bos(), protocol='sliding', context=context, stride=stride
    )
    stride = stride or context // 2
    ppl, scored = _torch_sliding(_model_with_bos(), context, stride)
    self.assertLess(abs(got['ppl'] / ppl - 1), 1e-5)
    used = got['protocol']
    self.assertEqual(used['name'], 'sliding')
    self.assertEqual(used['stride'], stride)
    self.assertEqual(used['tokens'], scored)
    self.assertTrue(used['bos'])
    if stride < context:
      self.assertEqual(scored, _torch(_model_with_bos())[1].numel() - 1)

  def test_sliding_by_whole_windows_is_gptq_but_for_the_ragged_end(self):
    both = {
      name: _evaluate(
        _model(), protocol=name, stride=32, max_windows=7
      )
      for name in ('gptq', 'sliding')
    }  # fmt: skip
    self.assertLess(abs(both['gptq']['ppl'] / both['sliding']['ppl'] - 1), 1e-6)
    for got in both.values():
      self.assertEqual(got['protocol']['tokens'], 7 * 31)
      self.assertEqual(got['protocol']['split'], 'first 224 tokens of the text')
    ragged = _evaluate(_model(), protocol='sliding', stride=32)['protocol']
    length = _torch(_model())[1].numel()
    self.assertGreater(length % 32, 1)
    self.assertEqual(ragged['tokens'], length // 32 * 31 + length % 32 - 1)

  @parameterized.parameters(2, 3, 31, 32, 33, 48, 49)
  def test_sliding_over_a_short_text(self, length):
    whole = tokenization.tokenize(_model(), _text().read_text())
    short = whole._replace(ids=whole.ids[:length])
    with mock.patch.object(tokenization, 'tokenize', return_value=short):
      got = _evaluate(_model(), protocol='sliding')
    ppl, scored = _torch_sliding(_model(), 32, 16, length)
    self.assertLess(abs(got['ppl'] / ppl - 1), 1e-5)
    self.assertEqual(got['protocol']['tokens'], scored)
    self.assertEqual(scored, length - 1)

  @parameterized.parameters(
    ('gptq', 31), ('gptq', 0), ('sliding', 1), ('sliding', 0)
  )
  def test_too_short(self, protocol, length):
    short = tokenization.Tokens(np.arange(length), None)
    with (
      mock.patch.object(tokenization, 'tokenize', return_value=short),
      mock.patch.object(weights, 'load_params', side_effect=AssertionError),
      self.assertRaisesRegex(
        RequestError, rf'\Adata: {length} tokens are too few[^\n]*context\Z'
      ),
    ):
      _evaluate(_model(), protocol=protocol)

  def test_field(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'a.jsonl'
      record = {'text': 'another', 'data': {'body': _text().read_text()}}
      path.write_text(json.dumps(record))
      got = evaluate.evaluate(
        str(_model()), str(path), field='data.body', context=32, max_windows=2
      )
    self.assertEqual(got['ppl'], _evaluate(_model(), max_windows=2)['ppl'])

  @parameterized.parameters('gptq', 'sliding')
  def test_windows_that_a_corpus_is_cut_to(self, protocol):
    text = corpora.Text(_text().read_text(), 'c4:validation', 'the text', 4)
    with mock.patch.object(corpora, 'read_text', return_value=text) as read:
      got = {n: _evaluate(_model(), protocol=protocol, max_windows=n)
             for n in (None, 3, 5)}  # fmt: skip
    self.assertTrue(read.call_args.kwargs['report'])
    for asked, windows in (None, 4), (3, 3), (5, 4):
      used = got[asked]['protocol']
      self.assertEqual(used['text'], 'c4:validation')
      self.assertEqual(
        used['split'], f'first {windows * 32} tokens of the text'
      )
      expected = windows * (31 if protocol == 'gptq' else 32)
      self.assertEqual(used['tokens'], expected - (protocol == 'sliding'))

  def test_bos_that_the_tokenizer_does_not_add(self):
    tokens = tokenization.tokenize(_model(), _text().read_text())
    for bos, expected in (_BOS, False), (int(tokens.ids[0]), True):
      with mock.patch.object(
        tokenization, 'tokenize', return_value=tokens._replace(bos=bos)
      ):
        got = _evaluate(_model(), max_windows=1)
      self.assertEqual(got['protocol']['bos'], expected)

  def test_dtype(self):
    exact, rough = (
      _evaluate(_model(), max_windows=3, dtype=x)
      for x in ('float32', 'bfloat16')
    )
    self.assertEqual(exact['dtype'], 'float32')
    self.assertEqual(rough['dtype'], 'bfloat16')
    self.assertNotEqual(exact['ppl'], rough['ppl'])
    self.assertLess(abs(exact['ppl'] / rough['ppl'] - 1), 0.05)


class CommandTest(parameterized.TestCase):
  """What the command does with a wrong request: one line, exit code 2."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.enterContext(
      mock.patch.object(weights, 'load_params', side_effect=AssertionError)
    )

  def refused(self, *words, **changes):
    settings = {
      'model': str(_model()),
      'data': str(_text()),
      'field': '',
      'context': 32,
      'protocol': 'gptq',
      'stride': None,
      'max_windows': None,
      'dtype': 'auto',
      'tasks': [],
      'fewshot': None,
      'limit': None,
      'batch_tokens': 256,
      'run': None,
      'out': str(self.folder / 'out.json'),
    }
    args = types.SimpleNamespace(**settings | changes)
    out, err = io.StringIO(), io.StringIO()
    with (
      mock.patch.object(flags, 'FLAGS', args),
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
      self.assertRaises(SystemExit) as caught,
    ):
      evaluate.main([])
    self.assertEqual(caught.exception.code, 2)
    self.assertEqual(out.getvalue(), '')
    self.assertLen(err.getvalue().splitlines(), 1)
    self.assertStartsWith(err.getvalue(), 'ffp_jax: ')
    for word in words:
      self.assertIn(word, err.getvalue())
    self.assertFalse((self.folder / 'out.json').exists())

  @parameterized.parameters(
    ('a.txt', b'', 'empty'), ('a.txt', b'caf\xe9', 'not UTF-8 text (byte 3)'),
    ('a.txt', b'PNG\0', 'binary'), ('a.jsonl', b'{"a": 1}', "it has 'a'"),
    ('a.jsonl', b'{', 'not JSON'), ('a.jsonl.gz', b'{}', 'not readable'),
    ('a.json.gz', b'\x1f\x8b', 'not readable'), ('a.arrow', b'ARROW1', 'not '),
    ('a.parquet', b'PAR1', 'not readable'),
    ('a.csv', b'a,b', "it has 'a', 'b'"),
    ('a.docx', b'a', 'neither'), ('a.json', b'[{}]', 'it has none'),
  )  # fmt: skip
  def test_text(self, name, content, word):
    path = self.folder / name
    path.write_bytes(content)
    self.refused('data: ', str(path), word, data=str(path))

  def test_field(self):
    path = self.folder / 'a.json'
    path.write_text('[{"text": "a", "body": "b"}]')
    self.refused('too few', data=str(path), field='body')
    self.refused("no field 'no'", '--field', data=str(path), field='no')

  def test_short_text(self):
    path = self.folder / 'a.txt'
    path.write_text('short')
    self.refused('data: ', 'too few', '32', data=str(path))

  def test_no_text(self):
    self.refused('no file', data=str(self.folder / 'a.txt'))
    self.refused('a directory without', data=str(self.folder))
    self.refused("no split 'x'", data='wikitext2:x')

  def test_hub_not_reachable(self):
    error = errors.LocalEntryNotFoundError('no\nnetwork')
    with mock.patch.object(
      huggingface_hub, 'hf_hub_download', side_effect=error
    ):
      self.refused("'ptb'", 'local file', data='ptb')

  def test_unreadable_text(self):
    path = self.folder / 'a.txt'
    path.write_text('a')
    real = pathlib.Path.open

    def opened(found, *args, **kwargs):
      if found == path:
        raise PermissionError(13, 'Permission denied')
      return real(found, *args, **kwargs)

    with mock.patch.object(pathlib.Path, 'open', opened):
      self.refused('a.txt', 'not readable', data=str(path))

  @parameterized.parameters(
    ('gptq', 16), ('sliding', 33), ('sliding', 0), ('sliding', -1)
  )
  def test_stride(self, protocol, stride):
    self.refused('--stride', protocol=protocol, stride=stride)

  def test_ids_beyond_the_vocabulary(self):
    path = self.folder / 'model'
    shutil.copytree(_model(), path)
    whole = tokenization.tokenize(path, 'a')
    huge = whole._replace(ids=np.full(100, tiny_run.VOCAB))
    with mock.patch.object(tokenization, 'tokenize', return_value=huge):
      self.refused('do not belong together', model=str(path))

  def test_tasks_without_lm_eval(self):
    missing = {'lm_eval': None, 'lm_eval.tasks': None}
    with (
      mock.patch.dict('sys.modules', missing),
      mock.patch.dict(vars(evaluation)),
    ):
      sys.modules.pop('ffp_jax.evaluation.harness', None)
      vars(evaluation).pop('harness', None)
      self.refused('--tasks needs', 'pip install "lm_eval', tasks=['piqa'])

  def test_no_such_task(self):
    path = _model_with_bos()  # which has no EOS
    self.refused('end-of-sequence', tasks=['a.yaml'], model=str(path))

  @parameterized.parameters(None, '[]', '{', '{"ppl": 1}')
  def test_results_that_are_not_of_a_run(self, content):
    path = self.folder / 'results.json'
    if content:
      path.write_text(content)
    for tasks in ['a.yaml'], []:
      self.refused(str(self.folder), tasks=tasks, run=str(self.folder))
    self.assertEqual(path.exists(), bool(content))


class ScorerTest(absltest.TestCase):
  def test_what_is_past_a_span_does_not_matter(self):
    config = model_config.read_model_config(_model())
    params = tiny_run.params(config)
    windows = np.random.default_rng(0).integers(0, 300, (3, 16))
    spans = np.array([[1, 16], [9, 16], [4, 10]])
    scorer = scoring.Scorer(config)
    got = scorer(params, windows, spans_Wx2=spans)
    windows[2, 10:] = 7
    self.assertEqual(scorer(params, windows, spans_Wx2=spans), got)
    windows[2, 9] = (windows[2, 9] + 1) % 300
    self.assertNotEqual(scorer(params, windows, spans_Wx2=spans), got)

  def test_the_mean_is_over_tokens(self):
    config = model_config.read_model_config(_model())
    params = tiny_run.params(config)
    windows = np.random.default_rng(1).integers(0, 300, (2, 16))
    scorer = scoring.Scorer(config)
    spans = np.array([[1, 16], [13, 16]])
    each = [
      scorer(params, windows[i : i + 1], spans_Wx2=spans[i : i + 1])
      for i in range(2)
    ]
    got = scorer(params, windows, spans_Wx2=spans)
    self.assertAlmostEqual(got, (15 * each[0] + 3 * each[1]) / 18)
    self.assertEqual(
      scorer(params, windows),
      scorer(params, windows, spans_Wx2=np.array([[1, 16]] * 2)),
    )


if __name__ == '__main__':
  absltest.main()
