"""Memory and FLOPs of a run, from shapes alone, without weights or devices.

Memory is what the compiler says of the program for each device of a mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ffp_jax.models import adapters, families
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import allocation, calibration, masks, recovery, search
from ffp_jax.pruning.sublayers import find_sublayers
from ffp_jax.runtime import device_memory, sharding


def abstract_params(
  model: ModelConfig, dtype: jnp.dtype, mesh: jax.sharding.Mesh
) -> dict:
  """Returns the decoder's parameters as shapes with their shardings."""
  return _place(families.param_shapes(model, dtype), mesh)


def _place(shapes: dict, mesh: jax.sharding.Mesh) -> dict:
  """Returns shapes of parameters with their shardings."""
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
  shape = 1, text.context, model.width
  streams = jax.eval_shape(
    lambda: calibration.Streams(
      jnp.zeros((text.calibration_windows, *shape), dtype),
      jnp.zeros((text.validation_windows, *shape), dtype),
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


def recovery_memory(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  params: dict,
  rank: int,
) -> device_memory.Memory:
  """Returns what a training step of recovery takes, in float32.

  Among the arguments is the best state so far, which lies beside the step.
  Weights that the dense model and the trained one share are there once.

  Args:
    config: of the run.
    model: of the dense decoder.
    params: of it, abstract; see `abstract_params`.
    rank: of the low-rank updates, 0 to train every weight.
  """
  settings = config.recovery
  keep = masks.ones(model.layers, model.groups, model.ffn)
  mesh = jax.sharding.get_mesh()
  if rank:
    trained, frozen = _place(adapters.factor_shapes(model, rank), mesh), params
  else:
    trained, frozen = abstract_params(model, jnp.float32, mesh), {}
  optim = recovery.optimizer()
  moments = optax.tree_utils.tree_map_params(
    optim, lambda _, x: x, jax.eval_shape(optim.init, trained), trained
  )
  step = recovery.make_step(
    model,
    optim,
    recovery.schedule(peak=1.0, warmup=1, steps=2),
    rank=rank,
    cross_entropy=settings.cross_entropy,
    remat=settings.remat,
  )
  tokens = settings.accumulate, settings.rows, config.text.context
  memory = device_memory.memory_needed(
    step,
    trained,
    moments,
    np.int32(0),
    np.float32(1.0),
    frozen,
    params,
    keep,
    jax.ShapeDtypeStruct(tokens, jnp.int32),
  )
  size = np.dtype(np.float32).itemsize
  beside = local_size(trained)
  if rank:  # calibration changed the output projections alone
    stack = params['stack']
    changed = stack['attention']['out'], stack['ffn']['down']
    beside += local_size(changed) - local_size(params)
  return memory._replace(arguments=memory.arguments + beside * size)


def recovery_flops(
  config: ml_collections.ConfigDict, model: ModelConfig, rank: int
) -> float:
  """Returns the FLOPs of one training step of recovery on all devices.

  A token takes a forward pass of the dense model, and of the pruned one a
  forward pass and a backward pass; this costs as much as two forward ones, or
  one where only low-rank updates are trained; `remat` adds one more. What the
  masks remove is computed and thrown away, and so is counted.

  Args:
    config: of the run.
    model: of the dense decoder.
    rank: of the low-rank updates, 0 to train every weight.
  """
  passes = 1 + 1 + (1 if rank else 2) + (1 if config.recovery.remat else 0)
  context = config.text.context
  rows = config.recovery.rows * config.recovery.accumulate
  return passes * rows * context * sum(forward_flops(model, context))


def flops(config: ml_collections.ConfigDict, model: ModelConfig) -> float:
  """Returns the FLOPs of one search step on all devices.

  A candidate takes a forward pass and, if its gradient is wanted, a backward
  pass to activations and masks alone, which costs as much as a forward pass;
  `remat` adds another one.

  Args:
    config: of the run.
    model: of the decoder that scores candidates, refit or not.
  """
  c = config.search
  forward = max(c.rows) * c.context * sum(forward_flops(model, c.context))
  backward = (2 if c.remat else 1) if config.policy.pathwise_weight else 0
  return forward * c.candidates * (1 + backward)


def forward_flops(model: ModelConfig, context: int) -> tuple[int, int]:
  """Returns the FLOPs that a forward pass takes for each token.

  Args:
    model: of the decoder, dense or sliced.
    context: tokens that attention looks at; those that it masks count too.

  Returns:
    (FLOPs of the products with the weights, of those of attention).
  """
  shapes = jax.tree.leaves(families.param_shapes(model, jnp.float32))
  products = sum(int(np.prod(x.shape)) for x in shapes)
  if not model.tied:  # the embedding is looked up, not multiplied
    products -= model.vocab * (model.embed_width or model.width)
  groups = sum(model.widths(i)[0] for i in range(model.layers))
  heads = groups * model.heads_per_group * model.head_size
  return 2 * products, 4 * heads * context


def local_size(params) -> int:
  """Returns how many of some abstract parameters each device holds."""
  leaves = jax.tree.leaves(params)
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in leaves)
