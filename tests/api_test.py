import contextlib
import functools
import io
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
from absl.testing import absltest

import ffp_jax
from ffp_jax import evaluate, generate, prune
from ffp_jax.errors import RequestError
from tests import tiny_run

_ROOT = pathlib.Path(__file__).parent.parent
_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_SPARSITY = 0.3


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


@functools.cache
def _inputs() -> dict:
  """Writes a tiny dense model and a text, and returns their paths."""
  return tiny_run.inputs(pathlib.Path(_FOLDER.name))


def _dense() -> str:
  return _inputs()['model']


def _text() -> str:
  return _inputs()['data']


def _config():
  return tiny_run.config(**_inputs(), **{'text.other': 'auto'})


@functools.cache
def _pruned():
  """Returns the pruned model and the metrics that the callback was given."""
  seen = []
  model = ffp_jax.load_model(_dense(), dtype='float32')
  pruned = ffp_jax.prune_model(
    model, _text(), sparsity=_SPARSITY, config=_config(), on_step=seen.append
  )
  return pruned, seen


class ApiTest(absltest.TestCase):
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def test_meets_the_budget_and_is_smaller(self):
    pruned, _ = _pruned()
    self.assertGreaterEqual(pruned.allocation['sparsity_achieved'], _SPARSITY)
    self.assertTrue(pruned.model.config.sliced)
    numbers = sum(x.size for x in jax.tree.leaves(pruned.model.params))
    self.assertEqual(numbers, pruned.allocation['params_pruned'])

  def test_calls_back_after_every_step(self):
    pruned, seen = _pruned()
    self.assertEqual(seen, pruned.metrics)
    self.assertEqual([line['step'] for line in seen], list(range(len(seen))))
    self.assertLen(seen, sum(_config().search.steps))

  def test_is_what_a_run_in_a_workdir_finds(self):
    pruned, _ = _pruned()
    workdir = self.folder() / 'run'
    config = _config()
    config.budget.sparsity = _SPARSITY
    prune.prune_workdir(config, workdir, command='')
    loaded = ffp_jax.load_pruned(workdir)
    self.assertEqual(loaded.other_perplexity, pruned.other_perplexity)
    self.assertCountEqual(loaded.other_perplexity, ('dense', 'calibrated'))
    self.assertEqual(loaded.allocation, pruned.allocation)
    self.assertEqual(loaded.perplexity, pruned.perplexity)
    jax.tree.map(
      np.testing.assert_array_equal, loaded.model.params, pruned.model.params
    )

  def test_perplexity_is_that_of_the_command(self):
    ours = ffp_jax.perplexity(
      ffp_jax.load_model(_dense(), dtype='float32'), _text(), context=32
    )
    theirs = evaluate.evaluate(_dense(), _text(), context=32, dtype='float32')
    self.assertEqual(ours, theirs['ppl'])

  def test_token_ids_in_place_of_a_text(self):
    model = _pruned()[0].model
    ids = model.tokenizer(pathlib.Path(_text()).read_text())['input_ids']
    named = ffp_jax.perplexity(model, _text(), context=32)
    self.assertEqual(ffp_jax.perplexity(model, ids, context=32), named)
    pruned = ffp_jax.prune_model(
      ffp_jax.load_model(_dense(), dtype='float32'),
      ids,
      sparsity=_SPARSITY,
      config=_config(),
    )
    self.assertEqual(pruned.perplexity, _pruned()[0].perplexity)
    self.assertEqual(pruned.other_perplexity, _pruned()[0].other_perplexity)
    with self.assertRaisesRegex(RequestError, '^text: .* token ids'):
      ffp_jax.perplexity(model, [[1, 2]], context=32)

  def test_saved_and_loaded_again(self):
    model, out = _pruned()[0].model, self.folder() / 'out'
    self.assertEqual(ffp_jax.save_model(model, out), [])
    again = ffp_jax.load_model(str(out), dtype='float32')
    self.assertEqual(again.config, model.config)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    with self.assertRaisesRegex(RequestError, 'exists'):
      ffp_jax.save_model(model, out)
    with self.assertRaisesRegex(RequestError, "'zip' is not one of"):
      ffp_jax.save_model(model, out.with_name('other'), format='zip')

  def test_saved_in_another_type(self):
    model, out = _pruned()[0].model, self.folder() / 'out'
    ffp_jax.save_model(model, out, dtype='float16')
    again = ffp_jax.load_model(str(out), dtype=None)
    self.assertEqual(again.file_dtype, np.float16)
    leaf = jax.tree.leaves(again.params)[0]
    self.assertEqual(leaf.dtype, np.float16)

  def test_generates_what_the_command_prints(self):
    pruned = _pruned()[0].model
    out = self.folder() / 'out'
    ffp_jax.save_model(pruned, out)
    pieces = ffp_jax.generate_text(pruned, 'the way of', tokens=8)
    said = ''.join(pieces)
    self.assertNotEmpty(said)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      generate.generate(
        [str(out)],
        'the way of',
        new=8,
        temperature=0.0,
        seed=0,
        dtype='float32',
      )
    self.assertEqual(printed.getvalue(), f'--- {out}\nthe way of{said}\n\n')

  def test_refuses_before_heavy_work(self):
    model = ffp_jax.load_model(_dense(), dtype='float32')
    with self.assertRaisesRegex(RequestError, r'^budget\.sparsity: 1\.5'):
      ffp_jax.prune_model(model, _text(), sparsity=1.5)
    with self.assertRaisesRegex(RequestError, 'already pruned'):
      ffp_jax.prune_model(_pruned()[0].model, _text(), config=_config())
    with self.assertRaisesRegex(RequestError, '--prompt'):
      ffp_jax.generate_text(model, '')


class ImportTest(absltest.TestCase):
  def test_imports_nothing_heavy(self):
    code = (
      'import sys, ffp_jax; '
      "print([x for x in ('jax', 'numpy', 'transformers') if x in sys.modules])"
    )
    done = subprocess.run(
      [sys.executable, '-c', code], cwd=_ROOT, capture_output=True, text=True
    )
    self.assertEqual(done.stdout.strip(), '[]', done.stderr)

  def test_names_are_listed_and_documented(self):
    for name in ffp_jax.__all__:
      self.assertIn(name, dir(ffp_jax))
      self.assertNotEmpty(getattr(ffp_jax, name).__doc__)
    with self.assertRaisesRegex(AttributeError, 'nothing_like_this'):
      _ = ffp_jax.nothing_like_this


if __name__ == '__main__':
  absltest.main()
