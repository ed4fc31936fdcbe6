"""Low-rank updates of frozen weights (LoRA, arXiv 2106.09685).

Each weight W [*inputs, *outputs] has factors A [*inputs, r] and
B [r, *outputs], and the layer multiplies by W + A B. There is no scale
factor, because Adam's learning rate sets the size of the update.
"""

import dataclasses
import math

import flax.traverse_util
import jax
import jax.numpy as jnp

from ffp_jax.models import families
from ffp_jax.models.config import ModelConfig
from ffp_jax.models.decoder import Masks
from ffp_jax.runtime.sharding import param_shardings


def join(frozen: dict, trained: dict, dtype: jnp.dtype) -> dict:
  """Joins frozen and trained parameters into those of one decoder.

  Args:
    frozen: parameters that are not trained; may be empty.
    trained: parameters that are trained.
    dtype: of the model, to which the trained ones are cast.
  """
  flat = flax.traverse_util.flatten_dict(trained)
  flat = {path: x.astype(dtype) for path, x in flat.items()}
  flat = flax.traverse_util.flatten_dict(frozen) | flat
  return flax.traverse_util.unflatten_dict(flat)


def merge(frozen: dict, trained: dict, dtype: jnp.dtype) -> dict:
  """Folds low-rank updates into plain parameters of the dense decoder.

  Args:
    frozen: the parameters that were not trained; empty if all were.
    trained: the low-rank factors, or all parameters.
    dtype: of the model, if all of it was trained.
  """
  if not frozen:
    return join(frozen, trained, dtype)
  flat = flax.traverse_util.flatten_dict(frozen)
  factors = flax.traverse_util.flatten_dict(trained)
  for (*module, leaf), a in factors.items():
    if leaf.endswith('_a'):
      name = leaf.removesuffix('_a')
      b = factors[*module, f'{name}_b']
      flat[*module, name] = _add_update(flat[*module, name], a, b)
  return flax.traverse_util.unflatten_dict(flat)


@jax.jit
def _add_update(weight, a, b):
  """Returns stacked weights [L,...] with their low-rank updates added."""
  L, *_, r = a.shape
  update = jnp.matmul(
    a.reshape(L, -1, r),
    b.reshape(L, r, -1),
    precision=jax.lax.Precision.HIGHEST,
  )
  update = update.reshape(weight.shape)
  # Weights without an update keep their bits, -0.0 included.
  new = jnp.where(update == 0.0, weight, weight + update)
  return new.astype(weight.dtype)


def factor_shapes(model: ModelConfig, rank: int) -> dict:
  """Returns the shapes of the factors of every linear layer, float32.

  Args:
    model: of the dense decoder.
    rank: of the updates.
  """
  adapted, plain = (
    flax.traverse_util.flatten_dict(families.param_shapes(x, jnp.float32))
    for x in (dataclasses.replace(model, adapter_rank=rank), model)
  )
  return flax.traverse_util.unflatten_dict(
    {path: x for path, x in adapted.items() if path not in plain}
  )


def draw(model: ModelConfig, keep: Masks, *, rank: int, key: jax.Array) -> dict:
  """Draws the factors A and B of every linear layer, float32.

  A is normal with variance 1 / inputs, and zero for removed inputs. B is
  zero, so that training starts from the unchanged model.

  Args:
    model: of the dense decoder.
    keep: the masks.
    rank: of the updates.
    key: PRNG key.

  Returns:
    The factors alone, nested as the parameters of the decoder.
  """
  nested = factor_shapes(model, rank)
  shapes = flax.traverse_util.flatten_dict(nested)

  def values(key, keep):
    flat = {}
    for i, (path, spec) in enumerate(sorted(shapes.items())):
      if path[-1].endswith('_b'):
        flat[path] = jnp.zeros(spec.shape)
        continue
      noise = jax.random.normal(jax.random.fold_in(key, i), spec.shape)
      flat[path] = noise / math.sqrt(math.prod(spec.shape[1:-1]))
      mask = {'out_a': keep.attention, 'down_a': keep.ffn}.get(path[-1])
      if mask is not None:
        inner = (1,) * (noise.ndim - mask.ndim)
        flat[path] *= mask.reshape(*mask.shape, *inner)
    return flax.traverse_util.unflatten_dict(flat)

  return jax.jit(values, out_shardings=param_shardings(nested))(key, keep)
