import functools
import json
import pathlib
import re
import shutil
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized
from etils import epath

from ffp_jax import evaluate, export, jobs, prune, recover
from ffp_jax.benchmarks import train_small
from ffp_jax.checkpoints import model_config
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import scoring
from ffp_jax.export import formats
from ffp_jax.runtime import storage
from ffp_jax.runtime.workdir import Workdir
from ffp_jax.text import corpora, general_text, tokenization, windows
from tests import tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_MODELS = ('dense', 'uniform', 'uniform_calibrated', 'searched', 'calibrated')
_STEPS = 6


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
def _text() -> pathlib.Path:
  path = pathlib.Path(_FOLDER.name) / 'text.txt'
  path.write_text(tiny_run.text(2))
  return path


def _config(**overrides):
  common = {'model': str(_model()), 'data': str(_text())}
  return tiny_run.config(**(common | overrides))


def _run(workdir, **overrides):
  return prune.prune_workdir(
    _config(**overrides), workdir, command='how to run it'
  )


def _read(path):
  return json.loads(path.read_text())


def _metrics(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def _outcome(workdir):
  """What has to be the same, bit for bit."""
  metrics = [line | {'seconds': None} for line in _metrics(workdir)]
  weights = (workdir / 'pruned' / 'model.safetensors').read_bytes()
  allocation = (workdir / 'allocation.json').read_bytes()
  results = _read(workdir / 'results.json')
  return metrics, allocation, weights, {k: results[k] for k in _MODELS}


@functools.cache
def _finished():
  """(workdir, what `run` returned) of a run that nothing disturbed."""
  workdir = pathlib.Path(_FOLDER.name) / 'runs' / 'finished'
  return workdir, _run(workdir)


class _TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.workdir = self.folder / 'run'


class FinishedTest(_TestCase):
  def test_files(self):
    workdir, _ = _finished()
    names = {path.name for path in workdir.iterdir()}
    self.assertContainsSubset(
      {
        'config.json',
        'metrics.jsonl',
        'allocation.json',
        'results.json',
        'report.md',
        'report.html',
        'checkpoints',
        'pruned',
      },
      names,
    )
    self.assertFalse([name for name in names if name.startswith('.')])
    self.assertNotEmpty(list((workdir / 'checkpoints').iterdir()))
    report = (workdir / 'report.md').read_text()
    plots = re.findall(r'!\[[^]]+\]\(([^)]+)\)', report)
    self.assertGreaterEqual(len(plots), 3)
    for name in plots:
      self.assertStartsWith(
        (workdir / name).read_bytes().hex(), b'\x89PNG'.hex()
      )
    self.assertIn('how to run it', report)
    self.assertIn('how to run it', (workdir / 'report.html').read_text())
    results = _read(workdir / 'results.json')
    self.assertContainsSubset({'jax', 'ffp_jax'}, results['versions'])
    self.assertRegex(results['device'], r'^\d+ x \w+')

  def test_config(self):
    workdir, _ = _finished()
    self.assertEqual(
      _read(workdir / 'config.json'), json.loads(_config().to_json())
    )

  def test_metrics(self):
    lines = _metrics(_finished()[0])
    self.assertEqual([line['step'] for line in lines], list(range(_STEPS)))
    numbers = (
      'sparsity',
      'reward_tokens',
      'reward_mean',
      'reward_max',
      'best_reward',
      'loss_pathwise',
      'entropy',
      'seconds',
    )
    for line in lines:
      for key in numbers:
        self.assertTrue(np.isfinite(line[key]), key)
      self.assertLessEqual(line['reward_mean'], line['reward_max'])
      self.assertLessEqual(line['reward_max'], line['best_reward'])
      self.assertEqual(line['reward_tokens'], 16)
    sparsity = [line['sparsity'] for line in lines]
    self.assertEqual(sparsity, [0.125] * 2 + [0.25] * 4)

  def test_allocation(self):
    workdir, _ = _finished()
    got = _read(workdir / 'allocation.json')
    kept = 0
    for i, layer in enumerate(got['layers']):
      self.assertEqual(layer['layer'], i)
      self.assertEqual(layer['attention_total'], 2)
      self.assertEqual(layer['ffn_total'], 48)
      self.assertBetween(layer['attention_kept'], 1, 2)
      self.assertBetween(layer['ffn_kept'], 2, 48)
      self.assertEqual(layer['ffn_kept'] % 2, 0)
      # Two query heads of 8, a key and a value head; gate, up and down.
      kept += layer['attention_kept'] * 32 * 8 * (2 + 2 + 2)
      kept += layer['ffn_kept'] * 32 * 3
    self.assertLen(got['layers'], 3)
    prunable = 3 * (2 * 32 * 8 * 6 + 48 * 32 * 3)
    self.assertEqual(got['sparsity_target'], 0.25)
    self.assertAlmostEqual(got['sparsity_achieved'], 1 - kept / prunable)
    # Never above the budget, short of it by less than a step.
    self.assertLessEqual(kept, 0.75 * prunable)
    self.assertGreater(kept, 0.75 * prunable - 2 * 32 * 3)
    self.assertEqual(
      got['params_dense'] - got['params_pruned'], prunable - kept
    )
    self.assertEqual(got['seed'], 0)

  def test_results(self):
    workdir, results = _finished()
    self.assertEqual(_read(workdir / 'results.json'), results)
    for name in _MODELS:
      self.assertBetween(results[name]['ppl'], 1.0, np.inf)
    self.assertLen({results[name]['ppl'] for name in _MODELS}, len(_MODELS))
    self.assertEqual(
      results['protocol'],
      {
        'name': 'gptq',
        'text': str(_text()),
        'split': 'held-out (end of the text)',
        'context': 32,
        'stride': 32,
        'bos': False,
        'windows': 5,
        'tokens': 5 * 31,
      },
    )
    self.assertEqual(results['candidates_evaluated'], _STEPS)
    # A candidate of a row and its gradient; 8 rows by the dense model, and by
    # each of up to two finalists.
    rest = results['tokens_evaluated'] - _STEPS * 16 * 3 - 8 * 16
    self.assertIn(rest, (8 * 16, 2 * 8 * 16))
    self.assertEqual(results['reward']['of'], 'calibrated')
    self.assertEqual(results['compilations'], 1)
    allocation = _read(workdir / 'allocation.json')
    for key in ('params_dense', 'params_pruned'):
      self.assertEqual(results[key], allocation[key])
    file = workdir / 'pruned' / 'model.safetensors'
    self.assertEqual(results['bytes_pruned'], file.stat().st_size)

  def test_weights_are_those_that_were_counted(self):
    workdir, results = _finished()
    file = workdir / 'pruned' / 'model.safetensors'
    stored = safetensors.numpy.load_file(file)
    size = sum(x.size for x in stored.values())
    self.assertEqual(size, results['params_pruned'])
    self.assertBetween(file.stat().st_size - 4 * size, 0, 20_000)
    allocation = _read(workdir / 'allocation.json')
    for i, layer in enumerate(allocation['layers']):
      down = stored[f'model.layers.{i}.mlp.down_proj.weight']
      self.assertEqual(down.shape, (32, layer['ffn_kept']))
      out = stored[f'model.layers.{i}.self_attn.o_proj.weight']
      self.assertEqual(out.shape, (32, 16 * layer['attention_kept']))

  @parameterized.parameters(('pruned', 'calibrated'), ('model', 'dense'))
  def test_reloaded_has_the_perplexity_reported(self, folder, name):
    workdir, results = _finished()
    directory = workdir / folder if folder == 'pruned' else _model()
    tokens = tokenization.tokenize(directory, _text().read_text())
    np.testing.assert_array_equal(
      tokens.ids, tokenization.tokenize(_model(), _text().read_text()).ids
    )
    held = windows.windows(tokens.ids, 32)[-5:].reshape(-1)
    held = tokens._replace(ids=held)
    with mock.patch.object(tokenization, 'tokenize', return_value=held):
      got = evaluate.evaluate(str(directory), str(_text()), context=32)
    expected = results['protocol'] | {'split': 'all of the text'}
    self.assertEqual(got['protocol'], expected)
    expected = results[name]['ppl']
    self.assertLess(abs(got['ppl'] / expected - 1), 1e-5)
    again = evaluate.evaluate_heldout(str(directory), workdir, dtype='float32')
    self.assertEqual(again['protocol'], results['protocol'])
    self.assertAlmostEqual(again['ppl'], got['ppl'], places=9)
    self.assertNotIn('other', again)

  def test_heldout_text_of_a_gguf_file(self):
    workdir, results = _finished()
    out = self.folder / 'model.gguf'
    small = str(workdir / 'pruned')
    formats.export(small, 'gguf', out, dtype='float32', pre='gpt-2')
    with mock.patch.object(pathlib.Path, 'home', return_value=self.folder):
      found = evaluate.evaluate_heldout(str(out), workdir, dtype='float32')
    ppl = results['calibrated']['ppl']
    self.assertLess(abs(found['ppl'] / ppl - 1), 1e-5)

  def test_heldout_text_is_of_one_tokenizer(self):
    model = self.folder / 'model'
    shutil.copytree(_model(), model)
    text = [tiny_run.text().upper()]
    train_small.train_tokenizer(text, tiny_run.VOCAB, model)
    workdir, _ = _finished()
    with (
      mock.patch.object(weights_lib, 'load_params', _unexpected),
      self.assertRaisesRegex(RequestError, 'another tokenizer than .*--data'),
    ):
      evaluate.evaluate_heldout(str(model), workdir, dtype='auto')

  @parameterized.parameters('float16', 'bfloat16')
  def test_what_is_saved_is_of_the_dense_files_dtype(self, dtype):
    model = self.folder / 'model'
    tiny_run.write_model(model, dtype=dtype)
    results = _run(self.workdir, model=str(model))
    file = self.workdir / 'pruned' / 'model.safetensors'
    weights = safetensors.numpy.load_file(file)
    self.assertEqual({x.dtype for x in weights.values()}, {jnp.dtype(dtype)})
    self.assertEqual(results['bytes_dense'], 2 * results['params_dense'])
    self.assertEqual(results['bytes_pruned'], file.stat().st_size)
    self.assertLess(file.stat().st_size, (model / file.name).stat().st_size)
    config = model_config.read_model_config(file.parent)
    params = weights_lib.load_params(file.parent, config, jnp.dtype('float32'))
    tokens = tokenization.tokenize(model, _text().read_text()).ids
    heldout = windows.windows(tokens, 32)[-5:]
    got = np.exp(scoring.Scorer(config)(params, heldout))
    # The very projections that were judged, rounded before they were.
    np.testing.assert_allclose(got, results['calibrated']['ppl'], rtol=1e-5)

  def test_again_is_no_work(self):
    workdir, results = _finished()
    before = {
      path: path.read_bytes()
      for path in workdir.rglob('*')
      if path.is_file() and path.suffix not in ('.png', '.md')
    }
    with mock.patch.object(weights_lib, 'load_params', _unexpected):
      self.assertEqual(_run(workdir), results)
    for path, content in before.items():
      self.assertEqual(path.read_bytes(), content, path)

  def test_other_settings_are_refused(self):
    workdir, _ = _finished()
    before = _outcome(workdir), (workdir / 'config.json').read_bytes()
    with mock.patch.object(weights_lib, 'load_params', _unexpected):
      with self.assertRaisesRegex(
        RequestError, r'\A[^\n]*budget.sparsity, seed;[^\n]*\Z'
      ):
        _run(workdir, **{'seed': 5, 'budget.sparsity': 0.3})
    after = _outcome(workdir), (workdir / 'config.json').read_bytes()
    self.assertEqual(before, after)


def _unexpected(*_, **__):
  raise AssertionError('weights were loaded')


class _Killed(Exception):
  pass


class RepeatTest(_TestCase):
  def test_same_seed_however_often_it_is_saved(self):
    _run(self.workdir, **{'checkpoint.every': 1})
    self.assertEqual(_outcome(self.workdir), _outcome(_finished()[0]))

  def test_interrupted_is_uninterrupted(self):
    real = Workdir.append

    def append(files, line):
      real(files, line)
      if line['step'] == 3:  # the checkpoint is of step 2
        raise _Killed

    with mock.patch.object(Workdir, 'append', append):
      with self.assertRaises(_Killed):
        _run(self.workdir)
    self.assertLen(_metrics(self.workdir), 4)
    with open(self.workdir / 'metrics.jsonl', 'a') as file:
      file.write('{"step": 4, "sta')  # torn
    with mock.patch.object(export, 'save', side_effect=_Killed):
      with self.assertRaises(_Killed):
        _run(self.workdir)
    self.assertFalse((self.workdir / 'results.json').exists())
    with mock.patch.object(Workdir, 'append', _unexpected):
      _run(self.workdir)
    self.assertEqual(_outcome(self.workdir), _outcome(_finished()[0]))

  def test_a_bucket_holds_the_same(self):
    # A path of etils is written as an object of a bucket is.
    bucket = epath.Path(self.workdir)
    self.assertFalse(storage.is_local(bucket))
    real = Workdir.append

    def append(files, line):
      real(files, line)
      if line['step'] == 3:
        raise _Killed

    with mock.patch.object(Workdir, 'append', append):
      with self.assertRaises(_Killed):
        _run(bucket)
    _run(bucket)
    self.assertEqual(_outcome(self.workdir), _outcome(_finished()[0]))
    here, there = (
      {
        x.relative_to(root)
        for root in [folder]
        for x in root.rglob('*')
        if 'checkpoints' not in x.parts and x.is_file()
      }
      for folder in (_finished()[0], self.workdir)
    )
    self.assertEqual(here - there, {pathlib.Path('lock')})

  def test_report_that_a_crash_prevented(self):
    workdir, _ = _finished()
    shutil.copytree(workdir, self.workdir)
    (self.workdir / 'report.md').unlink()
    (self.workdir / 'plot_kept.png').unlink()
    _run(self.workdir)
    self.assertTrue((self.workdir / 'report.md').exists())
    self.assertTrue((self.workdir / 'plot_kept.png').exists())

  def test_neither_search_nor_calibration(self):
    results = _run(
      self.workdir,
      **{
        'text.other': str(_text()),
        'search.steps': (0, 0),
        'search.attention_prior': 4.0,
        'calibration.enabled': False,
      },
    )
    self.assertNotIn('calibrated', results)
    self.assertNotIn('uniform_calibrated', results)
    # The same text and windows, so the same figures; of the saved model too.
    for name in ('dense', 'searched', 'protocol'):
      self.assertEqual(results['other'].pop(name), results[name])
    self.assertEmpty(results['other'])
    self.assertEqual(results['candidates_evaluated'], 0)
    # The first priorities: attention is spared.
    layers = _read(self.workdir / 'allocation.json')['layers']
    self.assertEqual([x['attention_kept'] for x in layers], [2, 2, 2])
    self.assertTrue((self.workdir / 'report.md').exists())
    small = model_config.read_model_config(self.workdir / 'pruned')
    self.assertEqual(small.kept_ffn, tuple(x['ffn_kept'] for x in layers))

  def test_without_attention(self):
    """Attention is 40% of what can be removed, and the first to go."""
    _run(
      self.workdir,
      **{
        'budget.sparsity': 0.4,
        'budget.floor': 0,
        'search.min_ratio': 0.0,
        'search.attention_prior': -30.0,
      },
    )
    results = recover.recover_workdir(self.workdir, tiny_run.RECOVERY)
    layers = _read(self.workdir / 'allocation.json')['layers']
    self.assertEqual([x['attention_kept'] for x in layers], [0, 0, 0])
    small = model_config.read_model_config(self.workdir / 'recovered')
    self.assertEqual(small.kept_groups, (0, 0, 0))
    again = evaluate.evaluate_heldout(
      str(self.workdir / 'recovered'), self.workdir, dtype='float32'
    )
    ppl = results['recovered']['ppl']
    self.assertLess(abs(again['ppl'] / ppl - 1), 1e-5)
    self.assertLess(ppl, results['searched']['ppl'])


class OtherTextTest(_TestCase):
  def other(self, **overrides):
    return jobs.prepare_job(_config(**overrides)).other

  def heldout(self, text):
    ids = tokenization.tokenize(_model(), text).ids
    return windows.windows(ids, 32)[-5:]

  def test_is_scored_and_reported(self):
    path = self.folder / 'other.txt'
    path.write_text(tiny_run.text(3).upper())
    results = _run(self.workdir, **{'text.other': str(path)})
    self.assertEqual(_read(self.workdir / 'results.json'), results)
    # What the run finds on its own text is not touched.
    self.assertEqual(_outcome(self.workdir), _outcome(_finished()[0]))
    other = results['other']
    self.assertCountEqual(other, ('dense', 'calibrated', 'protocol'))
    self.assertEqual(
      other['protocol'], results['protocol'] | {'text': str(path)}
    )
    heldout = self.heldout(path.read_text())
    for directory, name in (
      (_model(), 'dense'),
      (self.workdir / 'pruned', 'calibrated'),
    ):
      config = model_config.read_model_config(directory)
      params = weights_lib.load_params(directory, config, jnp.float32)
      ppl = np.exp(scoring.Scorer(config)(params, heldout))
      np.testing.assert_allclose(other[name]['ppl'], ppl, rtol=1e-5)
      again = evaluate.evaluate_heldout(
        str(directory), self.workdir, dtype='float32'
      )
      for found, want in (again, results), (again['other'], other):
        np.testing.assert_allclose(found['ppl'], want[name]['ppl'], rtol=1e-5)
        self.assertEqual(found['protocol'], want['protocol'])
    report = (self.workdir / 'report.md').read_text()
    self.assertIn('| - | - |', report)
    self.assertIn(f'{other["calibrated"]["ppl"]:,.2f}', report)

  def test_is_the_other_built_in_text(self):
    found = self.other(**{'text.other': 'auto'})
    self.assertEqual(found.protocol.text, 'pydoc')
    want = self.heldout(corpora.read_text('pydoc').content)
    np.testing.assert_array_equal(found.windows, want)

  def test_all_there_is_of_a_short_one(self):
    path = self.folder / 'short.txt'
    path.write_text(_text().read_text()[:120])
    found = self.other(**{'text.other': str(path)})
    ids = tokenization.tokenize(_model(), path.read_text()).ids
    self.assertBetween(len(found.windows), 1, 4)
    np.testing.assert_array_equal(found.windows, windows.windows(ids, 32))
    self.assertEqual(found.protocol.windows, len(found.windows))

  def test_none(self):
    self.assertIsNone(self.other(**{'text.other': ''}))
    general = self.folder / 'general.jsonl'
    general.write_text(json.dumps({'text': tiny_run.text(3)}))
    with mock.patch.object(general_text, 'path', return_value=general):
      both = {'data': 'general:0.5,pydoc:0.5', 'text.other': 'auto'}
      self.assertIsNone(self.other(**both))

  def test_an_automatic_one_that_is_not_to_be_had_is_left_out(self):
    changes = {'data': 'pydoc', 'text.other': 'auto'}
    empty = self.folder / 'short.jsonl'
    empty.write_text('{"text": "short"}')
    for fetch, word in (
      ({'side_effect': ValueError('cannot download')}, 'cannot download'),
      ({'return_value': empty}, 'fewer than'),
    ):
      with (
        mock.patch.object(general_text, 'path', **fetch),
        self.assertLogs('absl', 'WARNING') as logs,
      ):
        self.assertIsNone(self.other(**changes))
      (line,) = (record.getMessage() for record in logs.records)
      self.assertRegex(line, rf"^no figures .*text.other: 'general'.*{word}")
      self.assertNotIn('\n', line)


class RefusedTest(_TestCase):
  """Every wrong request is one line, and leaves nothing behind."""

  def _refused(self, pattern, *, workdir=None, **overrides):
    workdir = workdir or self.workdir
    before = sorted(self.folder.rglob('*'))
    with (
      mock.patch.object(scoring, 'Scorer', _unexpected),
      self.assertRaisesRegex(RequestError, rf'\A[^\n]*{pattern}[^\n]*\Z'),
    ):
      _run(workdir, **overrides)
    self.assertEqual(sorted(self.folder.rglob('*')), before)

  def _refused_early(self, pattern, **overrides):
    with mock.patch.object(weights_lib, 'load_params', _unexpected):
      self._refused(pattern, **overrides)

  def _model_with(self, *, missing=(), **changes):
    """A copy of the model with another config.json."""
    path = self.folder / 'model'
    shutil.copytree(_model(), path)
    description = _read(path / 'config.json') | changes
    for key in missing:
      del description[key]
    (path / 'config.json').write_text(json.dumps(description))
    return path

  @parameterized.parameters(-0.1, 1.0, 2.0)
  def test_sparsity_outside_its_range(self, value):
    self._refused_early(
      rf'budget.sparsity: {value} is outside', **{'budget.sparsity': value}
    )

  def test_unreachable_sparsity(self):
    self._refused_early('budget.sparsity: 0.95', **{'budget.sparsity': 0.95})

  def test_text_missing(self):
    self._refused_early('data: .*nowhere.txt', data='/nowhere.txt')

  def test_text_of_unknown_kind(self):
    self._refused_early('data: .*wikitext', data='wikitext')

  def test_text_empty(self):
    path = self.folder / 'empty.txt'
    path.write_text(' \n')
    self._refused_early('data: .* is empty', data=str(path))

  def test_text_short(self):
    path = self.folder / 'short.txt'
    path.write_text(tiny_run.text()[:500])
    self._refused_early('data: .* windows of 32', data=str(path))

  def test_text_not_utf8(self):
    path = self.folder / 'latin.txt'
    path.write_bytes(b'caf\xe9\n')
    self._refused_early('data: .*latin.txt', data=str(path))

  def test_jsonl_without_text(self):
    path = self.folder / 'x.jsonl'
    path.write_text('{"body": "no text"}\n')
    self._refused_early('data: .*x.jsonl', data=str(path))

  @parameterized.parameters(
    ('/nowhere.txt', "no file '/nowhere.txt'"),
    ('pydoc:-1', 'the weights'),
    ('SHORT', 'short.txt.* fewer than text.context 32'),
  )
  def test_other_text(self, other, problem):
    path = self.folder / 'short.txt'
    path.write_text('short')
    other = other.replace('SHORT', str(path))
    self._refused_early(f'text.other: .*{problem}', **{'text.other': other})

  def test_field(self):
    path = self.folder / 'x.jsonl'
    record = {'text': 'short', 'data': {'body': _text().read_text()}}
    path.write_text(json.dumps(record))
    data = {'data': str(path)}
    self._refused_early('data: .*x.jsonl.*no', **{'text.field': 'no'}, **data)
    got = jobs.prepare_job(_config(**{'text.field': 'data.body'}, **data)).text
    want = jobs.prepare_job(_config()).text
    for one, other in zip(got, want, strict=True):
      np.testing.assert_array_equal(one, other)

  @parameterized.parameters('/nowhere/model', './model', 'model')
  def test_model_missing(self, model):
    self._refused_early(f'model: .*{model}', model=model)

  def test_not_a_model(self):
    path = self.folder / 'empty'
    path.mkdir()
    self._refused_early(f'{path}.* no config.json', model=str(path))

  def test_model_type(self):
    path = self._model_with(model_type='gpt2')
    self._refused_early("'gpt2' is not supported", model=str(path))

  def test_model_config_incomplete(self):
    path = self._model_with(missing=['hidden_size'])
    self._refused_early("'hidden_size' is missing", model=str(path))

  def test_activation(self):
    path = self._model_with(hidden_act='swish2')
    self._refused_early('swish2', model=str(path))

  def test_tokenizer_missing(self):
    path = self._model_with()
    for file in path.glob('tokenizer*'):
      file.unlink()
    self._refused_early('tokenizer', model=str(path))

  def test_model_already_pruned(self):
    path = _finished()[0] / 'pruned'
    self._refused_early('already pruned', model=str(path))

  def test_context_beyond_learned_positions(self):
    path = self.folder / 'model'
    tiny_run.write_model(
      path, model_type='opt', ffn_dim=48, max_position_embeddings=16
    )
    self._refused_early('text.context', model=str(path))

  def test_shard_missing(self):
    path = self._model_with()
    (path / 'model.safetensors').unlink()
    self._refused('model.safetensors: missing', model=str(path))

  def test_second_shard_missing(self):
    path = self._model_with()
    stored = safetensors.numpy.load_file(path / 'model.safetensors')
    (path / 'model.safetensors').unlink()
    names = [f'model-0000{i}-of-00002.safetensors' for i in (1, 2)]
    files = {key: names[i % 2] for i, key in enumerate(sorted(stored))}
    first = {key: stored[key] for key in stored if files[key] == names[0]}
    safetensors.numpy.save_file(first, path / names[0])
    index = path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': files}))
    self._refused(f'{names[1]}: missing', model=str(path))

  def test_shard_truncated(self):
    path = self._model_with()
    file = path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    self._refused('model.safetensors: truncated', model=str(path))

  def test_tensor_missing(self):
    path = self._model_with(attention_bias=True)
    self._refused('k_proj.bias is missing', model=str(path))

  def test_tensor_of_wrong_shape(self):
    path = self._model_with(intermediate_size=40)
    self._refused(
      r'down_proj.weight has shape \(32, 48\), .* \(32, 40\)', model=str(path)
    )

  def test_workdir_not_writable(self):
    # Under a regular file: for root, permissions forbid nothing.
    file = self.folder / 'file'
    file.write_text('')
    for workdir in (file, file / 'run'):
      self._refused_early('workdir: ', workdir=workdir)


if __name__ == '__main__':
  absltest.main()
