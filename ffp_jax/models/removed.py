"""What masks take from the output of a sublayer whose kept units are refit.

`pruning/refit.py` says what the factors are. Shape letters as in decoder.py,
and I inputs of an output projection, U units, C blocks of J inputs.

The mesh axis `tensor` splits I of the basis and D of the weight: of each block
only its J inputs are summed over it, and what all blocks take is gathered once.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ffp_jax.runtime.sharding import constrain

FACTORS = ('basis', 'weight', 'order')  # names of the fields of `Refit`
_BLOCKS = 8  # of the inputs of a sublayer; those without a cut are skipped


class Refit(NamedTuple):
  """The factors of a sublayer, their columns in the order of the ranks.

  The last block is padded with zeros.
  """

  basis_CxIxJ: jax.Array  # maps inputs to others that are not correlated
  weight_CxJxD: jax.Array  # the output projection of those
  order_U: jax.Array  # int32, the units in the order of their ranks


def refit_shapes(inputs: int, units: int, width: int) -> tuple:
  """Returns the shapes of the factors, in the order of FACTORS.

  Args:
    inputs: I.
    units: U.
    width: D.
  """
  columns = math.ceil(inputs / _BLOCKS)
  basis, weight = (_BLOCKS, inputs, columns), (_BLOCKS, columns, width)
  return basis, weight, (units,)


def find_factors(params: dict) -> list:
  """Returns the factors among the parameters of a decoder."""
  leaves = jax.tree.leaves_with_path(params)
  return [x for path, x in leaves if path[-1].key.startswith('refit_')]


def used_share(removed: float) -> float:
  """Returns the share of the blocks that count, where a share is removed.

  A cut ends somewhere in a block, in its middle on average.
  """
  return min(1.0, removed + 1 / (2 * _BLOCKS))


def to_blocks(
  basis_IxI: jax.Array, weight_IxD: jax.Array, order_U: jax.Array
) -> Refit:
  """Returns factors in blocks, of factors whose columns are in order."""
  size, width = weight_IxD.shape
  (blocks, _, columns), shape, _ = refit_shapes(size, len(order_U), width)
  more = blocks * columns - size
  basis = jnp.pad(basis_IxI, ((0, 0), (0, more)))
  weight = jnp.pad(weight_IxD, ((0, more), (0, 0)))
  return Refit(
    basis.reshape(size, blocks, columns).swapaxes(0, 1),
    weight.reshape(shape),
    order_U,
  )


def removed_output(
  x_BxTxI: jax.Array, mask_U: jax.Array, refit: Refit
) -> jax.Array:
  """Returns what a mask takes from the output of a projection, [B,T,D].

  The cost is that of the units that are removed, by any of the masks where
  several are mapped over. The gradient is to inputs and mask; that of a mask is
  there for its removed units and for the last unit, and may be left out, as
  zero, for the others.

  Args:
    x_BxTxI: inputs of the output projection.
    mask_U: 1 keeps a unit, 0 removes it.
    refit: the factors.
  """
  blocks, _, columns = refit.basis_CxIxJ.shape
  inputs = x_BxTxI.shape[-1]
  removed_U = 1.0 - mask_U.astype(jnp.float32)[refit.order_U]
  removed_I = jnp.repeat(removed_U, inputs // len(mask_U))
  removed = jnp.pad(removed_I, (0, blocks * columns - inputs))
  removed_CxJ = removed.reshape(blocks, columns).astype(x_BxTxI.dtype)
  return _sum_blocks(
    x_BxTxI, removed_CxJ, refit.basis_CxIxJ, refit.weight_CxJxD
  )


@jax.custom_batching.custom_vmap
def _used(removed_CxJ):
  """Says which blocks count: those with a cut, and always the last.

  The last unit has a gradient where all are kept, too. Of masks that are mapped
  over, each counts the blocks of all: with a condition for each, `vmap` would
  compute all blocks.
  """
  used_C = jnp.any(removed_CxJ > 0, axis=1)
  return used_C.at[-1].set(True)


@_used.def_vmap
def _used_by_any(size, batched, removed_NxCxJ):
  del size, batched
  return _used(jnp.max(removed_NxCxJ, axis=0)), False


@jax.custom_vjp
def _sum_blocks(x_BxTxI, removed_CxJ, basis_CxIxJ, weight_CxJxD):
  """Returns (x basis * removed) weight, [B,T,D]."""
  operands = x_BxTxI, removed_CxJ, basis_CxIxJ, weight_CxJxD
  return _sum_blocks_forward(*operands)[0]


def _gather_block(basis_CxIxJ, weight_CxJxD, i):
  """Returns the factors of a block, as the mesh axis `tensor` alone splits."""
  return (
    constrain(basis_CxIxJ[i], 'ffn', None),
    constrain(weight_CxJxD[i], None, 'ffn'),
  )


def _sum_blocks_forward(x_BxTxI, removed_CxJ, basis_CxIxJ, weight_CxJxD):
  blocks, columns, width = weight_CxJxD.shape
  gather_block = functools.partial(_gather_block, basis_CxIxJ, weight_CxJxD)
  rows = x_BxTxI.shape[:-1]

  def add_block(y_BxTxD, block):
    i, used = block

    def add():
      basis_IxJ, weight_JxD = gather_block(i)
      z_BxTxJ = constrain(x_BxTxI @ basis_IxJ, 'batch', None, None)
      y = jnp.matmul(
        z_BxTxJ * removed_CxJ[i],
        weight_JxD,
        preferred_element_type=jnp.float32,
      )
      return constrain(y_BxTxD + y, 'batch', None, 'ffn'), z_BxTxJ

    zero = jnp.zeros((*rows, columns), x_BxTxI.dtype)
    return jax.lax.cond(used, add, lambda: (y_BxTxD, zero))

  y_BxTxD, z_CxBxTxJ = jax.lax.scan(
    add_block,
    jnp.zeros((*rows, width), jnp.float32),
    (jnp.arange(blocks), _used(removed_CxJ)),
  )
  kept = z_CxBxTxJ, removed_CxJ, basis_CxIxJ, weight_CxJxD
  return y_BxTxD.astype(x_BxTxI.dtype), kept


def _sum_blocks_backward(kept, gradient_BxTxD):
  z_CxBxTxJ, removed_CxJ, basis_CxIxJ, weight_CxJxD = kept
  blocks, inputs, _ = basis_CxIxJ.shape
  dtype = gradient_BxTxD.dtype
  gather_block = functools.partial(_gather_block, basis_CxIxJ, weight_CxJxD)

  def add_block(dx_BxTxI, block):
    i, used = block

    def add():
      basis_IxJ, weight_JxD = gather_block(i)
      dz_BxTxJ = constrain(gradient_BxTxD @ weight_JxD.T, 'batch', None, None)
      dx = jnp.matmul(
        dz_BxTxJ * removed_CxJ[i],
        basis_IxJ.T,
        preferred_element_type=jnp.float32,
      )
      dremoved_J = jnp.sum(dz_BxTxJ * z_CxBxTxJ[i], (0, 1))
      return constrain(dx_BxTxI + dx, 'batch', None, 'ffn'), dremoved_J

    zero = jnp.zeros_like(removed_CxJ[0])
    return jax.lax.cond(used, add, lambda: (dx_BxTxI, zero))

  dx_BxTxI, dremoved_CxJ = jax.lax.scan(
    add_block,
    jnp.zeros((*gradient_BxTxD.shape[:-1], inputs), jnp.float32),
    (jnp.arange(blocks), _used(removed_CxJ)),
  )
  return dx_BxTxI.astype(dtype), dremoved_CxJ, None, None


_sum_blocks.defvjp(_sum_blocks_forward, _sum_blocks_backward)
