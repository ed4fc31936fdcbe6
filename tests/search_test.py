import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax import config as config_lib
from ffp_jax.config import defaults
from ffp_jax.evaluation import loss
from ffp_jax.models.decoder import Decoder, ModelConfig
from ffp_jax.pruning import allocation, curriculum, masks, search, sublayers
from tests import synthetic_loss, tiny_run
from tests.synthetic_loss import SUBLAYERS, L, harm


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _config(**overrides):
  config = defaults()
  small = {
    'budget.sparsity': 0.4,
    'search.sparsity_shares': (0.5, 1.0),
    'search.steps': (10, 50),
    'search.rows': (1, 1),
    'search.context': 8,
    'search.candidates': 4,
    'search.attention_prior': 0.0,
    'policy.hidden': (8,),
  }
  config.update_from_flattened_dict(small | overrides)
  return config


@functools.cache
def _device_sublayers():
  return allocation.to_device(SUBLAYERS, synthetic_loss.rank())


def _optimum(sparsity, min_ratio):
  """Kept shares [S] that lose least, by bisection on the multiplier."""
  share_S = SUBLAYERS.units * SUBLAYERS.unit_cost / SUBLAYERS.total

  def kept(multiplier):
    return np.clip(
      1.0 - multiplier * share_S / (2.0 * synthetic_loss.HARM_S), min_ratio, 1.0
    )

  below, above = 0.0, 1e4
  for _ in range(200):
    middle = 0.5 * (below + above)
    less = share_S @ kept(middle) < 1.0 - sparsity
    below, above = (below, middle) if less else (middle, above)
  return kept(below)


def _run(config, cliff=2.0):
  """(finalists [M,S], metrics of every step) of a whole search."""
  rows = np.arange(96).reshape(-1, config.search.context) % 10
  text = search.RewardText(rows, np.ones(len(rows)))
  first = search.initial_state(config, SUBLAYERS)
  states, lines = zip(
    *search.steps(
      config,
      SUBLAYERS,
      _device_sublayers(),
      synthetic_loss.nll,
      cliff,
      text,
      first,
    ),
    strict=True,
  )
  return search.finalists(config, SUBLAYERS, states[-1]), lines


def _counts(priority_S, sparsity, min_ratio):
  return allocation.priorities_to_counts(
    priority_S, sparsity, SUBLAYERS, _device_sublayers(), min_ratio=min_ratio
  )


class AllocateTest(parameterized.TestCase):
  @parameterized.product(
    sparsity=(0.0, 0.1, 0.37, 0.8),
    rounds=((1, 1), (2, 8), (3, 32)),
    spread=(0.3, 10.0),
    floor=(0, 1),
  )
  def test_budget_is_met_within_a_step(self, sparsity, rounds, spread, floor):
    table = sublayers.find_sublayers(
      dataclasses.replace(
        synthetic_loss.WIDE, qkv_bias=True, out_bias=True, ffn_bias=True
      ),
      round_heads=rounds[0],
      round_ffn=rounds[1],
      floor=floor,
    )
    source = np.random.default_rng(0)
    device_sublayers = allocation.to_device(table, synthetic_loss.rank())
    for _ in range(3):
      priority_S = np.float32(spread * source.standard_normal(2 * L))
      count_S = allocation.priorities_to_counts(
        priority_S, sparsity, table, device_sublayers, min_ratio=0.05 * floor
      )
      slack = table.limit(sparsity) - table.kept_cost(count_S)
      self.assertGreaterEqual(slack, 0)
      self.assertGreaterEqual(table.sparsity(count_S), sparsity - 1e-9)
      self.assertTrue((count_S >= table.floor).all())
      self.assertTrue((count_S <= table.units).all())
      whole = (count_S % table.step == 0) | (count_S == table.units)
      self.assertTrue(whole.all())
      grown = np.minimum((count_S // table.step + 1) * table.step, table.units)
      price = ((grown - count_S) * table.unit_cost)[grown > count_S]
      if len(price):
        self.assertLess(slack, price.min())
      else:
        self.assertEqual(sparsity, 0.0)

  def test_equal_priorities_are_uniform(self):
    count_S = _counts(np.full(2 * L, 3.0), 0.25, min_ratio=0.1)
    np.testing.assert_allclose(count_S / SUBLAYERS.units, 0.75, atol=0.03)

  def test_projection_meets_the_kept_share(self):
    goal = allocation.make_target(SUBLAYERS, 0.3)
    source = np.random.default_rng(0)
    priority_S = np.float32(2.0 * source.standard_normal(2 * L))
    ratio_S = allocation.project(
      priority_S, goal, _device_sublayers(), min_ratio=0.1
    )
    kept = np.asarray(ratio_S, np.float64) @ (
      SUBLAYERS.units * SUBLAYERS.unit_cost
    )
    self.assertAlmostEqual(kept / SUBLAYERS.total, 0.7, places=5)
    np.testing.assert_array_equal(np.argsort(ratio_S), np.argsort(priority_S))

  def test_target_leaves_out_what_cannot_go(self):
    biased = dataclasses.replace(
      synthetic_loss.WIDE, out_bias=True, ffn_bias=True
    )
    table = sublayers.find_sublayers(
      biased, round_heads=1, round_ffn=1, floor=1
    )
    goal = allocation.make_target(table, 0.5)
    limit = table.limit(0.5) - table.fixed
    removable = table.total - table.fixed
    self.assertGreater(table.fixed, 0)
    self.assertAlmostEqual(float(goal.keep_K[0]), limit / removable)


class ElitesTest(absltest.TestCase):
  def _state(self, reward_M):
    size = len(reward_M)
    elites = search.Elites(
      jnp.array(reward_M, jnp.float32), 1.0 * jnp.arange(size)[:, None]
    )
    return search.SearchState({}, (), None, jnp.int32(0), elites)

  def test_keeps_the_best(self):
    elites = self._state([5.0, 2.0, -np.inf]).elites
    new = search.update_elites(
      elites, jnp.array([1.0, 6.0, 3.0]), jnp.array([[10.0], [20.0], [30.0]])
    )
    np.testing.assert_array_equal(new.reward_M, [6.0, 5.0, 3.0])
    np.testing.assert_array_equal(new.priority_MxS, [[20.0], [0.0], [30.0]])
    worse = search.update_elites(new, jnp.array([0.0]), jnp.array([[40.0]]))
    jax.tree.map(np.testing.assert_array_equal, worse, new)

  def test_forget(self):
    state = search.clear_elites(self._state([5.0, 2.0]))
    np.testing.assert_array_equal(state.elites.reward_M, [-np.inf, -np.inf])
    new = search.update_elites(
      state.elites, jnp.array([-3.0]), jnp.array([[9.0]])
    )
    np.testing.assert_array_equal(new.reward_M, [-3.0, -np.inf])
    np.testing.assert_array_equal(new.priority_MxS[0], [9.0])


class CurriculumTest(parameterized.TestCase):
  def test_plan(self):
    plan = curriculum.stages(
      _config(
        **{
          'budget.sparsity': 0.3,
          'search.sparsity_shares': (0.5, 0.75, 1.0),
          'search.steps': (2, 1, 3),
          'search.rows': (1, 2, 4),
        }
      )
    )
    self.assertEqual([stage.steps for stage in plan], [2, 1, 3])
    self.assertEqual([stage.rows for stage in plan], [1, 2, 4])
    np.testing.assert_allclose(
      [stage.sparsity for stage in plan], [0.15, 0.225, 0.3]
    )
    self.assertEqual(plan[-1].sparsity, 0.3)

  def test_staircase(self):
    steps = [(0.5, 1), (0.5, 1), (0.5, 2), (1.0, 2), (1.0, 2), (0.5, 1)]
    self.assertEqual(
      curriculum.staircase(steps),
      {
        'sparsity_shares': (0.5, 0.5, 1.0, 0.5),
        'rows': (1, 2, 2, 1),
        'steps': (2, 1, 2, 1),
      },
    )

  def test_published(self):
    """The cubic schedule of reward text, and equal stairs of sparsity."""
    for steps, rows, full in ((266, 64, 1000), (16, 8, 120), (50, 48, 600)):
      found = curriculum.published(
        steps, 15, stairs=4, first=0.05, full=full, rows=rows
      )
      count = np.array(found['steps'])
      shares = np.repeat(found['sparsity_shares'], count)
      many = np.repeat(found['rows'], count)
      self.assertLen(shares, steps)
      for i in range(steps):
        share = min(1.0, 0.05 + 0.95 * (15 * i / full) ** 3)
        self.assertBetween(many[i], min(1, share * rows), max(1, share * rows))
        self.assertGreater(2 * many[i], share * rows)
        self.assertEqual(many[i] == rows, 15 * i >= full)
        self.assertEqual(shares[i], (1 + 4 * i // steps) / 4)
      # Every number of rows is compiled.
      self.assertLessEqual(len(set(many)), 7)
      config = _config(**{'text.reward_windows': rows})
      config.search.update(found)
      config_lib.validate(config)

  def test_stage_at(self):
    plan = [curriculum.Stage(0.1, 2, 1), curriculum.Stage(0.2, 3, 4)]
    got = [curriculum.stage_at(plan, step) for step in range(5)]
    self.assertEqual([index for index, _, _ in got], [0, 0, 1, 1, 1])
    self.assertEqual(
      [first for _, _, first in got], [True, False] * 2 + [False]
    )
    for index, stage, _ in got:
      self.assertEqual(stage, plan[index])

  def test_a_stage_without_steps_is_passed_over(self):
    plan = [curriculum.Stage(0.1, 0, 1), curriculum.Stage(0.2, 1, 1)]
    self.assertEqual(curriculum.stage_at(plan, 0), (1, plan[1], True))

  @parameterized.parameters(4, 5)
  def test_no_step_holds_a_row_twice(self, rows):
    text = np.arange(6)[:, None]
    for step in range(12):
      drawn = curriculum.reward_rows(text, step, rows, 0)[:, 0]
      self.assertLen(set(drawn.tolist()), rows)

  @parameterized.parameters(1, 2, 3, 6)
  def test_every_row_before_any_again(self, rows):
    text = 10 * np.arange(6)[:, None] + np.arange(4)
    drawn = np.concatenate(
      [curriculum.reward_rows(text, step, rows, 0) for step in range(12)]
    )
    self.assertEqual(drawn.shape, (12 * rows, 4))
    np.testing.assert_array_equal(
      drawn - drawn[:, :1], np.arange(4) + 0 * drawn
    )
    passes = drawn[:, 0].reshape(-1, 6) // 10
    for one in passes:
      self.assertEqual(sorted(one), list(range(6)))
    self.assertGreater(len({tuple(one) for one in passes}), 1)

  def test_known_from_step_and_seed(self):
    text = np.arange(20)[:, None]
    # In any order: a resumed search asks for a late step first.
    late = curriculum.reward_rows(text, 7, 3, 5)
    for step in range(8):
      again = curriculum.reward_rows(text, step, 3, 5)
    np.testing.assert_array_equal(again, late)
    self.assertFalse(
      np.array_equal(late, curriculum.reward_rows(text, 7, 3, 6))
    )


@functools.cache
def _searched():
  return _run(_config())


class SyntheticSearchTest(absltest.TestCase):
  """Where the best allocation is known."""

  def _assert_close_to_best(self, found, min_ratio=0.1):
    best = harm(_optimum(0.4, min_ratio))
    even = harm(
      _counts(np.zeros(2 * L, np.float32), 0.4, min_ratio) / SUBLAYERS.units
    )
    self.assertGreater(even - best, 0.1)
    for priority_S in found:
      count_S = _counts(priority_S, 0.4, min_ratio)
      self.assertLessEqual(SUBLAYERS.kept_cost(count_S), SUBLAYERS.limit(0.4))
      got = harm(count_S / SUBLAYERS.units)
      self.assertGreater(got, best - 1e-3)  # rounding
      self.assertLess(got - best, 0.1 * (even - best))

  def test_comes_close_to_the_best_allocation(self):
    found, _ = _searched()
    self._assert_close_to_best(found)

  def test_comes_close_by_the_score_function_alone(self):
    many = {'search.candidates': 64, 'search.block': 64}
    weights = {
      'policy.pathwise_weight': 0.0,
      'policy.score_weight': 1.0,
      'policy.value_weight': 0.5,
    }
    found, _ = _run(_config(**many, **weights))
    self._assert_close_to_best(found)

  def test_moves_units_to_where_they_matter(self):
    found, _ = _searched()
    kept_S = _counts(found[0], 0.4, 0.1) / SUBLAYERS.units
    np.testing.assert_allclose(kept_S, _optimum(0.4, 0.1), atol=0.15)

  def test_repeats_bit_for_bit(self):
    first, again = _searched(), _run(_config())
    np.testing.assert_array_equal(first[0], again[0])
    self.assertEqual(_without_seconds(first[1]), _without_seconds(again[1]))

  def test_goes_on_from_any_state(self):
    """Every step is known from the state before it, whoever took that."""
    config = _config(**{'search.steps': (2, 3)})
    rows = np.arange(96).reshape(-1, 8) % 10
    text = search.RewardText(rows, np.ones(len(rows)))

    def steps(state):
      return search.steps(
        config,
        SUBLAYERS,
        _device_sublayers(),
        synthetic_loss.nll,
        2.0,
        text,
        state,
      )

    whole = list(steps(search.initial_state(config, SUBLAYERS)))
    self.assertEqual([line['step'] for _, line in whole], list(range(5)))
    for at in (1, 2, 4):
      rest = list(steps(whole[at - 1][0]))
      self.assertEqual(
        _without_seconds([line for _, line in rest]),
        _without_seconds([line for _, line in whole[at:]]),
      )
      jax.tree.map(np.testing.assert_array_equal, rest[-1][0], whole[-1][0])
    self.assertEmpty(list(steps(whole[-1][0])))

  def test_counts_what_it_takes(self):
    _, lines = _searched()
    taken = search.search_cost(_config(), curriculum.stages(_config()))
    self.assertEqual({line['compilations'] for line in lines}, {1})
    self.assertLen(lines, 60)
    self.assertEqual(taken['candidates_evaluated'], 60 * 4)
    # Three forward passes' worth a candidate.
    self.assertEqual(taken['tokens_evaluated'], 60 * 8 * 3 * 4)

  def test_survives_losses_that_are_not_finite(self):
    found, lines = _run(_config(**{'search.rows': (1, 2)}), cliff=0.6)
    self.assertTrue(np.isfinite(found).all())
    for line in lines:
      self.assertTrue(np.isfinite(list(line.values())).all(), line)
    self.assertIn(0.0, [line['reward_mean'] for line in lines])
    # Once for each shape of the tokens.
    self.assertEqual([line['compilations'] for line in lines][9:11], [1, 2])
    tokens = [line['reward_tokens'] for line in lines]
    self.assertEqual(tokens, [8] * 10 + [16] * 50)

  def test_an_easier_stage_is_forgotten(self):
    # The first stage removes nothing, at a reward of 1 that can't be met.
    _, lines = _run(_config(**{'search.sparsity_shares': (0.0, 1.0)}))
    best = [line['best_reward'] for line in lines]
    self.assertEqual(set(best[:10]), {1.0})
    self.assertLess(max(best[10:]), 0.9)
    self.assertEqual(best[10:], sorted(best[10:]))


def _without_seconds(lines):
  unequal = {'seconds': None, 'compilations': None}
  return [line | unequal for line in lines]


_TINY = ModelConfig(
  vocab=30, width=16, layers=2, groups=2, heads_per_group=2, head_size=4, ffn=24
)


class ModelSearchTest(absltest.TestCase):
  def test_reward_improves_over_the_prior(self):
    params = tiny_run.params(_TINY)
    config = _config(**{'search.candidates': 2})

    def apply(params, tokens, masks):
      return Decoder(_TINY).apply({'params': params}, tokens, masks)

    def nll(params, tokens, masks):
      return loss.nll(apply, params, tokens, masks)

    table = sublayers.find_sublayers(_TINY, round_heads=1, round_ffn=1, floor=1)
    device_sublayers = allocation.to_device(table, synthetic_loss.rank(_TINY))
    goal = allocation.make_target(table, 0.3)
    net, optim = search.make_policy(config, table)
    state = search.init(
      jax.random.key(0),
      net,
      optim,
      search.initial_priorities(table, 0.0),
      size=2,
    )
    tokens = _own_tokens(lambda t: apply(params, t, None), 4, 16)
    step = search.make_step(net, optim, nll, config, block=1)

    def reward(priority_S, rounded=True):
      ratio_S = allocation.project(
        priority_S, goal, device_sublayers, min_ratio=0.1
      )
      count_S = ratio_S * device_sublayers.units_S
      if rounded:
        count_S = jnp.asarray(allocation.round_ratios(ratio_S, 0.3, table))
      return reward_of(count_S)

    @jax.jit
    def reward_of(count_S):
      keep = masks.from_counts(device_sublayers.rank, count_S)
      pruned = nll(params, tokens, keep).mean()
      return jnp.exp(nll(params, tokens, None).mean() - pruned)

    before = float(reward(search.initial_priorities(table, 0.0)))
    dense = nll(params, tokens, None).mean()
    for _ in range(25):
      state, metrics = step(
        state, params, tokens, dense, goal, device_sublayers
      )
    self.assertEqual(step._cache_size(), 1)
    mean_S = net.apply({'params': state.params}, jnp.float32(0.3)).mean_S
    self.assertLess(before, 0.9)
    self.assertGreater(float(reward(mean_S)), before + 0.02)
    # The elites have the rewards that they say, before rounding.
    best = float(reward(state.elites.priority_MxS[0], rounded=False))
    self.assertAlmostEqual(best, float(state.elites.reward_M[0]), places=4)
    self.assertEqual(float(metrics['best_reward']), state.elites.reward_M[0])
    self.assertGreater(best, before + 0.02)


def _own_tokens(apply, batch, time):
  """Text by the model itself, so that it has something to lose."""
  apply = jax.jit(apply)
  tokens = np.zeros((batch, time), np.int32)
  source = np.random.default_rng(0)
  for t in range(1, time):
    logits = np.asarray(apply(tokens))[:, t - 1]
    noise = source.gumbel(size=logits.shape)
    tokens[:, t] = np.argmax(logits + noise, axis=-1)
  return tokens


if __name__ == '__main__':
  absltest.main()
