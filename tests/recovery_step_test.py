"""A step of recovery is the same step in JAX and in PyTorch."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from torch.utils import flop_counter

from ffp_jax.benchmarks import (
  recovery_jax,
  recovery_setting,
  recovery_step,
  recovery_torch,
)
from ffp_jax.benchmarks.recovery_setting import Setting
from ffp_jax.checkpoints import model_config
from tests import testing, tiny_run


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _setting(model, kept, **changes) -> Setting:
  config = model_config.read_model_config(pathlib.Path(model))
  units = config.groups, config.ffn
  given = {'sliced': False, 'rank': 0, 'rows': 2, 'context': 16} | changes
  return Setting(str(model), config.vocab, units, kept, **given)


class StepTest(testing.CheckpointTestCase):
  @parameterized.parameters(
    ('llama_biased', 0, False),
    ('llama_biased', 0, True),
    ('qwen3_grouped', 2, False),
    ('opt_pre_norm', 3, True),
  )
  def test_both_libraries_take_the_same_steps(self, name, rank, sliced):
    setting = _setting(
      self.saved(name), ([1, 2], [20, 37]), rank=rank, sliced=sliced
    )
    # A higher rate, so that the losses tell of the steps.
    with mock.patch.object(recovery_setting, 'RATE', 0.01):
      both = [x.make_step(setting) for x in (recovery_jax, recovery_torch)]
    ours, theirs = ([run() for _ in range(3)] for run in both)
    self.assertGreater(theirs[0]['kl'], 0.1)
    for key in ('kl', 'gradient_norm'):
      found, expected = ([x[key] for x in turns] for turns in (ours, theirs))
      np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
      np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=key)

  def test_sliced_and_masked_take_the_same_steps(self):
    setting = _setting(self.saved('llama_grouped'), ([1, 2], [20, 37]), rank=2)
    found = []
    for sliced in (False, True):
      other = dataclasses.replace(setting, sliced=sliced)
      run = recovery_torch.make_step(other)
      turns = [run(), run()]
      found.append([(x['kl'], x['gradient_norm']) for x in turns])
    np.testing.assert_allclose(*found, rtol=1e-5)


class FlopsTest(testing.CheckpointTestCase):
  @parameterized.product(rank=(0, 2), sliced=(False, True))
  def test_are_those_that_pytorch_counts(self, rank, sliced):
    """PyTorch counts all products but those of attention."""
    folder = self.folder() / 'model'
    tiny_run.write_model(folder)
    kept = [1, 2, 1], [8, 48, 16]
    setting = _setting(folder, kept, rank=rank, sliced=sliced)
    step = recovery_torch.make_step(setting)
    with flop_counter.FlopCounterMode(display=False) as counter:
      step()
    T, width, pairs = 16, 32, 16 * 17 / 2  # pairs of tokens that attend
    tokens = 2 * T
    expected = counter.get_total_flops()
    for heads, passes in ((12, 1), (8 if sliced else 12, 3)):
      expected += 2 * passes * 4 * heads * 8 * pairs
    norms = 7 * width
    expected += 2 * tokens * norms * (1 + (2 if rank else 3))
    if rank:  # the embedding, which the first layer multiplies, is not trained
      groups = 1 if sliced else 2
      factors = 3 * width * rank
      expected += 2 * tokens * (width * groups * (2 + 1 + 1) * 8 + factors)
    model = model_config.read_model_config(folder)
    self.assertEqual(recovery_step.step_flops(model, setting), expected)


class CommandTest(testing.CheckpointTestCase):
  def _model(self, **changes) -> pathlib.Path:
    folder = self.folder() / 'model'
    tiny_run.write_model(folder, **changes)
    return folder

  def test_rows_of_the_table(self):
    out = self.folder() / 'found.json'
    model = self._model(num_hidden_layers=1)
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'ffp_jax.benchmarks.recovery_step'),
        *(f'--model={model}', '--ranks=2', '--rows=2', '--context=8'),
        *('--turns=1', f'--out={out}'),
      ],
      env=os.environ | tiny_run.ENVIRONMENT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    header, *lines, rate = done.stdout.splitlines()
    self.assertIn('tokens/s  x PyTorch  x masked', header)
    self.assertRegex(rate, r'^matmul rate: [\d.]+ to [\d.]+ GFLOP/s$')
    self.assertEqual(
      [line.split()[:3] for line in lines],
      [
        ['2', 'masked', 'JAX'],
        ['2', 'masked', 'PyTorch'],
        ['2', 'sliced', 'JAX'],
        ['2', 'sliced', 'PyTorch'],
      ],
    )
    self._check_figures(json.loads(out.read_text()))

  def _check_figures(self, rows):
    """Checks figures against each other."""
    masked, masked_torch, sliced, sliced_torch = rows
    for row in rows:
      for key in ('first KL', 'first gradient norm'):
        np.testing.assert_allclose(row[key], masked[key], rtol=1e-4)
      self.assertGreater(row['peak host memory, MB'], 50.0)
      self.assertAlmostEqual(row['tokens/s'] * row['seconds'], 2 * 8)
      work = row['of matmul rate'] * row['matmul rate, GFLOP/s']
      self.assertAlmostEqual(work * row['seconds'], row['GFLOP'])
    self.assertLess(sliced['GFLOP'], masked['GFLOP'])
    for row, theirs in ((masked, masked_torch), (sliced, sliced_torch)):
      ratio = row['tokens/s'] / theirs['tokens/s']
      self.assertAlmostEqual(row['x PyTorch'], ratio)
    ratio = sliced['tokens/s'] / masked['tokens/s']
    self.assertAlmostEqual(sliced['x masked'], ratio)

  def test_what_is_lost(self):
    """At least 30% of the sublayers' parameters, by less than a group more."""
    config = model_config.read_model_config(
      self._model(intermediate_size=256, num_key_value_heads=4)
    )
    groups, channels = recovery_step.even_counts(config)
    group, channel = 4 * 8 * 32, 3 * 32
    kept = sum(groups) * group + sum(channels) * channel
    dense = 3 * (4 * group + 256 * channel)
    self.assertBetween(dense - kept, 0.3 * dense, 0.3 * dense + group)

  def _measure(self, model, ranks=(0,), context=8):
    return lambda: recovery_step.measure(
      str(model), rows=1, context=context, ranks=list(ranks), repeats=1
    )

  def test_refused(self):
    model = self._model()
    self.assert_refused(self._measure(self.folder()), 'config.json')
    short = self.saved('opt_pre_norm')
    self.assert_refused(self._measure(short, context=21), '21', '20')

    def prune(config):
      config['ffp_jax'] = {'kept_groups': [1, 2, 1], 'kept_ffn': [8, 48, 16]}

    self.edit(model / 'config.json', prune)
    self.assert_refused(self._measure(model), '--model', 'pruned')

  @parameterized.parameters(('torch', 0), ('peft', 8))
  def test_a_missing_library(self, name, rank):
    find = importlib.util.find_spec

    def find_others(other):
      return None if other == name else find(other)

    with mock.patch.object(importlib.util, 'find_spec', find_others):
      self.assert_refused(
        self._measure(self._model(), ranks=(0, rank)), f'pip install {name}'
      )


if __name__ == '__main__':
  absltest.main()
