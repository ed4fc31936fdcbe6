import contextlib
import functools
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax import frontier
from ffp_jax.checkpoints import weights
from ffp_jax.errors import RequestError
from ffp_jax.runtime import run_state, storage
from tests import tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_SPARSITIES = (0.2, 0.3, 0.4)


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


@functools.cache
def _config():
  return tiny_run.config(**tiny_run.inputs(pathlib.Path(_FOLDER.name)))


def _run(workdir, sparsities=_SPARSITIES, steps=1):
  return frontier.run_frontier(
    _config(), workdir, sparsities, steps, again='again'
  )


@functools.cache
def _finished():
  workdir = pathlib.Path(_FOLDER.name) / 'frontier'
  return workdir, _run(workdir)


class FrontierTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / 'run'

  def test_every_budget_is_met_by_a_model_of_its_own(self):
    workdir, runs = _finished()
    for sparsity, point in zip(_SPARSITIES, runs, strict=True):
      folder = workdir / f'{sparsity:g}'
      self.assertEqual(point.name, str(folder))
      got = json.loads((folder / 'allocation.json').read_text())
      # One step of two channels is 192 of 18,432 parameters.
      over = got['sparsity_achieved'] - sparsity
      self.assertBetween(over, -1e-9, 192 / 18432)
      self.assertTrue((folder / 'pruned' / 'model.safetensors').exists())
    sizes = [point.results['bytes_pruned'] for point in runs]
    self.assertEqual(sizes, sorted(sizes, reverse=True))

  def test_later_points_begin_where_the_one_before_ended(self):
    workdir, runs = _finished()
    first, second = (workdir / f'{s:g}' / 'checkpoints' for s in (0.2, 0.3))
    self.assertEqual(run_state.steps_in(second), [0, 1])
    with mock.patch.object(run_state, 'steps_in', return_value=[0]):
      begun = run_state.newest_state(second)
    found = run_state.newest_state(first)
    for name in ('mean', 'log_std'):
      np.testing.assert_array_equal(
        begun['params'][name], found['params'][name]
      )
    steps = [
      len(storage.read_json_lines(workdir / f'{s:g}' / 'metrics.jsonl'))
      for s in _SPARSITIES
    ]
    self.assertEqual(steps, [6, 1, 1])
    self.assertEqual(
      [r.results['candidates_evaluated'] for r in runs], [6, 1, 1]
    )

  def test_without_steps_the_policy_is_read_off(self):
    _, found = _finished()
    runs = _run(self.workdir, (0.2, 0.5), steps=0)
    self.assertEqual(runs[0].allocation, found[0].allocation)
    self.assertEqual(runs[1].results['candidates_evaluated'], 0)
    self.assertGreater(runs[1].allocation['sparsity_achieved'], 0.5 - 1e-9)

  def test_again_is_no_work(self):
    workdir, runs = _finished()
    with mock.patch.object(weights, 'load_params', side_effect=AssertionError):
      again = _run(workdir)
    self.assertEqual([x.results for x in again], [x.results for x in runs])

  def test_report_and_summary(self):
    workdir, runs = _finished()
    page = (workdir / 'frontier.html').read_text()
    said = frontier.summary(runs)
    for point in runs:
      ppl = f'{point.results["calibrated"]["ppl"]:,.2f}'
      self.assertIn(ppl, page)
      self.assertIn(ppl, said)
    self.assertLess(max(map(len, said.splitlines())), 81)

  @parameterized.parameters(
    ((), '--sparsities'),
    ((0.3, 0.2), 'rising order'),
    ((0.2, 0.2), 'rising order'),
    ((0.2, 1.2), 'budget.sparsity: 1.2 is outside'),
    ((0.2, 0.99), 'budget.sparsity: 0.99 is out of reach'),
  )
  def test_refused(self, sparsities, pattern):
    with (
      contextlib.redirect_stderr(io.StringIO()),
      mock.patch.object(weights, 'load_params', side_effect=AssertionError),
      self.assertRaisesRegex(RequestError, pattern),
    ):
      _run(self.workdir, sparsities)
    self.assertFalse(self.workdir.exists())


class CommandTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], '--sparsities is missing'),
    (['--sparsities=0.2,x'], '--sparsities: could not convert'),
    (['--sparsities=0.3,0.2'], 'rising order'),
  )
  def test_refused(self, arguments, word):
    workdir = pathlib.Path(_FOLDER.name) / 'refused'
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'ffp_jax.frontier'),
        *('--config=configs/llama.py', f'--workdir={workdir}', *arguments),
      ],
      cwd=pathlib.Path(__file__).parent.parent,
      env=os.environ | tiny_run.ENVIRONMENT,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertLen(done.stderr.splitlines(), 1, done.stderr)
    self.assertIn(word, done.stderr)
    self.assertFalse(workdir.exists())


if __name__ == '__main__':
  absltest.main()
