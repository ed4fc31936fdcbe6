"""What masks take from the output of a sublayer whose kept units are refit.

`pruning/refit.py` says what the factors are. Shape letters as in decoder.py,
and I inputs of an output projection, U units, C blocks of J inputs.

The mesh axis `tensor` splits I of the basis and D of the weight: of each block
only its J inputs are summed over it, and what all blocks take is gathered once.

Beside bfloat16 weights the factors take one byte a number, in float8_e4m3fn, so
that a refit model takes 1.5 times the memory of the dense one instead of twice.
What that changes in the loss of a candidate is in docs/scale.md.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.runtime.sharding import constrain

FACTORS = 'basis', 'weight', 'scale', 'order'  # names of the fields of `Refit`
_SHORT = jnp.float8_e4m3fn
_BLOCKS = 8  # of the inputs of a sublayer; those without a cut are skipped


class Refit(NamedTuple):
  """The factors of a sublayer, their columns in the order of the ranks.

  The last block is padded with zeros.
  """

  basis_CxIxJ: jax.Array  # maps inputs to others that are not correlated
  weight_CxJxD: jax.Array  # the output projection of those
  scale_CxJ: jax.Array  # float32, what a column times its row is multiplied by
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
  return basis, weight, (_BLOCKS, columns), (units,)


def stored_type(name: str, dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Returns the type of a factor beside weights of a type.

  Args:
    name: of FACTORS.
    dtype: of the weights.
  """
  if name in ('basis', 'weight'):
    return jnp.dtype(_SHORT if dtype == jnp.bfloat16 else dtype)
  return jnp.dtype(jnp.int32 if name == 'order' else jnp.float32)


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
  (blocks, _, columns), *shapes, _ = refit_shapes(size, len(order_U), width)
  more = blocks * columns - size
  basis = jnp.pad(basis_IxI, ((0, 0), (0, more)))
  weight = jnp.pad(weight_IxD, ((0, more), (0, 0)))
  return Refit(
    basis.reshape(size, blocks, columns).swapaxes(0, 1),
    weight.reshape(shapes[0]),
    jnp.ones(shapes[1]),
    order_U,
  )


def store(refit: Refit, dtype: jax.typing.DTypeLike) -> Refit:
  """Returns factors in the types that they have beside weights of a type."""
  own = stored_type('basis', dtype)
  basis, of_basis_CxJ = _shorten(refit.basis_CxIxJ, own, axis=1)
  weight, of_weight_CxJ = _shorten(refit.weight_CxJxD, own, axis=2)
  return Refit(basis, weight, of_basis_CxJ * of_weight_CxJ, refit.order_U)


def _shorten(x, dtype, *, axis: int) -> tuple[jax.Array, jax.Array]:
  """Returns numbers in a type, and what they are to be multiplied by.

  Along the axis they share a power of two, which bfloat16 holds exactly, so
  that the largest of them is near the largest of the short type. It is 1 in
  other types.
  """
  if dtype != _SHORT:
    return x.astype(dtype), jnp.ones(np.delete(x.shape, axis))
  most = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
  share = jnp.where(most > 0, most, 1.0) / float(jnp.finfo(dtype).max)
  scale = jnp.ldexp(jnp.ones_like(share), jnp.frexp(share)[1])
  return (x / scale).astype(dtype), scale.squeeze(axis)


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
  removed_CxJ = removed.reshape(blocks, columns)
  return _sum_blocks(
    x_BxTxI,
    (removed_CxJ * refit.scale_CxJ).astype(x_BxTxI.dtype),
    _used(jax.lax.stop_gradient(removed_CxJ)),
    refit.basis_CxIxJ,
    refit.weight_CxJxD,
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
def _sum_blocks(x_BxTxI, scaled_CxJ, used_C, basis_CxIxJ, weight_CxJxD):
  """Returns (x basis * scaled) weight of the used blocks, [B,T,D]."""
  operands = x_BxTxI, scaled_CxJ, used_C, basis_CxIxJ, weight_CxJxD
  return _sum_blocks_forward(*operands)[0]


def _gather_block(basis_CxIxJ, weight_CxJxD, dtype, i):
  """Returns the factors of a block, as the mesh axis `tensor` alone splits."""
  return (
    constrain(basis_CxIxJ[i], 'ffn', None).astype(dtype),
    constrain(weight_CxJxD[i], None, 'ffn').astype(dtype),
  )


def _sum_blocks_forward(x_BxTxI, scaled_CxJ, used_C, basis_CxIxJ, weight_CxJxD):
  blocks, columns, width = weight_CxJxD.shape
  gather_block = functools.partial(
    _gather_block, basis_CxIxJ, weight_CxJxD, x_BxTxI.dtype
  )
  rows = x_BxTxI.shape[:-1]

  def add_block(y_BxTxD, block):
    i, used = block

    def add():
      basis_IxJ, weight_JxD = gather_block(i)
      z_BxTxJ = constrain(x_BxTxI @ basis_IxJ, 'batch', None, None)
      y = jnp.matmul(
        z_BxTxJ * scaled_CxJ[i],
        weight_JxD,
        preferred_element_type=jnp.float32,
      )
      return constrain(y_BxTxD + y, 'batch', None, 'ffn'), z_BxTxJ

    zero = jnp.zeros((*rows, columns), x_BxTxI.dtype)
    return jax.lax.cond(used, add, lambda: (y_BxTxD, zero))

  y_BxTxD, z_CxBxTxJ = jax.lax.scan(
    add_block,
    jnp.zeros((*rows, width), jnp.float32),
    (jnp.arange(blocks), used_C),
  )
  kept = z_CxBxTxJ, scaled_CxJ, used_C, basis_CxIxJ, weight_CxJxD
  return y_BxTxD.astype(x_BxTxI.dtype), kept


def _sum_blocks_backward(kept, gradient_BxTxD):
  z_CxBxTxJ, scaled_CxJ, used_C, basis_CxIxJ, weight_CxJxD = kept
  blocks, inputs, _ = basis_CxIxJ.shape
  dtype = gradient_BxTxD.dtype
  gather_block = functools.partial(
    _gather_block, basis_CxIxJ, weight_CxJxD, dtype
  )

  def add_block(dx_BxTxI, block):
    i, used = block

    def add():
      basis_IxJ, weight_JxD = gather_block(i)
      dz_BxTxJ = constrain(gradient_BxTxD @ weight_JxD.T, 'batch', None, None)
      dx = jnp.matmul(
        dz_BxTxJ * scaled_CxJ[i],
        basis_IxJ.T,
        preferred_element_type=jnp.float32,
      )
      dscaled_J = jnp.sum(dz_BxTxJ * z_CxBxTxJ[i], (0, 1))
      return constrain(dx_BxTxI + dx, 'batch', None, 'ffn'), dscaled_J

    zero = jnp.zeros_like(scaled_CxJ[0])
    return jax.lax.cond(used, add, lambda: (dx_BxTxI, zero))

  dx_BxTxI, dscaled_CxJ = jax.lax.scan(
    add_block,
    jnp.zeros((*gradient_BxTxD.shape[:-1], inputs), jnp.float32),
    (jnp.arange(blocks), used_C),
  )
  return dx_BxTxI.astype(dtype), dscaled_CxJ, None, None, None


_sum_blocks.defvjp(_sum_blocks_forward, _sum_blocks_backward)
