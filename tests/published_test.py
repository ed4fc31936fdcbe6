"""The published search through a run, and beside the baseline of that name."""

import functools
import json
import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest

from ffp_jax import compare, prune
from ffp_jax import config as config_lib
from ffp_jax.baselines import fastforward, settings
from ffp_jax.pruning import curriculum, search
from ffp_jax.runtime.workdir import Workdir
from tests import tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_TOKENS = 8 * 16 + 15 * 16 * 10  # the dense loss, and ten rows for all


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


@functools.cache
def _inputs() -> dict:
  return tiny_run.inputs(pathlib.Path(_FOLDER.name))


def _config(**overrides):
  config = tiny_run.config(**(_inputs() | config_lib.PUBLISHED))
  config.search.update(
    curriculum.published(6, 15, stairs=2, first=0.05, full=60, rows=2)
  )
  config.update_from_flattened_dict(overrides)
  return config


def _run(workdir, config):
  return prune.prune_workdir(config, workdir, command='')


def _metrics(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) | {'seconds': None} for line in lines]


class _Killed(Exception):
  pass


class RunTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def test_killed_and_resumed_is_uninterrupted(self):
    whole, workdir = self.folder / 'whole', self.folder / 'run'
    _run(whole, _config())
    real = Workdir.append

    def append(book, line):
      real(book, line)
      if line['step'] == 3:  # the checkpoint is of step 3, the next is due
        raise _Killed

    with mock.patch.object(Workdir, 'append', append):
      with self.assertRaises(_Killed):
        _run(workdir, _config())
    _run(workdir, _config())
    lines = _metrics(workdir)
    self.assertEqual(lines, _metrics(whole))
    for name in ('allocation.json', 'pruned/model.safetensors'):
      got, expected = (x / name for x in (workdir, whole))
      self.assertEqual(got.read_bytes(), expected.read_bytes(), name)
    self.assertEqual([x['candidates'] for x in lines], [15] * 6)
    self.assertEqual([x['sparsity'] for x in lines], [0.125] * 3 + [0.25] * 3)
    self.assertEqual([x['reward_tokens'] for x in lines], 4 * [16] + 2 * [32])
    for line in lines:
      # Ten epochs have moved the policy, and it hasn't run away.
      self.assertBetween(line['approx_kl'], 1e-9, 0.1)
      self.assertNotIn('loss_pathwise', line)
    # Forward passes alone; the dense model and the finalists besides.
    results = json.loads((whole / 'results.json').read_text())
    rest = results['tokens_evaluated'] - 15 * 16 * (4 + 2 * 2)
    self.assertIn(rest, (8 * 16 * n for n in (2, 3)))

  def test_as_the_baseline(self):
    """Equal proposals, rewards and answers where the settings are equal."""
    for repair in ('project', 'cut'):
      config = _config(**{'search.repair': repair})
      job = prune.prepare_job(config)
      config.compare = settings.comparison().compare
      config.compare.tokens = _TOKENS
      model = compare.load_shared_model(config, job)
      device_sublayers = prune.rank_units(config, job, model.params)
      problem = compare.problem_of(config, job, model, device_sublayers, None)
      dense = problem.losses([job.sublayers.units], problem.rows_RxT)[0]
      problem.spent.clear()
      plan = fastforward._stairs(problem, 15, 2, 0.05)
      self.assertEqual(plan, [(0.5, 1)] * 5 + [(1.0, 2)] * 2)
      states, lines, real = [], [], search.steps

      def steps(*args, real=real, states=states, lines=lines):
        for state, line in real(*args):
          states.append(state)
          lines.append(line)
          yield state, line

      with mock.patch.object(search, 'steps', steps):
        *_, answer = fastforward.published(
          *(problem, config.seed),
          **{'config': config, 'stairs': 2, 'first_share': 0.05},
          repair=repair,
        )
      self.assertEqual(problem.used, _TOKENS - 15 * 16)
      theirs = list(lines)
      config.search.update(curriculum.staircase(plan))
      del config.compare
      workdir = self.folder / repair
      # The baseline's own figures for the dense model, equal but for rounding.
      text = search.RewardText(problem.rows_RxT, dense)
      with (
        mock.patch.object(search, 'steps', steps),
        mock.patch.object(prune, 'reward_text', return_value=text),
      ):
        _run(workdir, config)
      ours = _metrics(workdir)
      self.assertLen(ours, 7)
      for one, other in zip(ours, theirs, strict=True):
        for key in ('reward_mean', 'reward_max', 'loss_value', 'approx_kl'):
          self.assertEqual(one[key], other[key], key)
      for one, other in zip(states[:7], states[7:], strict=True):
        np.testing.assert_array_equal(
          one.elites.priority_MxS, other.elites.priority_MxS
        )
        np.testing.assert_array_equal(one.params['mean'], other.params['mean'])
      found = search.finalists(config, job.sublayers, states[-1])
      got = prune.counts_of(config, job, device_sublayers, found[1])
      np.testing.assert_array_equal(got, answer)


if __name__ == '__main__':
  absltest.main()
