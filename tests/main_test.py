import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

from ffp_jax import console
from tests import tiny_run

_ROOT = pathlib.Path(__file__).parent.parent
_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_CONFIG = """
from tests import tiny_run


def get_config():
  return tiny_run.config()
"""


def _call(*arguments):
  """Runs `python -m` on arguments, in a process of its own."""
  return subprocess.run(
    [sys.executable, '-m', *map(str, arguments)],
    cwd=_ROOT,
    env=os.environ | tiny_run.ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


@functools.cache
def _paths():
  """(config file, model, text)."""
  folder = pathlib.Path(_FOLDER.name)
  config, text = folder / 'config.py', folder / 'text.txt'
  config.write_text(_CONFIG)
  text.write_text(tiny_run.text(2))
  tiny_run.write_model(folder / 'model')
  return config, folder / 'model', text


class _TestCase(parameterized.TestCase):
  def assert_refused(self, done, *words):
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertEqual(done.stdout, '')
    self.assertLen(done.stderr.splitlines(), 1, done.stderr)
    self.assertStartsWith(done.stderr, 'ffp_jax: ')
    for word in words:
      self.assertIn(word, done.stderr)


class RefusedTest(_TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / 'run'

  @parameterized.named_parameters(
    ('unknown_key', ['--config.budget.sparsty=0.3'], 'sparsty'),
    ('wrong_type', ['--config.seed=many'], 'config.seed'),
    ('stray', ['runs/demo'], 'runs/demo'),
    ('missing_model', ['--config.model=/no/such/model'], '/no/such/model'),
  )
  def test_arguments(self, arguments, word):
    done = _call(
      'ffp_jax.main',
      '--config=configs/llama.py',
      f'--workdir={self.workdir}',
      *arguments,
    )
    self.assert_refused(done, word)
    self.assertFalse(self.workdir.exists())

  def test_without_a_config_the_defaults(self):
    done = _call(
      'ffp_jax.main', '--config.model=/no/such', f'--workdir={self.workdir}'
    )
    self.assert_refused(done, '/no/such')
    done = _call('ffp_jax.main', '--config.seed=7', '--help_config')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('--config.seed=7 ', done.stdout)

  def test_console(self):
    done = _call('ffp_jax.console', 'plot')
    self.assert_refused(done, 'usage: ffp-jax prune|')
    for command in console.COMMANDS:
      done = _call('ffp_jax.console', command, '--no_such_flag=1')
      self.assert_refused(done, 'no_such_flag')

  def test_no_such_config(self):
    done = _call(
      'ffp_jax.main', '--config=no/such.py', f'--workdir={self.workdir}'
    )
    self.assert_refused(done, 'no/such.py')

  def test_no_workdir(self):
    done = _call('ffp_jax.main', '--config=configs/llama.py')
    self.assert_refused(done, '--workdir')

  def test_evaluate_without_a_model(self):
    done = _call('ffp_jax.evaluate', '--model=/no/such/model')
    self.assert_refused(done, '/no/such/model')

  def test_evaluate_on_two_texts(self):
    done = _call('ffp_jax.evaluate', '--run=/no/such/run', '--context=64')
    self.assert_refused(done, '--context and --run both say the text')


class RunTest(_TestCase):
  def test_prunes_and_evaluates(self):
    config, model, text = _paths()
    workdir = pathlib.Path(_FOLDER.name) / 'run'
    done = _call(
      'ffp_jax.main',
      f'--config={config}',
      f'--workdir={workdir}',
      f'--config.model={model}',
      f'--config.data={text}',
      '--config.seed=3',
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertNotIn('Traceback', done.stderr)
    results = json.loads((workdir / 'results.json').read_text())
    # Nothing but the summary.
    self.assertLess(len(done.stdout.splitlines()), 25)
    for word in ('perplexity', 'dense', 'uniform', 'searched', 'sparsity'):
      self.assertIn(word, done.stdout)
    self.assertIn(f'{results["calibrated"]["ppl"]:,.2f}', done.stdout)
    self.assertIn(f'{results["params_pruned"]:,}', done.stdout)
    self.assertEqual(
      json.loads((workdir / 'config.json').read_text())['seed'], 3
    )
    # What the report says reproduces it.
    for word in ('-m ffp_jax.main', str(config), '--config.seed=3'):
      self.assertIn(word, results['command'])

    out = workdir / 'evaluation.json'
    done = _call(
      'ffp_jax.evaluate',
      f'--model={workdir / "pruned"}',
      f'--data={text}',
      '--context=32',
      '--max_windows=7',
      f'--out={out}',
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    written = json.loads(out.read_text())
    self.assertEqual(json.loads(done.stdout), written)
    self.assertEqual(written['model'], str(workdir / 'pruned'))
    protocol = written['protocol']
    self.assertEqual(protocol['text'], str(text))
    self.assertEqual(protocol['context'], 32)
    self.assertEqual(protocol['windows'], 7)
    self.assertEqual(protocol['tokens'], 7 * 31)
    self.assertGreater(written['ppl'], 1.0)


if __name__ == '__main__':
  absltest.main()
