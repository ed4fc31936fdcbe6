"""Whether a run fits, before there are weights or devices.

python -m ffp_jax.plan --config=configs/llama2_7b.py --devices=8 \
  --device_memory_gib=80 --tflops=400

Compiles the search step and the calibration of one layer ahead of time, for
as many virtual devices, and asks the compiler what memory they take.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from ffp_jax import config as config_lib
from ffp_jax import errors
from ffp_jax.checkpoints import hub, model_config
from ffp_jax.evaluation import loss
from ffp_jax.models import families, functional
from ffp_jax.pruning import allocation, calibration, masks, search
from ffp_jax.pruning.sublayers import find_sublayers
from ffp_jax.runtime import cli, device_memory, sharding
from ffp_jax.text import tokenization

_GIB = 2**30


def abstract_params(model, dtype, mesh):
  """The decoder's parameters as shapes with their shardings."""
  shapes = families.param_shapes(model, dtype)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.param_shardings(shapes, mesh),
  )


def search_memory(config, model, params) -> device_memory.Memory:
  """Of the step of the curriculum's stage with the most rows."""
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
  apply = functional.make_apply(model, remat=config.search.remat)
  step = search.make_step(
    net,
    optim,
    lambda p, t, m: loss.nll(apply, p, t, m),
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


def calibration_memory(config, model, params) -> device_memory.Memory:
  """Of one layer: its weights, and the residual streams of all windows."""
  text = config.text
  windows = text.calibration_windows + text.validation_windows
  shape = windows, 1, text.context, model.width
  stream = jax.ShapeDtypeStruct(shape, params['embed']['table'].dtype)

  def of_layer(x):
    spec = jax.sharding.PartitionSpec(*x.sharding.spec[1:])
    place = jax.sharding.NamedSharding(x.sharding.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place)

  keep = jnp.ones(model.groups), jnp.ones(model.ffn)
  return device_memory.memory_needed(
    calibration.calibrate_layer,
    jax.tree.map(of_layer, params['stack']),
    stream,
    keep,
    config=model,
    fit_on=text.calibration_windows,
    strengths=tuple(config.calibration.strengths),
  )


def flops(config, model) -> float:
  """Of one search step, by the products with the weights and of attention.

  A candidate takes a forward pass and, if its gradient is wanted, a backward
  pass to activations and masks alone, as dear as one forward; with `remat`
  one more.
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


def plan(config, model, dtype, mesh) -> dict:
  """What one search step and the calibration take on each device.

  The compiler is asked about float32: for bfloat16, which CPU compilers
  widen, weights are counted at two bytes and the rest as in float32, more
  than it will be.
  """
  scored = dataclasses.replace(model, refit=config_lib.refits(config))
  with jax.set_mesh(mesh):
    params = abstract_params(model, jnp.float32, mesh)
    scored_params = abstract_params(scored, jnp.float32, mesh)
    weights = _local(params) * dtype.itemsize
    step = search_memory(config, scored, scored_params)
    layer = calibration_memory(config, model, params)
  of_search = _local(scored_params) * dtype.itemsize
  if scored.refit:  # beside the output projections as they are
    stack = params['stack']
    kept = stack['attention']['out'], stack['ffn']['down']
    of_search += _local(kept) * dtype.itemsize
  wide = _local(scored_params) * np.dtype(np.float32).itemsize
  return {
    'params': families.param_count(model),
    'mesh': dict(mesh.shape),
    'weights_bytes': weights,
    'search_bytes': step.total - wide + of_search,
    'calibrate_bytes': layer.total + weights,
    'candidates': config.search.candidates,
    'flops': flops(config, scored),
  }


def _local(params) -> int:
  """Parameters on each device."""
  leaves = jax.tree.leaves(params)
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in leaves)


def describe(found: dict, memory_gib: float, tflops: float | None) -> str:
  """The plan as lines to read."""
  gib = {k: v / _GIB for k, v in found.items() if k.endswith('_bytes')}
  peak = max(gib['search_bytes'], gib['calibrate_bytes'])
  sizes = ' x '.join(f'{name} {n}' for name, n in found['mesh'].items())
  lines = [
    f'parameters           {found["params"] / 1e9:.2f} billion',
    f'mesh                 {sizes}',
    f'weights              {gib["weights_bytes"]:.1f} GiB a device',
    f'search step          {gib["search_bytes"]:.1f} GiB a device',
    f'calibration          {gib["calibrate_bytes"]:.1f} GiB a device',
    f'candidates a step    {found["candidates"]}',
    f'FLOPs a search step  {found["flops"]:.3g}',
  ]
  if tflops:
    devices = np.prod(list(found['mesh'].values()))
    seconds = found['flops'] / (tflops * 1e12 * devices)
    lines.append(f'seconds a step       {seconds:.1f} at best')
  verdict = 'fits' if peak <= memory_gib else 'DOES NOT FIT'
  return '\n'.join([*lines, f'{verdict} in {memory_gib:g} GiB a device'])


def main(argv):
  del argv
  args = flags.FLAGS
  config = args.config
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', args.devices)
  try:
    config_lib.validate(config)
    model = model_config.read_model_config(hub.resolve_model(config.model))
    tokenization.check_tokens(model, (), config.text.context)
    mesh = sharding.make_mesh(**config.mesh)
    dtype = jnp.dtype('bfloat16' if config.dtype == 'auto' else config.dtype)
    found = plan(config, model, dtype, mesh)
  except errors.RequestError as error:
    errors.refuse(error)
  print(describe(found, args.device_memory_gib, args.tflops))


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', help_string='Settings.')
  flags.DEFINE_integer('devices', 1, 'How many.', lower_bound=1)
  flags.DEFINE_float(
    'device_memory_gib', 80.0, 'Of one device.', lower_bound=0.0
  )
  flags.DEFINE_float(
    'tflops', None, 'What one device reaches, if known.', lower_bound=0.0
  )
  app.run(
    main,
    flags_parser=functools.partial(
      cli.parse_flags, config='a file such as configs/llama2_7b.py'
    ),
  )
