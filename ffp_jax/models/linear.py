"""The linear layers of attention and FFN, with their optional factors.

Beside a weight there may be the factors of a low-rank update (adapters.py), and
beside an output projection those that refit what a mask keeps (removed.py).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffp_jax.models import removed
from ffp_jax.runtime.sharding import constrain

BIAS_INIT = nn.initializers.zeros


def init_weight(
  key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
  """Draws a weight; that of a sublayer without units has no numbers."""
  if 0 in shape:
    return jnp.zeros(shape, dtype)
  return nn.initializers.lecun_normal()(key, shape, dtype)


def declare_adapter(
  module: nn.Module,
  name: str,
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
) -> None:
  """Declares the low-rank update of a weight, if the config has a rank.

  Args:
    module: the sublayer, in its `setup`.
    name: of the weight.
    inputs, outputs: the leading and the other axes of the weight.
  """
  rank = module.config.adapter_rank
  factors = {
    'a': ((*inputs, rank), init_weight),
    'b': ((rank, *outputs), BIAS_INIT),
  }
  for factor, (shape, init) in factors.items() if rank else ():
    leaf = f'{name}_{factor}'
    setattr(module, leaf, module.param(leaf, init, shape))


@jax.custom_vjp
def _matmul(x_NxI, w_IxO):
  """Multiplies matrices, with a weight gradient that is quick on CPU.

  JAX's own gradient is a product that XLA computes from transposed copies, at
  less than half of the speed.
  """
  return x_NxI @ w_IxO


def _matmul_backward(operands, g_NxO):
  """Returns the gradients of both operands."""
  x_NxI, w_IxO = operands
  return g_NxO @ w_IxO.T, x_NxI.T @ g_NxO


_matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_backward)


def multiply(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  """Multiplies [...,I] by a weight and its low-rank update: [...,O].

  Args:
    module: the sublayer.
    name: of the weight.
    x: the inputs.
  """
  rows = x.reshape(-1, x.shape[-1])
  y = _matmul(rows, getattr(module, name).reshape(rows.shape[-1], -1))
  if module.config.adapter_rank:
    a, b = (getattr(module, f'{name}_{factor}') for factor in 'ab')
    low = _matmul(rows, a.reshape(rows.shape[-1], -1))
    y = y + _matmul(low, b.reshape(len(b), -1))
  return y.reshape(*x.shape[:-1], -1)


def declare_refit(module: nn.Module, inputs: int, units: int) -> None:
  """Declares the factors of an output projection, if the config has them.

  Args:
    module: the sublayer, in its `setup`.
    inputs: of the projection.
    units: that they belong to.
  """
  if not module.config.refit:
    return
  shapes = removed.refit_shapes(inputs, units, module.config.width)
  inits = init_weight, init_weight, nn.initializers.ones, _init_order
  for name, shape, init in zip(removed.FACTORS, shapes, inits, strict=True):
    leaf = f'refit_{name}'
    setattr(module, leaf, module.param(leaf, init, shape))


def _init_order(key, shape):
  """Returns the units in the order that they have."""
  del key
  return jnp.arange(*shape, dtype=jnp.int32)


def project_units(
  module: nn.Module, name: str, inputs: jax.Array, mask_U: jax.Array | None
) -> jax.Array:
  """Applies an output projection to the units of a mask: [B,T,D].

  Args:
    module: the sublayer.
    name: of the projection.
    inputs: [B,T,...]; those of a unit lie side by side.
    mask_U: 1 keeps a unit; None keeps all.
  """
  if not inputs.size:  # no unit is left
    width = module.config.width
    return jnp.zeros((*inputs.shape[:2], width), inputs.dtype)
  x = inputs.reshape(*inputs.shape[:2], -1)
  if mask_U is None:
    return multiply(module, name, x)
  if module.config.refit:
    factors = (getattr(module, f'refit_{y}') for y in removed.FACTORS)
    refit = removed.Refit(*factors)
    y = constrain(multiply(module, name, x), 'batch', None, 'ffn')
    return y - removed.removed_output(x, mask_U, refit)
  mask = jnp.repeat(mask_U, x.shape[-1] // len(mask_U)).astype(x.dtype)
  return multiply(module, name, x * mask)


def capture(module: nn.Module, activations: jax.Array) -> None:
  """Sows the statistic of activations under 'captured', if there is one.

  Args:
    module: the sublayer; its `capture` computes the statistic.
    activations: the inputs of its output projection.
  """
  if module.capture is not None:
    module.sow(
      'captured',
      'inputs',
      module.capture(activations),
      reduce_fn=lambda _, new: new,
      init_fn=lambda: None,
    )
