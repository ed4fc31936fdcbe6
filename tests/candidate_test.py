import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import allocation, candidate, masks
from tests import synthetic_loss, tiny_run
from tests.synthetic_loss import SUBLAYERS, L, harm


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


class CountGradientTest(parameterized.TestCase):
  @parameterized.parameters(*range(6))
  def test_against_a_loop(self, seed):
    source = np.random.default_rng(seed)
    shapes = Masks((2, 5), (2, 24))
    gradient = Masks(
      *(source.standard_normal(shape).astype(np.float32) for shape in shapes)
    )
    rank = masks.rank_all(Masks(*(source.random(shape) for shape in shapes)))
    # Every edge is met: cuts at either end, windows of a unit and of all.
    window = (0.01, 0.1, 0.2, 0.5, 1.0, 2.0)[seed]
    count_S = np.concatenate(
      [source.integers(0, 6, 2), [source.integers(0, 25), 24 * (seed % 2)]]
    ) + np.array([0.0, 0.5, 0.75, 0.0])
    count_S = np.minimum(count_S, [5, 5, 24, 24])
    ours = candidate.count_gradient(
      gradient, rank, jnp.asarray(count_S), window=window
    )
    theirs = []
    for kind in range(2):
      units = shapes[kind][1]
      for layer in range(2):
        cut = min(int(count_S[2 * kind + layer]), units - 1)
        unit_at = np.argsort(np.asarray(rank[kind][layer]))
        last = min(units, cut + max(1, round(window * units)))
        slopes = gradient[kind][layer][unit_at[cut:last]]
        slopes[1:] /= 2.0
        theirs.append(np.mean(slopes))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    self.assertEqual(ours.dtype, jnp.float32)

  @parameterized.parameters((2.0, 7.0), (2.6, 7.0), (1.3, 5.0), (4.0, 80.0))
  def test_sees_the_unit_next_to_come_back(self, count, slope):
    rank = Masks(jnp.array([[2, 0, 1, 3]]), jnp.array([[2, 0, 1, 3]]))
    slopes = Masks(*2 * (jnp.array([[7.0, 90.0, 5.0, 80.0]]),))
    got = candidate.count_gradient(
      slopes, rank, jnp.array([count, 0.0]), window=0.1
    )
    np.testing.assert_allclose(got, [slope, 90.0])

  def test_is_the_slope_between_counts_where_kept_units_are_flat(self):
    """The mean over the window of what each whole unit brings."""
    worth = np.random.default_rng(0).random(40).astype(np.float32)
    rank = Masks(jnp.zeros((1, 1), int), jnp.arange(40)[None])
    count_S = jnp.array([1.0, 10.0])

    def removed_worth(keep):
      return jnp.sum(worth * jnp.square(1.0 - keep.ffn))

    def whole(count):
      return float(
        removed_worth(masks.from_counts(rank, jnp.array([1.0, count])))
      )

    gradient = jax.grad(removed_worth)(masks.from_counts(rank, count_S))
    got = candidate.count_gradient(gradient, rank, count_S, window=0.25)
    # The first of the ten has mask 0 too, but counts as if on its way.
    expected = (whole(20.0) - whole(10.0)) / 10 - worth[10] / 10
    self.assertAlmostEqual(float(got[1]), expected, places=4)


@functools.partial(jax.jit, static_argnames='steep')
def _score_at(priority_S, factor, target, device_sublayers, steep):
  def loss_fn(masks):
    value = factor * synthetic_loss.nll(2.0, jnp.zeros((1, 8)), masks)[0]
    # The root adds nothing, with a slope that isn't a number.
    return value + jnp.sqrt(0.0 * masks.ffn.sum()) if steep else value

  dense = jnp.float32(1.0)
  limits = {'min_ratio': 0.1, 'window': 0.3, 'repair': 'project'}
  return candidate.score_candidate(
    priority_S, target, device_sublayers, loss_fn, dense, **limits
  )


def _score(priority_S, factor=1.0, steep=False):
  """(reward, gradient) of `factor` times the synthetic loss."""
  goal = allocation.make_target(SUBLAYERS, 0.4)
  device_sublayers = allocation.to_device(SUBLAYERS, synthetic_loss.rank())
  return _score_at(
    np.float32(priority_S), factor, goal, device_sublayers, steep
  )


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_not_finite(self, factor):
    reward, gradient = _score(np.zeros(2 * L), factor)
    self.assertEqual(reward, 0.0)
    np.testing.assert_array_equal(gradient, np.zeros(2 * L))

  def test_gradient_not_finite(self):
    reward, gradient = _score(np.zeros(2 * L), steep=True)
    self.assertEqual(reward, _score(np.zeros(2 * L))[0])
    np.testing.assert_array_equal(gradient, np.zeros(2 * L))

  def test_reward_and_gradient_against_finite_differences(self):
    source = np.random.default_rng(0)
    priority_S = source.standard_normal(2 * L)
    share_S = SUBLAYERS.units * SUBLAYERS.unit_cost / SUBLAYERS.total

    def smooth(priority_S):
      """The reward without rounding, in float64."""
      below, above = -50.0, 50.0
      for _ in range(100):
        shift = 0.5 * (below + above)
        kept = 0.1 + 0.9 / (1.0 + np.exp(-priority_S - shift))
        less = share_S @ kept < 0.6
        below, above = (shift, above) if less else (below, shift)
      return np.exp(1.0 - harm(kept))

    theirs = np.array(
      [
        (smooth(priority_S + step) - smooth(priority_S - step)) / 2e-4
        for step in 1e-4 * np.eye(2 * L)
      ]
    )
    reward, ours = _score(priority_S)
    self.assertAlmostEqual(float(reward), smooth(priority_S), delta=0.03)
    np.testing.assert_allclose(ours, theirs, atol=0.03 * np.abs(theirs).max())
    # Up for the sublayer that hurts most, down for the one that hurts least.
    self.assertGreater(ours[2], 0.0)
    self.assertLess(ours[0], 0.0)
    # A priority common to all changes nothing.
    self.assertAlmostEqual(float(ours.sum()), 0.0, delta=1e-4)


if __name__ == '__main__':
  absltest.main()
