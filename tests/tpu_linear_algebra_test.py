"""Linear algebra that is compiled for TPU, which needs its compiler, no TPU."""

import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

from ffp_jax.pruning import ridge
from ffp_jax.runtime import linear_algebra, topology
from ffp_jax.runtime.sharding import make_mesh

# What the library's calls, which are unrolled, become.
_UNROLLED = 'custom_call_target="Cholesky', '"InvertDiagBlocks'


def _compile(function, *shapes, axes=()):
  """Compiles a function of float32 arrays, sharded alike, for four chips."""
  mesh = make_mesh(1, 2, 2, topology.find_devices('v5e:2x2'))
  sharding = NamedSharding(mesh, PartitionSpec(*axes))
  arguments = [
    jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    for shape in shapes
  ]
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*arguments).compile()


def _library(a, b):
  return jax.scipy.linalg.cho_solve((jax.numpy.linalg.cholesky(a), True), b)


class LinearAlgebraTest(parameterized.TestCase):
  def _assert_looped(self, compiled):
    text = compiled.as_text()
    for name in _UNROLLED:
      self.assertNotIn(name, text)
    self.assertIn(' while(', text)

  def test_the_library_is_unrolled(self):
    text = _compile(_library, (300, 300), (300, 8)).as_text()
    for name in _UNROLLED:
      self.assertIn(name, text)

  def test_factor_and_solve(self):
    size = 2048
    matrix = size, size
    factor = _compile(linear_algebra.cholesky, matrix)
    self._assert_looped(factor)
    # The factor takes the place of a copy: nothing else of its size is held.
    memory = factor.memory_analysis()
    self.assertLess(memory.temp_size_in_bytes, 4 * size * size / 2)
    self._assert_looped(
      _compile(linear_algebra.cholesky_solve, matrix, (size, 1024))
    )

  def test_a_split_matrix_is_gathered_once(self):
    size, outputs = 2048, 1024

    def fit(gram, cross, weight):
      moments = ridge.Moments(gram, cross)
      mask = jax.numpy.ones(size)
      return ridge.select_strength(moments, moments, weight, mask, (0.1, 1.0))

    compiled = _compile(
      fit,
      (size, size),
      (size, outputs),
      (size, outputs),
      axes=('tensor', 'fsdp'),
    )
    self._assert_looped(compiled)
    # Not inside the loops over blocks, which are those of the TPU's branch.
    lines = compiled.as_text().splitlines()
    moves = [x for x in lines if ' all-gather' in x or ' all-reduce' in x]
    self.assertNotEmpty(moves)
    for line in moves:
      self.assertNotIn('branch_0_fun/while', line)


if __name__ == '__main__':
  absltest.main()
