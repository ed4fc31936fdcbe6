import functools
import itertools
import pathlib
import re
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax import baselines
from ffp_jax.baselines import amc, sensitivity
from ffp_jax.baselines import settings as settings_lib
from ffp_jax.baselines.problem import Inputs, OutOfTokens, Problem
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import allocation, masks, sublayers
from tests import tiny_run

_L, _K, _F, _G, _H, _D = 3, 10, 64, 1, 2, 4
# Only its shapes matter.
_MODEL = ModelConfig(
  vocab=10,
  width=_D,
  layers=_L,
  groups=_K,
  heads_per_group=_G,
  head_size=_H,
  ffn=_F,
)
_SUBLAYERS = sublayers.find_sublayers(
  _MODEL, round_heads=1, round_ffn=2, floor=1
)
# What removing the whole of a sublayer would cost, in nats.
_HARM_S = np.array([0.2, 1.0, 4.0, 3.0, 0.3, 0.8])
_SPARSITY = 0.4
_CONTEXT = 8
_ROWS = 16
_HEURISTICS = (
  'uniform',
  'ffn_only',
  'magnitude_global',
  'wanda_global',
  'flap',
  'owl',
  'depth',
)
_MEASURED = ('sensitivity', 'knapsack')
_SEARCHES = tuple(sorted(set(baselines.METHODS) - {*_HEURISTICS, *_MEASURED}))


def _named(names):
  return [(name, name) for name in names]


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _harm(kept_S, xp=np):
  """The synthetic loss: separable, a function of the kept shares alone."""
  return 1.0 + xp.sum(_HARM_S * xp.square(1.0 - kept_S))


def _nll(params, tokens_BxT, masks):
  """`_harm`, seen through noise that is the same for all on the same row.

  Flat in the masks of units that are kept, as the loss of a model is.
  """
  del params
  noise_B = 0.1 * jnp.sin(tokens_BxT[:, 0])
  if masks is None:
    return 1.0 + noise_B
  kept_S = jnp.concatenate([(mask * (2.0 - mask)).mean(-1) for mask in masks])
  return _harm(kept_S, jnp) + noise_B


@functools.cache
def _arrays():
  """(ranks, weights, inputs), all random."""
  source = np.random.default_rng(0)
  scores = Masks(source.random((_L, _K)), source.random((_L, _F)))
  shapes = (_L, _K, _G, _H), (_L, _F)
  weights = tuple(source.normal(size=(*s, _D)) for s in shapes)
  mean = tuple(source.normal(size=s) for s in shapes)
  square = tuple(m**2 + source.random(m.shape) ** 4 for m in mean)
  return masks.rank_all(scores), weights, Inputs(mean, square)


def _problem(
  tokens=40_000, sparsity=_SPARSITY, nll=_nll, where=_SUBLAYERS, min_ratio=0.1
):
  rank, weights, inputs = _arrays()
  return Problem(
    sublayers=where,
    device_sublayers=allocation.to_device(where, rank),
    sparsity=sparsity,
    min_ratio=min_ratio,
    start_S=np.zeros(2 * _L),
    rows_RxT=np.arange(_ROWS * _CONTEXT).reshape(_ROWS, _CONTEXT),
    nll=nll,
    params={},
    weights=weights,
    input_moments=lambda: inputs,
    refit_model=lambda: (nll, {}),
    measure_tokens=100,
    tokens=tokens,
  )


def _config():
  config = settings_lib.comparison()
  config.search.context = _CONTEXT
  config.search.candidates = 4
  config.policy.hidden = (8,)
  config.search.attention_prior = 0.0
  return config


def _answers(name, problem, seed=0, **changes):
  """Every incumbent of a method, with its own settings but for `changes`."""
  if name.startswith('fastforward'):
    changes['config'] = _config()
  if name == 'amc':
    changes['hidden'] = 32
  out = []
  try:
    for counts in baselines.METHODS[name](problem, seed, **changes):
      out.append(np.array(counts))
  except OutOfTokens:
    pass
  return out


def _slack(counts, sparsity=_SPARSITY):
  return _SUBLAYERS.limit(sparsity) - _SUBLAYERS.kept_cost(counts)


def _harm_of(counts):
  return _harm(counts / _SUBLAYERS.units)


class AllTest(parameterized.TestCase):
  @parameterized.named_parameters(_named(baselines.METHODS))
  def test_budgets(self, name):
    cheapest = (_SUBLAYERS.step * _SUBLAYERS.unit_cost).min()
    for sparsity, tokens in ((0.05, 5000), (0.4, 100), (0.7, 5000)):
      problem = _problem(tokens, sparsity)
      answers = _answers(name, problem)
      self.assertNotEmpty(answers)
      self.assertBetween(problem.used, 0, tokens)
      for counts in answers:
        self.assertBetween(_slack(counts, sparsity), 0, cheapest - 1)
        self.assertTrue(np.all(counts >= _SUBLAYERS.floor))
        self.assertTrue(np.all(counts <= _SUBLAYERS.units))

  @parameterized.named_parameters(_named(_SEARCHES))
  def test_seed(self, name):
    one, same, other = (_answers(name, _problem(5000), s) for s in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    self.assertFalse(np.array_equal(one, other))

  def test_the_allocator_of_the_docs(self):
    guide = pathlib.Path(__file__).parent.parent / 'docs/compare.md'
    (code,) = re.findall('```python\n(.*?)```', guide.read_text(), re.S)
    found = {'np': np}
    exec(code, found)
    with mock.patch.dict(baselines.METHODS, own=found['coordinate']):
      first, *_, last = _answers('own', _problem())
    self.assertLess(_harm_of(last), 0.8 * _harm_of(first))

  @parameterized.named_parameters(_named((*_MEASURED, *_SEARCHES)))
  def test_search_beats_uniform(self, name):
    uniform = _harm_of(_answers('uniform', _problem())[-1])
    best = _harm_of(_optimum())
    found = _harm_of(_answers(name, _problem(20_000))[-1])
    # The share of what could be gained.
    least = {'fastforward_published': 0.5, 'amc': 0.7, 'random': 0.5}
    self.assertGreater(
      (uniform - found) / (uniform - best), least.get(name, 0.85)
    )

  @parameterized.named_parameters(_named((*_MEASURED, *_SEARCHES)))
  def test_broken_losses(self, name):
    def broken(params, tokens, masks):
      return jnp.nan * _nll(params, tokens, masks)

    for counts in _answers(name, _problem(3000, nll=broken)):
      self.assertBetween(_slack(counts), 0, 24)

  def test_published_gets_to_its_last_stair(self):
    first, *_, last = _answers('fastforward_published', _problem(1000))
    self.assertFalse(np.array_equal(first, last))

  def test_published_with_the_exact_projection(self):
    method = 'fastforward_published'
    cut, exact = (
      _answers(method, _problem(1000), repair=x) for x in ('cut', 'project')
    )
    self.assertFalse(np.array_equal(cut[-1], exact[-1]))
    # Equal priorities are the same share of each sublayer, with rounding.
    even = _problem().project(np.zeros(2 * _L))
    np.testing.assert_array_equal(exact[0], even)


def _optimum():
  """Counts that lose least, by greedy steps: the harm is convex."""
  counts = _SUBLAYERS.floor.copy()
  while True:
    best = None
    for s in range(2 * _L):
      more = counts.copy()
      more[s] += _SUBLAYERS.step[s]
      if more[s] > _SUBLAYERS.units[s] or _slack(more) < 0:
        continue
      cost = _SUBLAYERS.step[s] * _SUBLAYERS.unit_cost[s]
      gain = (_harm_of(counts) - _harm_of(more)) / cost
      best = max(best or (gain, s), (gain, s))
    if best is None:
      return counts
    counts[best[1]] += _SUBLAYERS.step[best[1]]


class ProblemTest(absltest.TestCase):
  def test_score_is_the_mean_and_is_charged(self):
    problem = _problem(tokens=100)
    counts = [_SUBLAYERS.units, _SUBLAYERS.units // 2]
    rows = problem.rows_RxT[[2, 5]]
    noise = 0.1 * np.mean(np.sin([16, 40]))
    expected = [1.0 + noise, _harm(0.5 * np.ones(6)) + noise]
    np.testing.assert_allclose(problem.score(counts, rows), expected, rtol=1e-5)
    self.assertEqual(problem.used, 2 * 2 * _CONTEXT)

  def test_refuses_and_counts_nothing(self):
    problem = _problem(tokens=2 * _CONTEXT)
    with self.assertRaises(OutOfTokens):
      problem.score([_SUBLAYERS.units] * 3, problem.rows_RxT[:1])
    self.assertEqual(problem.used, 0)
    problem.at(0.1).score([_SUBLAYERS.units] * 2, problem.rows_RxT[:1])
    self.assertEqual(problem.left, 0)

  def test_draw(self):
    problem, source = _problem(), np.random.default_rng(0)
    rows = problem.draw(source, 5)
    self.assertLen({row[0] for row in rows.tolist()}, 5)
    self.assertLen(problem.draw(source, 99), _ROWS)


class HeuristicTest(parameterized.TestCase):
  """Each against plain loops."""

  def answer(self, name, **settings):
    (counts,) = baselines.METHODS[name](_problem(), 0, **settings)
    return counts

  @parameterized.parameters('magnitude_global', 'wanda_global', 'flap')
  def test_thresholds(self, name):
    _, weights, inputs = _arrays()
    units = []  # (standardised score, sublayer, cost)
    for part in range(2):
      for i in range(_L):
        w, m, q = (x[part][i] for x in (weights, inputs.mean, inputs.square))
        value = {
          'magnitude_global': np.abs(w).sum(-1),
          'wanda_global': np.abs(w).sum(-1) * np.sqrt(q),
          'flap': (q - m**2) * (w**2).sum(-1),
        }[name]
        if name == 'flap' and part == 0:
          value = value**2
        value = (value - value.mean()) / value.std()
        s = part * _L + i
        for unit in value.reshape(len(value), -1).mean(1):
          units.append((unit, s, _SUBLAYERS.unit_cost[s]))
    units.sort(reverse=True)
    counts, left = np.zeros(6, int), _SUBLAYERS.limit(_SPARSITY)
    for _, s, cost in units:
      left -= cost
      if left < 0:
        break
      counts[s] += 1
    # As far as rounding goes.
    self.assertTrue(np.all(counts > _SUBLAYERS.floor))
    self.assertLessEqual(np.abs(self.answer(name) - counts).max(), 2)

  def test_owl(self):
    _, weights, inputs = _arrays()
    share = []
    for i in range(_L):
      flat = []
      for w, q in zip(weights, inputs.square, strict=True):
        flat += np.ravel(np.abs(w[i]) * np.sqrt(q[i])[..., None]).tolist()
      share.append(np.mean(np.array(flat) > 3.0 * np.mean(flat)))
    share = np.array(share)
    self.assertGreater(np.ptp(share), 0.0)
    ratio = 0.2 * (share - share.min()) / np.ptp(share)
    ratio += 0.6 - ratio.mean()
    counts = self.answer('owl', outlier=3.0, spread=0.1)
    error = np.abs(counts / _SUBLAYERS.units - np.tile(ratio, 2))
    self.assertTrue(np.all(error <= _SUBLAYERS.step / _SUBLAYERS.units))

  def test_depth(self):
    logs = np.array([0.0, np.log(2.0), np.log(3.0)]) / np.log(3.0)
    removed = 0.2 + 0.2 * logs / logs.mean()
    self.assertAlmostEqual(removed.mean(), 0.4)
    counts = self.answer('depth', first=0.5)
    error = np.abs(counts / _SUBLAYERS.units - np.tile(1 - removed, 2))
    self.assertTrue(np.all(error <= _SUBLAYERS.step / _SUBLAYERS.units))

  def test_ffn_only(self):
    counts = self.answer('ffn_only')
    np.testing.assert_array_equal(counts[:_L], _K)
    self.assertLessEqual(np.ptp(counts[_L:]), 2)

  def test_uniform(self):
    ratio = self.answer('uniform') / _SUBLAYERS.units
    error = np.abs(ratio - (1 - _SPARSITY))
    self.assertTrue(np.all(error <= _SUBLAYERS.step / _SUBLAYERS.units))


class SensitivityTest(parameterized.TestCase):
  def test_proportional(self):
    problem = _problem()
    *_, counts = sensitivity.proportional(problem, 0, probe=0.5)
    # A probe of half a sublayer loses a quarter of its harm.
    cost = _SUBLAYERS.units * _SUBLAYERS.unit_cost
    weight = cost / _HARM_S
    most = (_SUBLAYERS.units - _SUBLAYERS.floor) * _SUBLAYERS.unit_cost
    low, high = 0.0, 1e6
    for _ in range(200):
      scale = 0.5 * (low + high)
      enough = np.minimum(scale * weight, most).sum() > 0.4 * cost.sum()
      low, high = (low, scale) if enough else (scale, high)
    expected = 1.0 - np.minimum(scale * weight, most) / cost
    error = np.abs(counts / _SUBLAYERS.units - expected)
    self.assertTrue(np.all(error <= _SUBLAYERS.step / _SUBLAYERS.units), error)
    self.assertEqual(problem.used, 7 * problem.rows_RxT.size)

  @parameterized.parameters((120, 3), (60, 0))
  def test_knapsack_makes_do_with_a_part_of_a_row(self, tokens, length):
    problem = _problem(tokens)
    answers = _answers('knapsack', problem)
    # Five levels of each of six sublayers, and the dense model.
    self.assertEqual(problem.used, 31 * length)
    self.assertLen(answers, 2 if length else 1)

  @parameterized.parameters(range(20))
  def test_knapsack_is_exact(self, seed):
    source = np.random.default_rng(seed)
    sizes = source.integers(1, 5, 4)
    values = [source.normal(size=n) for n in sizes]
    costs = [12 * source.integers(1, 9, n) for n in sizes]
    limit = int(sum(map(np.min, costs)) + source.integers(0, 120))
    best = min(
      (sum(v[i] for v, i in zip(values, picks, strict=True)), picks)
      for picks in itertools.product(*map(range, sizes))
      if sum(c[i] for c, i in zip(costs, picks, strict=True)) <= limit
    )
    self.assertEqual(
      tuple(sensitivity.solve_knapsack(values, costs, limit)), best[1]
    )

  @parameterized.parameters(0.2, 0.4, 0.6)
  def test_knapsack_of_whole_sublayers(self, sparsity):
    where = sublayers.find_sublayers(
      _MODEL, round_heads=1, round_ffn=2, floor=0
    )
    problem = _problem(sparsity=sparsity, where=where, min_ratio=0.0)
    *_, counts = baselines.VARIANTS['knapsack_whole'](problem, 0)
    cost_S = where.units * where.unit_cost
    subsets = np.array([*itertools.product((0, 1), repeat=2 * _L)])
    fit = subsets[subsets @ cost_S <= problem.limit]
    best_S = fit[np.argmax(fit @ _HARM_S)]
    # What is left of the budget is then handed out.
    self.assertTrue(np.all(counts >= best_S * where.units))
    self.assertLessEqual(where.kept_cost(counts), where.limit(sparsity))
    self.assertLess(counts[best_S == 0].max(initial=0), 0.7 * _F)

  def test_knapsack_of_awkward_costs_holds_the_budget(self):
    source = np.random.default_rng(0)
    values = [-np.sort(source.random(5)) for _ in range(6)]
    costs = [np.sort(source.integers(1, 10**9, 5)) for _ in range(6)]
    limit = 2_500_000_000
    picks = sensitivity.solve_knapsack(values, costs, limit)
    spent = sum(c[i] for c, i in zip(costs, picks, strict=True))
    self.assertLessEqual(spent, limit)
    self.assertEqual(
      sensitivity.solve_knapsack(values, costs, 1), [0] * 6
    )  # nothing fits


class AmcTest(absltest.TestCase):
  def test_walk_meets_the_budget_at_the_wall(self):
    problem, source = _problem(), np.random.default_rng(0)
    cost = _SUBLAYERS.units * _SUBLAYERS.unit_cost
    for _ in range(20):
      ratio, states, actions = amc._run_episode(problem, source, None, 8, 0.5)
      self.assertLessEqual(ratio @ cost, problem.limit + 1e-6)
      self.assertTrue(np.all(ratio >= 0.1))
      # Front to back: attention and FFN of each layer.
      np.testing.assert_allclose(
        actions, ratio.reshape(2, -1).T.reshape(-1), rtol=1e-6
      )
      kept = 1.0 - states[1:, 5] - states[1:, 6]
      self.assertTrue(np.all(kept[:-1] > 0.0))
      np.testing.assert_allclose(states[1:-1, 7], actions[:-1], rtol=1e-6)

  def test_agent_finds_the_best_action(self):
    agent, update = amc._make_agent(0, 32, 1e-3, 1e-2, 0.1)
    source = np.random.default_rng(0)
    states = source.random((300, 64, 8), np.float32)
    actions = source.random((300, 64), np.float32)
    best = 0.2 + 0.6 * (states[..., 1] > 0.5)
    reward = -np.square(actions - best).astype(np.float32)
    batches = (states, actions, reward, states, np.ones((300, 64), bool))
    agent = update(agent, batches)
    found = amc._make_actor(32)(agent.params['actor'], states[0])
    # No constant comes closer than 0.3.
    self.assertLess(np.mean(np.abs(found - best[0])), 0.2)


if __name__ == '__main__':
  absltest.main()
