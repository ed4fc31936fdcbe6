from typing import NamedTuple

import jax
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.pruning import projection

_CASES = 400
_S = 12


class Problems(NamedTuple):
  """Arguments of `project`, one random problem a row."""

  priority: np.ndarray
  keep: np.ndarray
  share: np.ndarray
  floor: np.ndarray
  min_ratio: np.ndarray


def _problems(seed, scale=1.0, cases=_CASES, floors=True):
  source = np.random.default_rng(seed)
  share = source.dirichlet(np.full(_S, 2.0), cases)
  floor = source.uniform(0.0, 0.6, (cases, _S)) * floors
  # Half of the sublayers have no floor worth the name.
  floor[:, ::2] = 0.0
  min_ratio = source.uniform(0.0, 0.3, cases)
  least = np.sum(share * np.maximum(floor, min_ratio[:, None]), -1)
  keep = least + (1.0 - least) * source.uniform(0.02, 0.98, cases)
  priority = scale * source.standard_normal((cases, _S))
  each = (priority, keep, share, floor, min_ratio)
  return Problems(*(x.astype(np.float32) for x in each))


def _project_one(priority, keep, share, floor, min_ratio):
  return projection.project(
    priority,
    keep[None],
    share_KxS=share[None],
    floor_S=floor,
    min_ratio=min_ratio,
  )


_jitted_project = jax.jit(_project_one)
_project = jax.jit(jax.vmap(_project_one))
_jacobian = jax.jit(jax.vmap(jax.jacobian(_project_one)))


def _kept(problems, ratio):
  """Kept share in float64."""
  return np.sum(problems.share.astype(np.float64) * ratio, -1)


class ProjectTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.1, 1.0, 5.0, 30.0)
  def test_meets_the_budget_within_bounds(self, scale):
    problems = _problems(0, scale)
    ratio = np.asarray(_project(*problems))
    self.assertEqual(ratio.dtype, np.float32)
    self.assertLess(np.abs(_kept(problems, ratio) - problems.keep).max(), 1e-5)
    self.assertTrue((ratio >= problems.floor).all())
    self.assertTrue((ratio >= problems.min_ratio[:, None] * (1 - 1e-6)).all())
    self.assertTrue((ratio <= 1.0).all())

  def test_is_what_the_docstring_says(self):
    # The root found by an independent method, in float64.
    problems = _problems(1)
    ratio = _project(*problems)
    for i in range(0, _CASES, 20):
      priority, keep, share, floor, min_ratio = (
        x[i].astype(np.float64) for x in problems
      )
      expected = _numpy_project(priority, keep, share, floor, min_ratio)
      np.testing.assert_allclose(ratio[i], expected, atol=1e-5)

  @parameterized.parameters(1.0, 5.0)
  def test_raising_one_priority_raises_its_ratio_alone(self, scale):
    problems = _problems(2, scale)
    before = np.asarray(_project(*problems))
    for s in range(_S):
      raised = problems.priority.copy()
      raised[:, s] += 1.0
      change = np.asarray(_project(*problems._replace(priority=raised)))
      change = change - before
      self.assertGreaterEqual(change[:, s].min(), -1e-6)
      self.assertLessEqual(np.delete(change, s, 1).max(), 1e-6)
      # Strictly so, unless the sublayer rests on its floor or is full.
      free = (before[:, s] > problems.floor[:, s] + 1e-2) & (
        before[:, s] > problems.min_ratio + 1e-2
      )
      free &= before[:, s] < 0.9
      # A sublayer that is nearly all of the budget can't be raised much.
      free &= problems.share[:, s] < 0.5
      self.assertGreater(free.sum(), 50)
      self.assertGreater(change[free, s].min(), 0.0)

  def test_keeps_the_order_of_the_priorities(self):
    problems = _problems(3, 3.0, floors=False)
    ratio = np.asarray(_project(*problems))
    order = np.argsort(problems.priority, -1)
    sorted_ratio = np.take_along_axis(ratio, order, -1)
    self.assertGreaterEqual(np.diff(sorted_ratio, axis=-1).min(), 0.0)

  def test_has_no_order_of_sublayers(self):
    problems = _problems(4, 2.0)
    ratio = np.asarray(_project(*problems))
    by = np.random.default_rng(0).permutation(_S)
    permuted = _project(
      problems.priority[:, by],
      problems.keep,
      problems.share[:, by],
      problems.floor[:, by],
      problems.min_ratio,
    )
    np.testing.assert_allclose(permuted, ratio[:, by], atol=2e-6)

  def test_equal_priorities_are_the_uniform_allocation(self):
    problems = _problems(5, floors=False)
    for value in (-7.0, 0.0, 3.5):
      ratio = _project(
        *problems._replace(priority=np.full_like(problems.priority, value))
      )
      expected = np.broadcast_to(problems.keep[:, None], ratio.shape)
      np.testing.assert_allclose(ratio, expected, atol=1e-5)
      # Equal among themselves to the last bit, whatever the rounding.
      np.testing.assert_array_equal(ratio, ratio[:, :1].repeat(_S, 1))

  @parameterized.parameters(-50.0, 0.25, 8.0)
  def test_adding_a_constant_changes_nothing(self, constant):
    problems = _problems(6, 2.0)
    moved = problems._replace(priority=problems.priority + np.float32(constant))
    np.testing.assert_allclose(_project(*moved), _project(*problems), atol=1e-5)

  @parameterized.parameters(1e3, 1e4)
  def test_extreme_priorities(self, spread):
    problems = _problems(7)
    source = np.random.default_rng(7)
    patterns = (
      source.uniform(-spread, spread, problems.priority.shape),
      source.choice([-spread, spread], problems.priority.shape),
      source.choice([-spread, 0.0, spread], problems.priority.shape),
      spread + problems.priority,
      problems.priority - spread,
    )
    # float32 places `shift` within spread / 2**23; a ratio's slope is <= 1/4.
    tolerance = 1e-5 + spread / 2**23 / 4
    for priority in patterns:
      extreme = problems._replace(priority=priority.astype(np.float32))
      ratio = np.asarray(_project(*extreme))
      self.assertTrue(np.isfinite(ratio).all())
      self.assertTrue((ratio >= problems.floor).all())
      self.assertTrue((ratio <= 1.0).all())
      missed = np.abs(_kept(problems, ratio) - problems.keep)
      self.assertLess(missed.max(), tolerance)

  def test_extreme_priorities_have_finite_gradients(self):
    problems = _problems(8)
    for spread in (1e3, 1e4):
      priority = np.random.default_rng(8).choice(
        [-spread, spread], problems.priority.shape
      )
      extreme = problems._replace(priority=priority.astype(np.float32))
      got = np.asarray(_jacobian(*extreme))
      self.assertTrue(np.isfinite(got).all())
      self.assertLess(np.abs(got).max(), 10.0)

  def test_keeping_everything(self):
    problems = _problems(9, 2.0)
    ratio = _project(*problems._replace(keep=np.ones(_CASES, np.float32)))
    np.testing.assert_allclose(ratio, 1.0, atol=1e-5)

  def test_floors_hold_and_others_pay_for_them(self):
    share = np.full(4, 0.25, np.float32)
    priority = np.array([-20.0, 0.0, 0.0, 0.0], np.float32)
    floor = np.array([0.7, 0.0, 0.0, 0.0], np.float32)
    ratio = _jitted_project(priority, 0.4, share, floor, 0.05)
    np.testing.assert_allclose(ratio, [0.7, 0.3, 0.3, 0.3], atol=1e-5)

  @parameterized.parameters(0.3, 2.0)
  def test_derivative_is_that_of_finite_differences(self, scale):
    problems = _problems(10, scale, floors=False)
    got = np.asarray(_jacobian(*problems))
    step = 1e-2
    for s in range(_S):
      up, down = problems.priority.copy(), problems.priority.copy()
      up[:, s] += step
      down[:, s] -= step
      above = np.asarray(_project(*problems._replace(priority=up)))
      below = np.asarray(_project(*problems._replace(priority=down)))
      numeric = (above - below) / (2 * step)
      np.testing.assert_allclose(got[:, :, s], numeric, atol=1e-3)

  def test_derivative_in_float64(self):
    with jax.enable_x64(True):
      problems = Problems(
        *(x.astype(np.float64) for x in _problems(11, 2.0, 40, floors=False))
      )
      jacobian = jax.jit(jax.jacobian(_project_one))
      for i in range(3):
        one = [x[i] for x in problems]
        got = np.asarray(jacobian(*one))
        step = 1e-5
        for s in range(_S):
          up, down = one[0].copy(), one[0].copy()
          up[s], down[s] = up[s] + step, down[s] - step
          numeric = _numpy_project(up, *one[1:]) - _numpy_project(
            down, *one[1:]
          )
          np.testing.assert_allclose(got[:, s], numeric / (2 * step), atol=1e-8)

  def test_derivative_spends_nothing_and_spares_the_floors(self):
    problems = _problems(12, 2.0)
    jacobian = np.asarray(_jacobian(*problems))
    spent = np.einsum('ns,nsp->np', problems.share, jacobian)
    np.testing.assert_allclose(spent, 0.0, atol=1e-5)
    ratio = np.asarray(_project(*problems))
    resting = (ratio == problems.floor) & (problems.floor > 0)
    self.assertGreater(resting.sum(), 50)
    np.testing.assert_array_equal(jacobian[resting], 0.0)

  def test_vmap_equals_loop(self):
    problems = _problems(13, 2.0, 8)
    one_by_one = [_jitted_project(*(x[i] for x in problems)) for i in range(8)]
    np.testing.assert_allclose(
      _project(*problems), np.stack(one_by_one), atol=2e-6
    )


def _numpy_project(priority, keep, share, floor, min_ratio):
  """The docstring's formula, its root bracketed in float64."""
  below, above = -1e3, 1e3

  def ratios(shift):
    wish = min_ratio + (1.0 - min_ratio) / (1.0 + np.exp(-(priority + shift)))
    return np.maximum(floor, wish)

  with np.errstate(over='ignore'):
    for _ in range(200):
      middle = 0.5 * (below + above)
      if share @ ratios(middle) < keep:
        below = middle
      else:
        above = middle
    return ratios(0.5 * (below + above))


_cut = jax.jit(
  lambda action, keep, share, floor: projection.cut(
    action, keep[None], share_KxS=share[None], floor_S=floor, min_ratio=0.1
  )
)


def _numpy_cut(action, keep, share, floor):
  """The published repair, one sublayer after the other."""
  least = np.maximum(floor, 0.1)
  ratio = np.minimum(np.maximum(np.abs(action), least), 1.0)
  over = ratio @ share - keep
  if over < 0:
    lack = 1.0 - ratio
    return ratio - over * lack / (lack @ share)
  layers = len(ratio) // 2
  for layer in range(layers):
    for s in (layer, layers + layer):
      taken = min(over, (ratio[s] - least[s]) * share[s])
      ratio[s] -= taken / share[s]
      over -= taken
  return ratio


class CutTest(parameterized.TestCase):
  @parameterized.product(seed=tuple(range(10)), kept=(0.3, 0.55, 0.9))
  def test_against_a_loop(self, seed, kept):
    source = np.random.default_rng(seed)
    action = source.normal(0.0, 0.7, _S)
    share = source.dirichlet(np.full(_S, 2.0))
    floor = source.uniform(0.0, 0.2, _S)
    got = np.asarray(_cut(*map(np.float32, (action, kept, share, floor))))
    expected = _numpy_cut(action, kept, share, floor)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    self.assertAlmostEqual(float(got @ share), kept, places=5)
    self.assertTrue((got >= np.maximum(floor, 0.1) - 1e-6).all())

  def test_surplus_is_cut_from_the_front(self):
    share = np.full(6, 1 / 6, np.float32)
    got = _cut(np.ones(6, np.float32), np.float32(0.6), share, 0 * share)
    # Of 2.4 to cut: attention and FFN of layer 0, then layer 1's attention.
    np.testing.assert_allclose(got, [0.1, 0.4, 1.0, 0.1, 1.0, 1.0], atol=1e-5)


class Roundings(NamedTuple):
  """Arguments of `to_counts`, one random problem a row; int64 integers."""

  ratio: np.ndarray
  limit: np.ndarray
  units: np.ndarray
  cost: np.ndarray
  step: np.ndarray
  floor: np.ndarray


def _to_counts(problem):
  ratio, limit, units, cost, step, floor = problem
  return projection.round_to_counts(
    ratio,
    np.atleast_1d(limit),
    units_S=units,
    cost_KxS=cost[None],
    step_S=step,
    floor_S=floor,
  )


def _to_counts_each(problems):
  return np.stack([_to_counts(one) for one in zip(*problems, strict=True)])


def _reference(ratio, limit, units, cost, step, floor):
  """Floor to the step, then largest remainder, in Python integers.

  Remainders are float32, as the wishes are: ties are ties of float32.
  """
  S = range(len(units))
  units, cost, step, floor = (
    [int(x) for x in xs] for xs in (units, cost, step, floor)
  )
  count, remainder = [], []
  for s in S:
    wish = np.float32(ratio[s]) * np.float32(units[s])
    steps = wish / np.float32(step[s])
    at = int(np.floor(steps + np.float32(1e-4))) * step[s]
    at = min(max(at, floor[s]), units[s])
    if wish > np.float32(units[s]) - np.float32(0.5e-4) * np.float32(step[s]):
      at = units[s]
    count.append(at)
    remainder.append(steps - np.float32(at) / np.float32(step[s]))
  order = sorted(S, key=lambda s: (-remainder[s], s))

  def spent():
    return sum(c * n for c, n in zip(cost, count, strict=True))

  def bigger(s):
    return min((count[s] // step[s] + 1) * step[s], units[s])

  # Floors may have raised sublayers above the budget: the smallest remainders
  # give way, a step at a time.
  while spent() > limit and any(count[s] > floor[s] for s in S):
    for s in reversed(order):
      if spent() > limit:
        count[s] = max((count[s] - 1) // step[s] * step[s], floor[s])
  while any(
    bigger(s) > count[s] and spent() + (bigger(s) - count[s]) * cost[s] <= limit
    for s in S
  ):
    for s in order:
      if spent() + (bigger(s) - count[s]) * cost[s] <= limit:
        count[s] = bigger(s)
  return count


def _roundings(seed, cases=_CASES, *, equal=False):
  """Random sublayers, steps, costs; ratios that come near the limit."""
  source = np.random.default_rng(seed)
  shape = (cases, _S)
  units = source.integers(1, 80, shape)
  step = np.minimum(source.choice([1, 2, 3, 8, 16], shape), units)
  cost = source.integers(1, 3000, shape)
  if equal:
    # As in a model: two kinds of sublayers, alike in every layer.
    units, step, cost = (
      x[:, [0, 1]].repeat(_S // 2, axis=1) for x in (units, step, cost)
    )
  floor = step.copy()
  share = units * cost / np.sum(units * cost, -1, keepdims=True)
  least = np.sum(share * floor / units, -1)
  min_ratio = np.zeros(cases)
  keep = least + (1 - least) * source.uniform(0.02, 1.0, cases)
  priority = source.standard_normal(shape) * (0.0 if equal else 1.5)
  if equal:
    # Few distinct values: ties among some, not among all.
    priority[: cases // 2] = source.integers(0, 3, (cases // 2, _S))
  ratio = _project(
    *(
      x.astype(np.float32)
      for x in (priority, keep, share, floor / units, min_ratio)
    )
  )
  limit = np.floor(keep * np.sum(units * cost, -1) + 1e-6).astype(np.int64)
  return Roundings(np.asarray(ratio), limit, units, cost, step, floor)


class ToCountsTest(parameterized.TestCase):
  def assert_valid(self, problem, count_S):
    """Bounds, multiples, and the budget in Python integers."""
    _, limit, *rest = problem
    units, cost, step, floor = ([int(x) for x in xs] for xs in rest)
    counts = [int(x) for x in count_S]
    limit, prices, spent = int(limit), [], 0
    for n, unit, price, multiple, least in zip(
      counts, units, cost, step, floor, strict=True
    ):
      self.assertBetween(n, least, unit)
      self.assertTrue(n % multiple == 0 or n in (unit, least))
      spent += n * price
      if n < unit:
        larger = min((n // multiple + 1) * multiple, unit)
        prices.append((larger - n) * price)
    self.assertLessEqual(spent, limit)
    if prices:
      self.assertLess(limit - spent, min(prices))

  @parameterized.product(seed=(0, 1, 2), equal=(False, True))
  def test_meets_the_budget(self, seed, equal):
    problems = _roundings(seed, equal=equal)
    counts = _to_counts_each(problems)
    self.assertEqual(counts.dtype, np.int64)
    for i in range(_CASES):
      self.assert_valid([x[i] for x in problems], counts[i])

  @parameterized.product(seed=(3, 4), equal=(False, True))
  def test_equals_largest_remainder_in_python(self, seed, equal):
    problems = _roundings(seed, equal=equal)
    counts = _to_counts_each(problems)
    for i in range(0, _CASES, 2):
      expected = _reference(*(x[i] for x in problems))
      self.assertEqual(counts[i].tolist(), expected, f'case {i}')

  @parameterized.parameters(5, 6)
  def test_ratios_that_miss_the_budget_are_mended(self, seed):
    # Random ratios: too much is trimmed, what is left over is filled in.
    problems = _roundings(seed)
    source = np.random.default_rng(seed)
    ratio = source.uniform(0.0, 1.0, problems.ratio.shape)
    problems = problems._replace(ratio=ratio.astype(np.float32))
    counts = _to_counts_each(problems)
    for i in range(_CASES):
      self.assert_valid([x[i] for x in problems], counts[i])
      if not i % 4:
        expected = _reference(*(x[i] for x in problems))
        self.assertEqual(counts[i].tolist(), expected, f'case {i}')

  def test_ties_go_to_the_lower_index(self):
    problem = Roundings(
      ratio=np.full(4, 0.5),
      limit=np.int64(9 * 10),
      units=np.full(4, 5),
      cost=np.full(4, 10),
      step=np.ones(4, int),
      floor=np.ones(4, int),
    )
    got = _to_counts(problem)
    self.assertEqual(got.tolist(), [3, 2, 2, 2])

  def test_skips_what_does_not_fit(self):
    # The largest remainder costs 50 and 20 are left: the next one takes it.
    problem = Roundings(
      ratio=np.array([0.59, 0.55, 0.2]),
      limit=np.int64(5 * 50 + 5 * 20 + 2 * 1000 + 20),
      units=np.full(3, 10),
      cost=np.array([50, 20, 1000]),
      step=np.ones(3, int),
      floor=np.ones(3, int),
    )
    got = _to_counts(problem)
    self.assertEqual(got.tolist(), [5, 6, 2])

  def test_units_that_are_no_multiple_of_the_step(self):
    source = np.random.default_rng(0)
    whole = 0
    for kept in source.uniform(0.4, 0.99, 60):
      units, step = np.array([3, 3, 52, 52]), np.array([1, 1, 8, 8])
      cost = np.array([640, 640, 97, 97])
      limit = np.int64(kept * (units @ cost))
      ratio = np.clip(kept + source.uniform(-0.3, 0.3, 4), 0.0, 1.0)
      problem = Roundings(ratio, limit, units, cost, step, step)
      got = _to_counts(problem)
      self.assert_valid(problem, got)
      self.assertContainsSubset(got[2:], {*range(8, 52, 8), 52})
      whole += int((got[2:] == 52).sum())
    self.assertGreater(whole, 0)

  @parameterized.product(
    sparsity=(0.0, 0.1, 0.37, 0.5, 0.777),
    model=(
      # layers, units, unit costs, steps: OPT-66B, OPT-66B whole, LLaMA-2 70B.
      (64, (72, 36864), (4718976, 18433), (1, 128)),
      (64, (72, 36864), (4718976, 18433), (1, 1)),
      (80, (8, 28672), (18874368, 24576), (1, 64)),
    ),
    scale=(0.0, 1.0, 4.0),
  )
  def test_large_models_are_exact(self, sparsity, model, scale):
    layers, *rest = model
    units, cost, step = (np.repeat(x, layers).astype(np.int64) for x in rest)
    total = int(units @ cost)
    self.assertGreater(total, 2**33)
    limit = int(np.floor((1.0 - sparsity) * total))
    source = np.random.default_rng(0)
    ratio = _jitted_project(
      (scale * source.standard_normal(2 * layers)).astype(np.float32),
      np.float32(limit / total),
      (units * cost / total).astype(np.float32),
      (step / units).astype(np.float32),
      0.0,
    )
    problem = Roundings(
      np.asarray(ratio), np.int64(limit), units, cost, step, step
    )
    got = _to_counts(problem)
    self.assert_valid(problem, got)
    # Nothing may move far from what was asked for: what is left over is less
    # than a head, and a head of OPT-66B is 4 channels in every layer.
    moved = np.abs(got - np.asarray(ratio) * units) / step
    self.assertLess(moved.max(), 6.0)
    if sparsity == 0.0:
      np.testing.assert_array_equal(got, units)

  @parameterized.parameters(0.0, 2.0)
  def test_sparsity_0_keeps_everything(self, scale):
    problems = _roundings(7)
    everything = np.sum(problems.units * problems.cost, -1)
    source = np.random.default_rng(0)
    ratio = _project(
      (scale * source.standard_normal((_CASES, _S))).astype(np.float32),
      np.ones(_CASES, np.float32),
      problems.units * problems.cost / everything[:, None].astype(np.float32),
      np.zeros((_CASES, _S), np.float32),
      np.zeros(_CASES, np.float32),
    )
    problems = problems._replace(ratio=np.asarray(ratio), limit=everything)
    np.testing.assert_array_equal(_to_counts_each(problems), problems.units)

  def test_budget_exactly_at_the_floors(self):
    problems = _roundings(8)
    least = np.sum(problems.floor * problems.cost, -1)
    for ratio in (problems.ratio, np.zeros_like(problems.ratio)):
      exact = problems._replace(ratio=ratio, limit=least)
      np.testing.assert_array_equal(_to_counts_each(exact), problems.floor)

  def test_limits_that_are_whole_allocations_are_spent(self):
    # Wishes a float32 rounding below a whole step must count as that step.
    problems = _roundings(9)
    source = np.random.default_rng(9)
    steps = source.integers(1, 1 + problems.units // problems.step)
    wanted = steps * problems.step
    ratio = (wanted / problems.units).astype(np.float32)
    for nudge in (-1e-7, 0.0, 1e-7):
      exact = problems._replace(
        ratio=ratio * np.float32(1 + nudge),
        limit=np.sum(wanted * problems.cost, -1),
      )
      np.testing.assert_array_equal(_to_counts_each(exact), wanted)

  def test_has_no_order_of_sublayers(self):
    problems = _roundings(10)
    counts = _to_counts_each(problems)
    by = np.random.default_rng(0).permutation(_S)
    permuted = Roundings(*(x if x.ndim == 1 else x[:, by] for x in problems))
    # Ties break by index, so only they may depend on the order; sublayers that
    # can't move have none.
    steps = problems.ratio * problems.units / problems.step
    remainder = (steps + 1e-4) % 1.0
    fixed = problems.floor == problems.units
    remainder = np.where(fixed, 2.0 + np.arange(_S), remainder)
    distinct = np.diff(np.sort(remainder, -1), axis=-1).min(-1) > 1e-5
    self.assertGreater(distinct.sum(), _CASES // 2)
    np.testing.assert_array_equal(
      _to_counts_each(permuted)[distinct], counts[:, by][distinct]
    )


if __name__ == '__main__':
  absltest.main()
