"""Arrays of a run as shapes with their shardings: nothing is computed.

The arguments that programs are compiled with, before there are weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ffp_jax.models import families
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import masks
from ffp_jax.runtime import sharding


def params(model: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> dict:
  """Returns the parameters of a decoder.

  Args:
    model: of the decoder.
    dtype: of the weights.
    mesh: of the devices.
  """
  return place(families.param_shapes(model, dtype), mesh)


def local_bytes(tree: Any) -> int:
  """Returns the bytes that a device holds of some abstract arrays."""
  total = 0
  for x in jax.tree.leaves(tree):
    x = jax.typeof(x) if np.isscalar(x) else x
    where = getattr(x, 'sharding', None)
    shape = where.shard_shape(x.shape) if where else x.shape
    total += int(np.prod(shape)) * x.dtype.itemsize
  return total


def place(shapes: dict, mesh: Mesh) -> dict:
  """Returns shapes of parameters with their shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.param_shardings(shapes, mesh),
  )


def tokens(*shape: int) -> jax.ShapeDtypeStruct:
  """Returns int32 token ids, or with no axis another integer."""
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def scalar() -> jax.ShapeDtypeStruct:
  """Returns a float32 number."""
  return jax.ShapeDtypeStruct((), jnp.float32)


def keep(model: ModelConfig) -> Masks:
  """Returns the shapes of the masks of all layers."""
  return jax.eval_shape(
    lambda: masks.ones(model.layers, model.groups, model.ffn)
  )


def streams(windows, config, model, params, mesh) -> jax.ShapeDtypeStruct:
  """Returns the residual streams [W,B,T,D], split as the decoder has them.

  Args:
    windows: W, each a batch of one row.
    config: of the run.
    model: of the decoder.
    params: of the decoder, in whose type the streams are.
    mesh: of the devices.
  """
  shape = windows, 1, config.text.context, model.width
  spec = sharding.partition_spec(
    shape, (None, 'batch', None, 'embed'), mesh.shape
  )
  dtype = params['embed']['table'].dtype
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def first_layer(params: dict, keep: Masks) -> tuple[dict, Masks]:
  """Returns the parameters and the masks of one layer."""

  def first(x):
    where = x.sharding
    if where is not None:
      where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where)

  return jax.tree.map(first, (params['stack'], keep))
