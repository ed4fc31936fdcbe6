import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.pruning import ridge
from ffp_jax.pruning.ridge import Moments
from tests import tiny_run
from tests.numpy_ridge import STRENGTHS, distance, least_squares, pick

# Jitted, or their loops would be compiled anew at every call.
_RIDGE = jax.jit(ridge.ridge_regression)
_CHOOSE = jax.jit(ridge.select_strength)
_ERROR = jax.jit(ridge.squared_error)


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _moments(x, y):
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  return Moments(jnp.float32(x.T @ x), jnp.float32(x.T @ y))


def _problem(seed, inputs=12, outputs=7, tokens=60):
  """(x, x of another model, weight, mask); removed inputs are correlated."""
  source = np.random.default_rng(seed)
  mix = source.standard_normal((inputs, inputs)) / np.sqrt(inputs)
  x = source.standard_normal((tokens, inputs)) @ (np.eye(inputs) + mix)
  other = x + 0.3 * source.standard_normal(x.shape)
  weight = source.standard_normal((inputs, outputs)).astype(np.float32)
  mask = source.permutation(np.arange(inputs) % 3 > 0).astype(np.float32)
  return x, other, weight, mask


class RidgeTest(parameterized.TestCase):
  @parameterized.product(
    target=('own', 'dense'), strength=(1e-3, 0.1, 10.0), seed=(0, 1)
  )
  def test_against_least_squares(self, target, strength, seed):
    x, other, weight, mask = _problem(seed)
    y = (x if target == 'own' else other) @ weight
    ours = _RIDGE(_moments(x, y), weight, mask, strength)
    theirs = least_squares(x, y, weight, mask, strength)
    self.assertLess(distance(ours, theirs), 1e-4)
    self.assertGreater(distance(ours, weight * mask[:, None]), 1e-3)

  @parameterized.parameters(1e-3, 1.0)
  def test_rows_of_removed_inputs_are_zero(self, strength):
    x, _, weight, mask = _problem(0)
    ours = _RIDGE(_moments(x, x @ weight), weight, mask, strength)
    self.assertGreater((mask == 0).sum(), 2)
    np.testing.assert_array_equal(ours[mask == 0], 0.0)
    self.assertTrue((np.abs(ours[mask == 1]).max(1) > 0).all())

  def test_nothing_removed_changes_nothing(self):
    x, _, weight, mask = _problem(0)
    moments = _moments(x, x @ weight)
    ours = _RIDGE(moments, weight, np.ones_like(mask), 0.01)
    self.assertLess(distance(ours, weight), 1e-5)

  def test_everything_removed_is_zero(self):
    x, _, weight, mask = _problem(0)
    moments = _moments(x, x @ weight)
    ours = _RIDGE(moments, weight, np.zeros_like(mask), 0.01)
    np.testing.assert_array_equal(ours, np.zeros_like(weight))

  def test_a_strong_ridge_keeps_the_weights(self):
    x, _, weight, mask = _problem(0)
    ours = _RIDGE(_moments(x, x @ weight), weight, mask, 1e6)
    self.assertLess(distance(ours, weight * mask[:, None]), 1e-4)

  def test_a_removed_copy_is_taken_over(self):
    # Input 1 is input 0 over again: its weight moves there.
    x, _, weight, _ = _problem(0)
    x[:, 1] = x[:, 0]
    mask = np.ones(len(weight), np.float32)
    mask[1] = 0.0
    ours = _RIDGE(_moments(x, x @ weight), weight, mask, 1e-6)
    expected = weight.copy()
    expected[0] += expected[1]
    expected[1] = 0.0
    self.assertLess(distance(ours, expected), 1e-3)

  @parameterized.parameters(1e-12, 1e-9, 0.0)
  def test_a_failing_factorisation_is_raised(self, strength):
    # Six tokens for twelve inputs, large and nearly alike: the float32 Gram
    # matrix isn't positive definite.
    x, _, weight, mask = _problem(0, tokens=6)
    x = 1.0 + 1e-3 * x
    moments = _moments(x, x @ weight)
    kept = np.asarray(moments.gram_IxI) * mask * mask[:, None]
    mean = np.trace(kept) / mask.sum()
    lifted = kept + np.diag(np.where(mask > 0, strength * mean, 1.0))
    self.assertFalse(np.isfinite(jnp.linalg.cholesky(lifted)).all())
    ours = _RIDGE(moments, weight, mask, strength)
    self.assertTrue(np.isfinite(ours).all())
    np.testing.assert_array_equal(ours[mask == 0], 0.0)
    before = _ERROR(moments, weight * mask[:, None])
    after = _ERROR(moments, ours)
    if strength:
      self.assertLess(after, before)
    else:  # ten times nothing is nothing
      np.testing.assert_array_equal(ours, weight * mask[:, None])

  def test_dead_inputs(self):
    x, _, weight, mask = _problem(0)
    moments = _moments(0 * x, 0 * x @ weight)
    ours = _RIDGE(moments, weight, mask, 0.1)
    np.testing.assert_array_equal(ours, weight * mask[:, None])

  @parameterized.parameters(*range(3))
  def test_error_is_the_squared_error_but_for_a_constant(self, seed):
    x, other, weight, mask = _problem(seed)
    y = other @ weight
    moments = _moments(x, y)
    for new in (weight, weight * mask[:, None], 0 * weight):
      ours = _ERROR(moments, new) + np.square(y).sum()
      theirs = np.square(x @ new - y).sum()
      self.assertAlmostEqual(ours, theirs, delta=1e-5 * np.square(y).sum())


class ChooseTest(parameterized.TestCase):
  @parameterized.product(
    seed=(0, 1, 2, 3), strengths=((0.01, 0.1, 1.0), (30.0, 0.3, 3.0))
  )
  def test_best_on_unseen_tokens(self, seed, strengths):
    # Few and noisy tokens, so that the best strength varies.
    x, other, weight, mask = _problem(seed, tokens=20 + 10 * seed)
    half = len(x) // 2
    y = other @ weight
    fit, check = (x[:half], y[:half]), (x[half:], y[half:])
    ours, index = _CHOOSE(
      _moments(*fit), _moments(*check), weight, mask, strengths
    )
    theirs, expected = pick(fit, check, weight, mask, strengths)
    self.assertEqual(index, expected)
    self.assertLess(distance(ours, theirs), 1e-3)

  @parameterized.parameters(*range(3))
  def test_every_strength_wins_somewhere(self, expected):
    # Unseen tokens that were made by the ridge of one strength.
    x, _, weight, mask = _problem(0)
    moments = _moments(x, x @ weight)
    best = _RIDGE(moments, weight, mask, STRENGTHS[expected])
    _, index = _CHOOSE(moments, _moments(x, x @ best), weight, mask, STRENGTHS)
    self.assertEqual(index, expected)

  def test_no_change_where_no_strength_helps(self):
    # Seen, the removed half is the kept half; unseen, its opposite.
    source = np.random.default_rng(0)
    half = source.standard_normal((40, 6))
    weight = source.standard_normal((12, 5)).astype(np.float32)
    mask = np.repeat(np.float32([1, 0]), 6)
    seen, unseen = (np.hstack([half, sign * half]) for sign in (1, -1))
    ours, index = _CHOOSE(
      _moments(seen, seen @ weight),
      _moments(unseen, unseen @ weight),
      weight,
      mask,
      STRENGTHS,
    )
    self.assertEqual(index, -1)
    np.testing.assert_array_equal(ours, weight * mask[:, None])

  def test_without_strengths(self):
    x, _, weight, mask = _problem(0)
    moments = _moments(x, x @ weight)
    ours, index = _CHOOSE(moments, moments, weight, mask, ())
    self.assertEqual(index, -1)
    np.testing.assert_array_equal(ours, weight * mask[:, None])


if __name__ == '__main__':
  absltest.main()
