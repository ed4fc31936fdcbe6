"""Low-rank updates of weights that stay as they are (LoRA, arXiv 2106.09685).

Beside a weight W [*inputs, *outputs] lie A [*inputs, r] and B [r, *outputs],
and the layer multiplies by W + A B. There is no scale: the learning rate of
Adam says how far the factors go.
"""

import dataclasses
import math

import flax.traverse_util
import jax
import jax.numpy as jnp

from ffp_jax.models import families
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.runtime.sharding import param_shardings


def join(frozen: dict, trained: dict, dtype) -> dict:
  """Puts what is trained beside what isn't, in the model's dtype."""
  flat = flax.traverse_util.flatten_dict(trained)
  flat = {path: x.astype(dtype) for path, x in flat.items()}
  flat = flax.traverse_util.flatten_dict(frozen) | flat
  return flax.traverse_util.unflatten_dict(flat)


def merge(frozen: dict, trained: dict, dtype) -> dict:
  """Folds what was trained into plain parameters of the dense decoder.

  Args:
    frozen, trained: as in `begin`.
    dtype: of the model, if all of it was trained.
  """
  if not frozen:
    return join(frozen, trained, dtype)
  flat = flax.traverse_util.flatten_dict(frozen)
  new = flax.traverse_util.flatten_dict(trained)
  for (*module, leaf), a in new.items():
    if leaf.endswith('_a'):
      name = leaf.removesuffix('_a')
      b = new[*module, f'{name}_b']
      flat[*module, name] = _folded(flat[*module, name], a, b)
  return flax.traverse_util.unflatten_dict(flat)


@jax.jit
def _folded(weight, a, b):
  """Returns stacked weights [L,...] with their low-rank updates added."""
  L, *_, r = a.shape
  update = jnp.matmul(
    a.reshape(L, -1, r),
    b.reshape(L, r, -1),
    precision=jax.lax.Precision.HIGHEST,
  )
  update = update.reshape(weight.shape)
  # What isn't updated keeps its bits, those of -0.0 too.
  new = jnp.where(update == 0.0, weight, weight + update)
  return new.astype(weight.dtype)


def draw(model: ModelConfig, keep: Masks, *, rank: int, key) -> dict:
  """Draws the low-rank updates A B of every linear layer; float32.

  A is normal with variance 1 / inputs, and zero for removed inputs; B is
  zero, so that training starts from the model as it is.

  Args:
    model: of the dense decoder.
    keep: the masks.
    rank: of the updates.
    key: PRNG key.
  """
  wide = dataclasses.replace(model, adapter_rank=rank)
  shapes = flax.traverse_util.flatten_dict(
    families.param_shapes(wide, jnp.float32)
  )
  plain = flax.traverse_util.flatten_dict(
    families.param_shapes(model, jnp.float32)
  )
  shapes = {path: x for path, x in shapes.items() if path not in plain}

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

  placed = param_shardings(flax.traverse_util.unflatten_dict(shapes))
  return jax.jit(values, out_shardings=placed)(key, keep)
