"""Cholesky factors and triangular solves that compile quickly everywhere.

On TPU, XLA unrolls both: a layer of a 7B model takes longer to compile than a
pruning run takes. There, and only there, they are computed here, in loops over
blocks that are compiled once, whatever the size. Elsewhere they are one call of
a library.

Shape letters: N rows of a matrix, B rows of a block, R right-hand sides.
"""

import jax
import jax.numpy as jnp

from ffp_jax.runtime.sharding import constrain

_BLOCK = 256  # rows and columns of a block
_LEAF = 64  # of what is done row by row, a power of two of them in a block


def cholesky(a_NxN: jax.Array) -> jax.Array:
  """Returns the lower Cholesky factor of a symmetric matrix, float32.

  It holds values that are not finite if the matrix is not positive definite.

  Args:
    a_NxN: the matrix.
  """
  return jax.lax.platform_dependent(
    a_NxN,
    tpu=blocked_cholesky,
    default=lambda a: jnp.linalg.cholesky(a, symmetrize_input=False),
  )


def cholesky_solve(lower_NxN: jax.Array, b_NxR: jax.Array) -> jax.Array:
  """Returns A^-1 B, [N,R], of the matrix A = L L'.

  Args:
    lower_NxN: L, from `cholesky`.
    b_NxR: B.
  """
  return jax.lax.platform_dependent(
    lower_NxN,
    b_NxR,
    tpu=blocked_cholesky_solve,
    default=lambda lower, b: jax.scipy.linalg.cho_solve((lower, True), b),
  )


def invert_lower(lower_NxN: jax.Array) -> jax.Array:
  """Returns the inverse of a lower triangular matrix, [N,N]."""
  return jax.lax.platform_dependent(
    lower_NxN,
    tpu=blocked_inverse,
    default=lambda lower: jax.scipy.linalg.solve_triangular(
      lower, jnp.eye(len(lower)), lower=True
    ),
  )


def product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Multiplies float32 matrices, which accelerators round by default."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def blocked_cholesky(a_NxN: jax.Array) -> jax.Array:
  """Computes `cholesky` by products of blocks, a column of blocks at a time.

  The columns of the factor take the place of those of the matrix.
  """
  size = len(a_NxN)
  # On a mesh each device does all of it: a loop over the blocks of a split
  # matrix would gather the whole of it at every step.
  a = constrain(_pad_to_blocks(a_NxN), None, None)
  blocks = len(a) // _BLOCK
  row_Nx1 = jnp.arange(len(a))[:, None]

  def factorise_column(i, a):
    def subtract(k, rest):
      return rest - product(_column(a, k), _block(a, i, k).T)

    rest_NxB = jax.lax.fori_loop(0, i, subtract, _column(a, i))
    lower = _factorise_block(_block(rest_NxB, i, 0))
    below_NxB = product(rest_NxB, _invert_block(lower).T)
    below_NxB = jnp.where(row_Nx1 < i * _BLOCK, 0.0, below_NxB)
    return _put(a, _put(below_NxB, lower, i, 0), 0, i)

  return jax.lax.fori_loop(0, blocks, factorise_column, a)[:size, :size]


def blocked_cholesky_solve(lower_NxN: jax.Array, b_NxR: jax.Array) -> jax.Array:
  """Computes `cholesky_solve` by products of blocks."""
  half = blocked_solve(lower_NxN, b_NxR)
  return blocked_solve(lower_NxN, half, transposed=True)


def blocked_inverse(lower_NxN: jax.Array) -> jax.Array:
  """Computes `invert_lower` by products of blocks."""
  return blocked_solve(lower_NxN, jnp.eye(len(lower_NxN)))


def blocked_solve(
  lower_NxN: jax.Array, b_NxR: jax.Array, *, transposed: bool = False
) -> jax.Array:
  """Solves L X = B, or L'X = B, by products of blocks.

  The rows of X take the place of those of B. A mesh may split the columns.

  Args:
    lower_NxN: L, lower triangular.
    b_NxR: B.
    transposed: whether to solve with L'.

  Returns:
    X [N,R].
  """
  size, count = b_NxR.shape
  lower = constrain(_pad_to_blocks(lower_NxN), None, None)
  blocks = len(lower) // _BLOCK
  x = jnp.pad(b_NxR, ((0, len(lower) - size), (0, 0)))
  x = constrain(x, None, 'embed')

  def rows(x, i):
    return jax.lax.dynamic_slice(x, (i * _BLOCK, 0), (_BLOCK, count))

  def solve_rows(step, x):
    i = blocks - 1 - step if transposed else step

    def subtract(k, rest):
      block = _block(lower, k, i).T if transposed else _block(lower, i, k)
      return rest - product(block, rows(x, k))

    solved = (i + 1, blocks) if transposed else (0, i)
    rest = jax.lax.fori_loop(*solved, subtract, rows(x, i))
    inverse = _invert_block(_block(lower, i, i))
    inverse = inverse.T if transposed else inverse
    return _put(x, product(inverse, rest), i, 0)

  x = jax.lax.fori_loop(0, blocks, solve_rows, x)
  return constrain(x, None, 'embed')[:size]


def _factorise_block(a_BxB: jax.Array) -> jax.Array:
  """Returns the lower Cholesky factor of a symmetric block.

  A column of leaves at a time, as `blocked_cholesky` does it with blocks.
  """
  lower = jnp.zeros_like(a_BxB)
  for start in range(0, len(a_BxB), _LEAF):
    end = start + _LEAF
    known = product(lower[start:, :start], lower[start:end, :start].T)
    rest = a_BxB[start:, start:end] - known
    leaf = _factorise_leaf(rest[:_LEAF])
    below = product(rest, _invert_leaf(leaf).T)
    lower = lower.at[start:, start:end].set(below.at[:_LEAF].set(leaf))
  return lower


def _factorise_leaf(a_BxB: jax.Array) -> jax.Array:
  """Computes `_factorise_block` row by row."""
  index = jnp.arange(len(a_BxB))

  def factorise_row(i, carry):
    rest, upper = carry
    row = jax.lax.dynamic_index_in_dim(rest, i, keepdims=False)
    pivot = jax.lax.dynamic_index_in_dim(row, i, keepdims=False)
    row = jnp.where(index < i, 0.0, row / jnp.sqrt(pivot))
    upper = jax.lax.dynamic_update_index_in_dim(upper, row, i, axis=0)
    return rest - row[:, None] * row, upper

  carry = a_BxB, jnp.zeros_like(a_BxB)
  return jax.lax.fori_loop(0, len(a_BxB), factorise_row, carry)[1].T


def _invert_block(lower_BxB: jax.Array) -> jax.Array:
  """Returns the inverse of a lower triangular block.

  The leaves on its diagonal are inverted at once. Two neighbours on the
  diagonal whose inverses are known then make one of twice the size.
  """
  starts = range(0, len(lower_BxB), _LEAF)
  leaves = [lower_BxB[i : i + _LEAF, i : i + _LEAF] for i in starts]
  inverses = [*jax.vmap(_invert_leaf)(jnp.stack(leaves))]
  while len(inverses) > 1:
    size = len(inverses[0])
    for i, last in enumerate(inverses[1::2]):
      first, middle = inverses[2 * i], (2 * i + 1) * size
      below = lower_BxB[middle : middle + size, middle - size : middle]
      corner = -product(last, product(below, first))
      inverses[2 * i] = jnp.block(
        [[first, jnp.zeros_like(first)], [corner, last]]
      )
    del inverses[1::2]
  return inverses[0]


def _invert_leaf(lower_BxB: jax.Array) -> jax.Array:
  """Computes `_invert_block` row by row."""
  index = jnp.arange(len(lower_BxB))

  def invert_row(i, inverse):
    # The rows of the inverse that are not known yet are zero.
    row = jax.lax.dynamic_index_in_dim(lower_BxB, i, keepdims=False)
    pivot = jax.lax.dynamic_index_in_dim(row, i, keepdims=False)
    known = jnp.sum(row[:, None] * inverse, axis=0)
    new = (jnp.where(index == i, 1.0, 0.0) - known) / pivot
    return jax.lax.dynamic_update_index_in_dim(inverse, new, i, axis=0)

  size = len(lower_BxB)
  return jax.lax.fori_loop(0, size, invert_row, jnp.zeros_like(lower_BxB))


def _block(
  x_NxN: jax.Array, row: jax.Array, column: jax.Array | int
) -> jax.Array:
  """Returns a block [B,B] of a matrix, by its number in each direction."""
  start = row * _BLOCK, column * _BLOCK
  return jax.lax.dynamic_slice(x_NxN, start, (_BLOCK, _BLOCK))


def _column(x_NxN: jax.Array, column: jax.Array) -> jax.Array:
  """Returns a column of blocks [N,B] of a matrix, by its number."""
  return jax.lax.dynamic_slice_in_dim(x_NxN, column * _BLOCK, _BLOCK, axis=1)


def _put(
  x: jax.Array, new: jax.Array, row: jax.Array | int, column: jax.Array | int
) -> jax.Array:
  """Returns a matrix with other values from a block on, right and down."""
  return jax.lax.dynamic_update_slice(x, new, (row * _BLOCK, column * _BLOCK))


def _pad_to_blocks(x_NxN: jax.Array) -> jax.Array:
  """Pads a matrix with an identity to a multiple of the block."""
  size = len(x_NxN)
  more = -size % _BLOCK
  padded = jnp.pad(x_NxN, ((0, more), (0, more)))
  ones = jnp.where(jnp.arange(len(padded)) < size, 0.0, 1.0)
  return padded + jnp.diag(ones) if more else padded
