"""Memory and FLOPs of a run, from shapes alone, without weights or devices.

Memory is what the compiler says of the program for each device of a mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ffp_jax.models import families
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import allocation, calibration, masks, search
from ffp_jax.pruning.sublayers import find_sublayers
from ffp_jax.runtime import device_memory, sharding


def abstract_params(
  model: ModelConfig, dtype: jnp.dtype, mesh: jax.sharding.Mesh
) -> dict:
  """Returns the decoder's parameters as shapes with their shardings."""
  shapes = families.param_shapes(model, dtype)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.param_shardings(shapes, mesh),
  )


def search_memory(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  params: dict,
  nll: Callable,
) -> device_memory.Memory:
  """Returns what a step of the stage with the most rows takes.

  Args:
    config: of the run.
    model: of the decoder that scores candidates, refit or not.
    params: of it, abstract; see `abstract_params`.
    nll: its losses, as `search.make_step` takes them.
  """
  sublayers = find_sublayers(
    model,
    round_heads=config.budget.round_heads,
    round_ffn=config.budget.round_ffn,
  )
  rank = jax.tree.map(
    lambda x: x.astype(jnp.int32),
    masks.ones(model.layers, model.groups, model.ffn),
  )
  net, optim = search.make_policy(config, sublayers)
  step = search.make_step(
    net,
    optim,
    nll,
    config,
    config.search.block or 1,
  )
  first = search.initial_priorities(sublayers, config.search.attention_prior)
  state = search.init(
    jax.random.key(0), net, optim, first, size=config.search.finalists
  )
  rows = max(config.search.rows)
  return device_memory.memory_needed(
    step,
    state,
    params,
    np.zeros((rows, config.search.context), np.int32),
    np.float32(0.0),
    allocation.make_target(sublayers, config.budget.sparsity),
    allocation.to_device(sublayers, rank),
  )


def calibration_memory(
  config: ml_collections.ConfigDict, model: ModelConfig, params: dict
) -> device_memory.Memory:
  """Returns what the calibration of one layer takes.

  That is its weights and the residual streams of all windows.

  Args:
    config: of the run.
    model: of the dense decoder.
    params: of it, abstract; see `abstract_params`.
  """
  text = config.text
  dtype = params['embed']['table'].dtype
  streams = calibration.Streams(
    *(
      jax.ShapeDtypeStruct((windows, 1, text.context, model.width), dtype)
      for windows in (text.calibration_windows, text.validation_windows)
    )
  )

  def one_layer(x):
    spec = jax.sharding.PartitionSpec(*x.sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(x.sharding.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

  keep = jnp.ones(model.groups), jnp.ones(model.ffn)
  return device_memory.memory_needed(
    calibration.calibrate_layer,
    jax.tree.map(one_layer, params['stack']),
    streams,
    keep,
    config=model,
    strengths=tuple(config.calibration.strengths),
  )


def flops(config: ml_collections.ConfigDict, model: ModelConfig) -> float:
  """Returns the FLOPs of one search step on all devices.

  Counts the products with the weights and those of attention. A candidate
  takes a forward pass and, if its gradient is wanted, a backward pass to
  activations and masks alone, which costs as much as a forward pass; `remat`
  adds another one.

  Args:
    config: of the run.
    model: of the decoder that scores candidates, refit or not.
  """
  c = config.search
  rows = max(c.rows)
  shapes = jax.tree.leaves(families.param_shapes(model, jnp.float32))
  products = sum(int(np.prod(x.shape)) for x in shapes)
  if not model.tied:  # the embedding is looked up, not multiplied
    products -= model.vocab * (model.embed_width or model.width)
  heads = model.groups * model.heads_per_group * model.head_size
  attention = 4 * model.layers * heads * c.context
  forward = rows * c.context * (2 * products + attention)
  backward = (2 if c.remat else 1) if config.policy.pathwise_weight else 0
  return forward * c.candidates * (1 + backward)


def local_size(params) -> int:
  """Returns how many of some abstract parameters each device holds."""
  leaves = jax.tree.leaves(params)
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in leaves)
