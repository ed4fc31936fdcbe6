import dataclasses
import fractions
import json
import math
import pathlib
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.checkpoints import model_config
from ffp_jax.models import families
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import sublayers
from tests import tiny_run

_CASES = {
  'llama_grouped': {'num_attention_heads': 6, 'head_dim': 10},
  'llama_multi_head': {'num_key_value_heads': 4},
  'llama_biased': {'attention_bias': True, 'mlp_bias': True},
  'mistral': {'model_type': 'mistral', 'num_key_value_heads': 1},
  'opt': {'model_type': 'opt', 'ffn_dim': 36},
  'opt_no_bias': {'model_type': 'opt', 'ffn_dim': 36, 'enable_bias': False},
  'opt_projected': {
    'model_type': 'opt',
    'ffn_dim': 36,
    'do_layer_norm_before': False,
    'word_embed_proj_dim': 12,
  },
}


def _config(name) -> ModelConfig:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    description = tiny_run.HF_CONFIG | _CASES[name]
    (path / 'config.json').write_text(json.dumps(description))
    return model_config.read_model_config(path)


def _sites(config, round_heads=1, round_ffn=1, floor=1):
  return sublayers.find_sublayers(
    config, round_heads=round_heads, round_ffn=round_ffn, floor=floor
  )


def _array_sizes(config):
  """Parameters of every module as allocated, attention then FFN, [S]."""
  stack = families.param_shapes(config, np.float32)['stack']
  return np.concatenate(
    [
      sum(
        np.array([math.prod(x.shape[1:])] * config.layers)
        for x in jax.tree.leaves(stack[module])
      )
      for module in ('attention', 'ffn')
    ]
  )


class CostTest(parameterized.TestCase):
  @parameterized.parameters(*_CASES)
  def test_costs_add_up_to_the_arrays(self, name):
    config = _config(name)
    table = _sites(config)
    sizes = _array_sizes(config)
    L, D = config.layers, config.width
    fixed = np.repeat([config.out_bias * D, config.ffn_bias * D], L)
    np.testing.assert_array_equal(table.units * table.unit_cost + fixed, sizes)
    self.assertEqual(table.fixed, fixed.sum())
    self.assertEqual(table.total, sizes.sum())
    self.assertEqual(table.layers, L)

  @parameterized.parameters(*_CASES)
  def test_kept_cost_is_that_of_a_sliced_model(self, name):
    dense = _config(name)
    table = _sites(dense)
    source = np.random.default_rng(0)
    for _ in range(2):
      counts = source.integers(1, table.units + 1)
      kept_groups, kept_ffn = np.split(counts, 2)
      sliced = dataclasses.replace(
        dense, kept_groups=tuple(kept_groups), kept_ffn=tuple(kept_ffn)
      )
      removed = families.param_count(dense) - families.param_count(sliced)
      self.assertEqual(table.total - table.kept_cost(counts), removed)
      self.assertAlmostEqual(table.sparsity(counts), removed / table.total)

  def test_a_unit_is_a_group_of_heads(self):
    # 3 query heads, a key and a value head, and 3 columns of the output.
    table = _sites(_config('llama_grouped'))
    np.testing.assert_array_equal(
      table.unit_cost, [32 * 10 * (3 + 2 + 3)] * 3 + [32 * 3] * 3
    )
    np.testing.assert_array_equal(table.units, [2] * 3 + [48] * 3)

  def test_order_of_sublayers_is_that_of_masks(self):
    config = _config('llama_grouped')
    table = _sites(config)
    shapes = Masks((3, config.groups), (3, config.ffn))
    units = [units for layers, units in shapes for _ in range(layers)]
    np.testing.assert_array_equal(table.units, units)

  def test_large_models_do_not_overflow(self):
    config = ModelConfig(
      vocab=32000,
      width=16384,
      layers=126,
      groups=8,
      heads_per_group=16,
      head_size=128,
      ffn=53248,
    )
    table = _sites(config)
    attention = 2 * 16384 * 128 * (128 + 8)
    self.assertEqual(table.total, 126 * (attention + 3 * 16384 * 53248))
    self.assertEqual(table.kept_cost(table.units), table.total)


class SparsityTest(parameterized.TestCase):
  @parameterized.product(
    name=('llama_grouped', 'opt'),
    percent=(0, 1, 7, 10, 20, 29, 30, 50, 57, 70, 95, 99),
  )
  def test_limit_is_the_exact_fraction(self, name, percent):
    table = _sites(_config(name))
    exact = fractions.Fraction(100 - percent, 100) * table.total
    limit = table.limit(percent / 100)
    self.assertEqual(limit, math.floor(exact))
    self.assertIsInstance(limit, int)

  @parameterized.parameters(*range(0, 100, 3))
  def test_limit_of_seven_billion(self, percent):
    table = _sites(
      ModelConfig(
        vocab=32000,
        width=4096,
        layers=32,
        groups=32,
        heads_per_group=1,
        head_size=128,
        ffn=11008,
      )
    )
    self.assertEqual(table.total, 6476005376)
    exact = fractions.Fraction(100 - percent, 100) * table.total
    self.assertEqual(table.limit(percent / 100), math.floor(exact))

  def test_sparsity_is_removed_over_prunable(self):
    table = _sites(_config('opt'))
    self.assertEqual(table.sparsity(table.units), 0.0)
    counts = table.units.copy()
    counts[0] -= 1
    counts[-1] -= 5
    removed = table.unit_cost[0] + 5 * table.unit_cost[-1]
    self.assertAlmostEqual(
      table.sparsity(counts), removed / table.total, places=12
    )
    # The biases of the output projections can't go.
    self.assertLess(table.sparsity(0 * table.units), 1.0)
    self.assertEqual(table.kept_cost(0 * table.units), table.fixed)

  def test_counts_may_be_small_integers(self):
    config = _config('llama_grouped')
    table = _sites(config)
    counts = table.units.astype(np.int8)
    self.assertEqual(table.kept_cost(counts), table.total)
    self.assertEqual(table.kept_cost(counts.tolist()), table.total)


class RoundingTest(absltest.TestCase):
  def test_step_and_floor(self):
    table = _sites(_config('llama_multi_head'), round_heads=2, round_ffn=8)
    np.testing.assert_array_equal(table.step, [2] * 3 + [8] * 3)
    np.testing.assert_array_equal(table.floor, table.step)

  def test_floor_in_steps(self):
    for floor, groups, channels in ((0, 0, 0), (2, 2, 16), (9, 2, 48)):
      table = _sites(_config('llama_grouped'), round_ffn=8, floor=floor)
      np.testing.assert_array_equal(table.floor, [groups] * 3 + [channels] * 3)

  def test_no_step_is_larger_than_the_module(self):
    table = _sites(_config('llama_grouped'), round_heads=4, round_ffn=64)
    np.testing.assert_array_equal(table.step, [2] * 3 + [48] * 3)
    np.testing.assert_array_equal(table.floor, table.units)
    self.assertEqual(table.sparsity(table.floor), 0.0)


if __name__ == '__main__':
  absltest.main()
