import dataclasses
import json
import pathlib
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax import config, prune
from ffp_jax.benchmarks import latency
from ffp_jax.checkpoints import weights
from ffp_jax.errors import RequestError
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import projection, resources, sublayers
from tests import tiny_run

_MODEL = ModelConfig(
  vocab=64,
  width=32,
  layers=3,
  groups=4,
  heads_per_group=2,
  head_size=8,
  ffn=48,
)
_S = 12


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _sites(model=_MODEL):
  return sublayers.find_sublayers(model, round_heads=1, round_ffn=4, floor=1)


def _of(model=_MODEL, **budgets):
  settings = config.defaults()
  settings.budget.update(budgets)
  return resources.from_config(settings, model, _sites(model))


class CostTest(parameterized.TestCase):
  @parameterized.parameters((1, None), (7, None), (20, 6), (5, 6))
  def test_flops_are_those_of_every_product(self, context, window):
    model = dataclasses.replace(_MODEL, window=window)
    (found,) = _of(model, flops=0.3, flops_context=context)
    # A product of [m,n] with [n] takes m * n multiplications and additions.
    heads, size, width = 2, 8, 32
    matrices = [(heads * size, width), (size, width), (size, width)]
    matrices.append((width, heads * size))
    total = context * sum(2 * m * n for m, n in matrices)
    for position in range(context):
      seen = min(position + 1, window or context)
      total += heads * (2 * seen * size + 2 * size * seen)
    np.testing.assert_allclose(found.unit_cost[:3], total / context)
    np.testing.assert_allclose(found.unit_cost[3:], 2 * 3 * width)

  def test_only_attention_has_a_cache(self):
    (found,) = _of(kv_cache=0.5)
    np.testing.assert_array_equal(found.unit_cost[3:], 0.0)
    counts = np.array([4, 2, 0, 48, 1, 1])
    self.assertEqual(found.kept(counts), 0.5 * found.kept(_sites().units))

  def test_none_by_default(self):
    self.assertEqual(_of(), ())


class LatencyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder) / 'table.json'

  def _latency(self, table):
    self.path.write_text(json.dumps(table))
    (found,) = _of(latency=0.2, latency_table=str(self.path))
    return found

  def test_the_line_promises_no_more_than_was_measured(self):
    table = {
      'attention': {'1': 0.5, '2': 0.55, '4': 0.9},
      'ffn': {'4': 0.1, '16': 0.7, '32': 0.75, '48': 1.5},
    }
    found = self._latency(table)
    dense = 3 * (0.9 + 1.5)
    self.assertAlmostEqual(found.kept(_sites().units), dense)
    self.assertAlmostEqual(found.limit(_sites().units), 0.8 * dense)
    for groups, slow in table['attention'].items():
      for channels, ms in table['ffn'].items():
        counts = np.repeat([int(groups), int(channels)], 3)
        self.assertGreaterEqual(found.kept(counts), 3 * (slow + ms) - 1e-9)

  @parameterized.parameters(
    ('{', 'must be a JSON file'),
    ('{"attention": {"1": 1, "4": 2}}', 'must be a JSON file'),
    ('[1]', 'must be a JSON file'),
    ('{"attention": {"x": 1}, "ffn": {}}', 'must be a JSON file'),
    ('{"attention": {"4": 1}, "ffn": {"4": 1, "48": 2}}', 'attention needs'),
    (
      '{"attention": {"1": 1, "4": 2}, "ffn": {"4": 1, "32": 2}}',
      'ffn needs two counts or more, the largest of them 48',
    ),
  )
  def test_refused(self, content, pattern):
    self.path.write_text(content)
    with self.assertRaisesRegex(
      RequestError, rf'\Abudget.latency_table: [^\n]*{pattern}'
    ):
      _of(latency=0.2, latency_table=str(self.path))

  @parameterized.parameters(True, False)
  def test_a_table_of_this_machine(self, gated):
    model = dataclasses.replace(_MODEL, gated=gated)
    runs = latency.half_layers(model, 16, np.float32)
    table = latency.measure(runs, repeats=2)
    self.assertEqual([*table['attention']], ['1', '2', '3', '4'])
    self.assertEqual([*table['ffn']], ['12', '24', '30', '36', '42', '48'])
    found = self._latency(table)
    dense = table['attention']['4'] + table['ffn']['48']
    self.assertAlmostEqual(found.kept(_sites().units), 3 * dense)

  def test_missing(self):
    with self.assertRaisesRegex(RequestError, 'budget.latency_table'):
      _of(latency=0.2, latency_table='nowhere.json')


def _problems(seed, budgets, scale=1.5):
  """(priorities, keep [K], share [K,S], floor, min_ratio) of random budgets."""
  source = np.random.default_rng(seed)
  cost = source.uniform(0.2, 2.0, (budgets, _S))
  for row in cost[1:]:
    row[source.permutation(_S)[: _S // 3]] = 0.0
  share = cost / cost.sum(-1, keepdims=True)
  floor = source.uniform(0.0, 0.2, _S)
  min_ratio = 0.1
  least = share @ np.maximum(floor, min_ratio)
  keep = least + (1 - least) * source.uniform(0.2, 0.9, budgets)
  priority = scale * source.standard_normal(_S)
  return [np.float32(x) for x in (priority, keep, share, floor, min_ratio)]


@jax.jit
def _project(priority, keep, share, floor, min_ratio):
  return projection.project(
    priority, keep, share_KxS=share, floor_S=floor, min_ratio=min_ratio
  )


_jacobian = jax.jit(jax.jacobian(_project))


class SeveralBudgetsTest(parameterized.TestCase):
  @parameterized.product(seed=tuple(range(20)), budgets=(2, 3))
  def test_every_one_is_met_and_one_is_used_up(self, seed, budgets):
    priority, keep, share, floor, min_ratio = _problems(seed, budgets)
    ratio = np.float64(_project(priority, keep, share, floor, min_ratio))
    slack = keep - share @ ratio
    self.assertGreater(slack.min(), -2e-6)
    self.assertLess(slack.min(), 2e-6)
    # Nothing is held back that no budget holds: each sublayer below its
    # largest ratio costs something in a budget that is used up.
    used = slack < 1e-4
    held = (share[used] > 0).any(0)
    self.assertTrue((held | (ratio > 1 - 1e-5)).all(), (ratio, used))

  @parameterized.product(seed=tuple(range(5)))
  def test_a_budget_that_allows_more_changes_nothing(self, seed):
    priority, keep, share, floor, min_ratio = _problems(seed, 2)
    keep[1] = 1.0
    both = _project(priority, keep, share, floor, min_ratio)
    alone = _project(priority, keep[:1], share[:1], floor, min_ratio)
    np.testing.assert_allclose(both, alone, atol=1e-5)

  @parameterized.product(seed=tuple(range(5)))
  def test_free_sublayers_are_kept(self, seed):
    """Only half of the sublayers cost anything in the tight budget."""
    priority, keep, share, floor, min_ratio = _problems(seed, 2)
    share[1] = np.arange(_S) < _S // 2
    share[1] /= share[1].sum()
    keep[:] = 1.0, 0.5
    ratio = np.asarray(_project(priority, keep, share, floor, min_ratio))
    np.testing.assert_allclose(ratio[_S // 2 :], 1.0, atol=1e-5)
    self.assertAlmostEqual(float(share[1] @ ratio), 0.5, places=5)

  @parameterized.product(seed=tuple(range(6)), budgets=(1, 2, 3))
  def test_derivative_is_that_of_finite_differences(self, seed, budgets):
    problem = _problems(seed, budgets)
    found = np.asarray(_jacobian(*problem))
    step = 2e-2
    expected = np.empty_like(found)
    for s in range(_S):
      either = []
      for sign in (1, -1):
        moved = problem[0].copy()
        moved[s] += sign * step
        either.append(np.asarray(_project(moved, *problem[1:]), np.float64))
      expected[:, s] = (either[0] - either[1]) / (2 * step)
    # A sublayer at its floor, or between two shifts, has a kink here.
    off = np.abs(found - expected).max(0)
    self.assertLess(np.median(off), 2e-3)
    self.assertLess(np.sort(off)[: _S * 2 // 3].max(), 5e-3)

  @parameterized.product(seed=tuple(range(20)), budgets=(2, 3))
  def test_counts_meet_every_limit_and_leave_no_room(self, seed, budgets):
    source = np.random.default_rng(seed)
    units = source.integers(3, 60, _S)
    step = np.minimum(source.integers(1, 9, _S), units)
    cost = source.integers(1, 500, (budgets, _S))
    cost[1:] *= source.random((budgets - 1, _S)) < 0.7
    ratio = source.uniform(0.1, 1.0, _S)
    least = cost @ step
    limit = least + ((cost @ units - least) * source.uniform(0.1, 0.9)).astype(
      int
    )
    counts = projection.round_to_counts(
      ratio, limit, units_S=units, cost_KxS=cost, step_S=step, floor_S=step
    )
    slack = limit - cost @ counts
    self.assertTrue((slack >= 0).all(), slack)
    self.assertTrue((counts >= step).all())
    self.assertTrue(((counts % step == 0) | (counts == units)).all())
    for s in range(_S):
      more = min((counts[s] // step[s] + 1) * step[s], units[s]) - counts[s]
      if more:
        self.assertTrue((more * cost[:, s] > slack).any(), s)


class IntegersTest(absltest.TestCase):
  def test_exact_where_a_divisor_allows_it(self):
    cost, limit = projection.integer_costs(
      np.array([6e9, 9e9]), 2.9e10, np.array([2, 3])
    )
    np.testing.assert_array_equal(cost, [2, 3])
    self.assertEqual(limit, 9)

  def test_whoever_meets_the_integers_meets_the_budget(self):
    source = np.random.default_rng(0)
    for _ in range(50):
      units = source.integers(1, 20_000, _S)
      real = source.uniform(1e-4, 1e6, _S)
      limit = 0.7 * units @ real
      cost, whole = projection.integer_costs(real, limit, units)
      self.assertLess(units @ cost, 2**41)  # sums stay exact in 64 bits
      counts = (source.random(_S) * units).astype(int)
      if counts @ cost <= whole:
        self.assertLessEqual(counts @ real, limit)
      # And little is lost by it.
      self.assertLess(units @ cost / whole / (1 / 0.7) - 1, 1e-6)

  def test_large_models_with_several_budgets_are_exact(self):
    """LLaMA-2 70B: no sum of any budget fits 32 bits, none is rounded."""
    layers, source = 80, np.random.default_rng(0)
    units = np.repeat([8, 28672], layers)
    parameters = np.repeat([18874368, 24576], layers)
    flops = 2.0 * parameters + np.repeat([4.0 * 1024 * 1024.5, 0.0], layers)
    cache = np.repeat([256.0, 0.0], layers)
    step = np.repeat([1, 64], layers)
    for kept in source.uniform(0.3, 0.95, 5):
      costs = parameters, flops, cache
      budgets = [(c, float(np.floor(kept * (units @ c)))) for c in costs]
      pairs = [
        projection.integer_costs(c, limit, units) for c, limit in budgets
      ]
      for (real, limit), (cost, whole) in zip(budgets, pairs, strict=True):
        np.testing.assert_array_equal(cost * (real[0] / cost[0]), real)
        self.assertEqual(whole, limit * cost[0] // real[0])
      count_S = projection.round_to_counts(
        source.uniform(0.1, 1.0, 2 * layers),
        np.array([whole for _, whole in pairs]),
        units_S=units,
        cost_KxS=np.array([cost for cost, _ in pairs]),
        step_S=step,
        floor_S=step,
      )
      slack = [limit - count_S @ real for real, limit in budgets]
      self.assertGreaterEqual(min(slack), 0.0)
      # A step of an FFN costs no cache.
      self.assertLess(min(slack[0] / 24576, slack[1] / flops[-1]), 64)


class RunTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.inputs = tiny_run.inputs(self.folder)

  def _run(self, **budgets):
    settings = tiny_run.config(**self.inputs)
    settings.budget.update(budgets)
    workdir = self.folder / 'run'
    prune.prune_workdir(settings, workdir, command='')
    return workdir, json.loads((workdir / 'allocation.json').read_text())

  def test_all_budgets_at_once(self):
    table = {
      'attention': {'1': 0.1, '2': 0.2},
      'ffn': {'24': 0.5, '48': 1.0},
    }
    (self.folder / 'table.json').write_text(json.dumps(table))
    workdir, allocation = self._run(
      sparsity=0.1,
      kv_cache=0.3,
      flops=0.2,
      latency=0.25,
      latency_table=str(self.folder / 'table.json'),
    )
    layers = allocation['layers']
    groups = sum(layer['attention_kept'] for layer in layers)
    channels = sum(layer['ffn_kept'] for layer in layers)
    self.assertLessEqual(groups / 6, 0.7)
    self.assertLessEqual(0.1 * groups + channels / 48, 0.75 * 3 * 1.2)
    self.assertGreaterEqual(allocation['sparsity_achieved'], 0.1)
    self.assertEqual(
      [x['name'] for x in allocation['budgets']],
      ['flops', 'kv_cache', 'latency'],
    )
    for line in allocation['budgets']:
      self.assertGreaterEqual(line['removed'], line['removed_target'])
    self.assertAlmostEqual(allocation['budgets'][1]['removed'], 1 - groups / 6)
    said = (workdir / 'report.md').read_text()
    self.assertIn('KV cache of the same sublayers: at least 30.00% asked', said)

  @parameterized.parameters(
    ({'kv_cache': 0.6}, 'budget.kv_cache: 0.6 is out of reach'),
    ({'flops': 1.0}, 'budget.flops: 1.0 is outside'),
    ({'latency': 0.1}, 'budget.latency: needs budget.latency_table'),
    ({'flops_context': 0}, 'budget.flops_context: 0 must be positive'),
  )
  def test_refused(self, budgets, pattern):
    with (
      mock.patch.object(weights, 'load_params', side_effect=AssertionError),
      self.assertRaisesRegex(RequestError, pattern),
    ):
      self._run(**budgets)
    self.assertFalse((self.folder / 'run').exists())


if __name__ == '__main__':
  absltest.main()
