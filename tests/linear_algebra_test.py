import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from absl.testing import absltest, parameterized

from ffp_jax.runtime import linear_algebra
from tests import tiny_run

_CHOLESKY = jax.jit(linear_algebra.blocked_cholesky)
_SOLVE = jax.jit(linear_algebra.blocked_cholesky_solve)
_INVERT = jax.jit(lambda x: linear_algebra.blocked_solve(x, jnp.eye(len(x))))

_SIZES = 1, 7, 255, 256, 257, 700  # around a block of 256


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _positive(size, condition=100.0, seed=0):
  """A symmetric matrix, float32, with eigenvalues from 1 down."""
  source = np.random.default_rng(seed)
  basis, _ = np.linalg.qr(source.standard_normal((size, size)))
  values = np.geomspace(1.0, 1.0 / condition, size)
  matrix = (basis * values) @ basis.T
  return np.float32(matrix + matrix.T) / 2


def _rest(product, expected):
  """The share of `expected` that a product misses, in float64."""
  return np.linalg.norm(product - expected) / np.linalg.norm(expected)


def _product(*factors):
  return np.linalg.multi_dot([np.asarray(x, np.float64) for x in factors])


class BlockedTest(parameterized.TestCase):
  @parameterized.product(size=_SIZES, condition=(100.0, 1e5, 1e6))
  def test_as_exact_as_lapack(self, size, condition):
    matrix = _positive(size, condition)
    right = np.random.default_rng(1).standard_normal((size, 5))
    right = right.astype(np.float32)
    lower = np.asarray(_CHOLESKY(matrix))
    lapack = scipy.linalg.cholesky(matrix, lower=True)
    self.assertEqual(lapack.dtype, np.float32)
    np.testing.assert_array_equal(np.triu(lower, 1), 0.0)
    self.assertTrue((np.diag(lower) > 0).all())

    def factor_error(lower):
      return _rest(_product(lower, lower.T), matrix)

    self._assert_near(factor_error(lower), factor_error(lapack))

    def solve_error(solution):
      # Of the system that is solved, so that its condition has no part.
      scale = np.linalg.norm(matrix, 2) * np.linalg.norm(solution)
      return np.linalg.norm(_product(matrix, solution) - right) / scale

    self._assert_near(
      solve_error(_SOLVE(lower, right)),
      solve_error(scipy.linalg.cho_solve((lapack, True), right)),
    )

    def inverse_error(inverse):
      return _rest(_product(inverse, lower), np.eye(size))

    inverse = np.asarray(_INVERT(lower))
    np.testing.assert_array_equal(np.triu(inverse, 1), 0.0)
    self._assert_near(
      inverse_error(inverse),
      inverse_error(
        scipy.linalg.solve_triangular(
          lower, np.eye(size, dtype=np.float32), lower=True
        )
      ),
    )

  def _assert_near(self, ours, lapack):
    self.assertLess(ours, 4 * lapack + 1e-8)

  @parameterized.parameters(*_SIZES)
  def test_close_to_float64(self, size):
    matrix = _positive(size, condition=10.0)
    right = np.random.default_rng(1).standard_normal((size, size + 3))
    lower = np.linalg.cholesky(matrix.astype(np.float64))
    ours = _CHOLESKY(matrix)
    np.testing.assert_allclose(ours, lower, atol=3e-6)
    np.testing.assert_allclose(_INVERT(ours), np.linalg.inv(lower), atol=3e-5)
    solution = np.linalg.solve(matrix.astype(np.float64), right)
    ours = _SOLVE(ours, np.float32(right))
    np.testing.assert_allclose(ours, solution, atol=1e-4)

  @parameterized.product(size=(1, 255, 256, 257, 700), transposed=(False, True))
  def test_solves_with_either_triangle(self, size, transposed):
    lower = np.linalg.cholesky(_positive(size, condition=10.0))
    right = np.random.default_rng(1).standard_normal((size, 3))
    ours = linear_algebra.blocked_solve(
      lower, np.float32(right), transposed=transposed
    )
    expected = scipy.linalg.solve_triangular(
      lower.astype(np.float64), right, lower=True, trans=int(transposed)
    )
    np.testing.assert_allclose(ours, expected, atol=3e-5)

  @parameterized.parameters(*_SIZES)
  def test_zero_rows_with_one_on_the_diagonal(self, size):
    mask = np.random.default_rng(2).permutation(size) % 3 > 0
    matrix = np.where(mask & mask[:, None], _positive(size), np.eye(size))
    right = np.random.default_rng(1).standard_normal((size, 4))
    right = np.float32(right * mask[:, None])
    lower = np.asarray(_CHOLESKY(np.float32(matrix)))
    np.testing.assert_array_equal(lower[~mask], np.eye(size)[~mask])
    ours = np.asarray(_SOLVE(lower, right))
    np.testing.assert_array_equal(ours[~mask], 0.0)
    kept = matrix[mask][:, mask]
    expected = np.linalg.solve(kept.astype(np.float64), right[mask])
    np.testing.assert_allclose(ours[mask], expected, rtol=1e-3, atol=1e-4)

  @parameterized.product(size=_SIZES, at=('first', 'middle', 'last'))
  def test_failure_is_not_finite(self, size, at):
    row = {'first': 0, 'middle': size // 2, 'last': size - 1}[at]
    for pivot in (-0.5, 0.0, np.nan):  # indefinite, singular, unknown
      matrix = np.eye(size, dtype=np.float32)
      matrix[row, row] = pivot
      lower = _CHOLESKY(matrix)
      self.assertFalse(np.isfinite(lower).all())
      solution = _SOLVE(lower, np.ones((size, 2), np.float32))
      self.assertFalse(np.isfinite(solution).all())
      self.assertFalse(np.isfinite(_INVERT(lower)).all())

  def test_failure_in_a_full_matrix(self):
    indefinite = _positive(700) - 0.5 * np.eye(700, dtype=np.float32)
    self.assertFalse(np.isfinite(_CHOLESKY(indefinite)).all())


class LibraryTest(parameterized.TestCase):
  """On CPU, what was there before is called, to the last bit."""

  @parameterized.parameters(7, 257)
  def test_bits(self, size):
    matrix = _positive(size)
    right = np.random.default_rng(1).standard_normal((size, 3))
    right = right.astype(np.float32)
    lower = jax.jit(linear_algebra.cholesky)(matrix)
    np.testing.assert_array_equal(lower, jnp.linalg.cholesky(matrix))
    np.testing.assert_array_equal(
      jax.jit(linear_algebra.cholesky_solve)(lower, right),
      jax.scipy.linalg.cho_solve((lower, True), right),
    )
    np.testing.assert_array_equal(
      jax.jit(linear_algebra.invert_lower)(lower),
      jax.scipy.linalg.solve_triangular(lower, np.eye(size), lower=True),
    )

  def test_only_the_library_is_compiled(self):
    x = jax.ShapeDtypeStruct((700, 700), np.float32)
    text = jax.jit(linear_algebra.cholesky).lower(x).compile().as_text()
    self.assertIn('potrf', text)
    self.assertNotIn('while', text)


if __name__ == '__main__':
  absltest.main()
