"""Estimates whether a run fits, before there are weights or devices.

python -m ffp_jax.plan --config=configs/llama2_7b.py --devices=8 \
  --device_memory_gib=80 --tflops=400

Compiles the search step, the calibration of one layer and the training step of
recovery ahead of time for --devices virtual devices, and asks the compiler what
memory they take.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from ffp_jax import config as config_lib
from ffp_jax import errors
from ffp_jax.checkpoints import hub, model_config
from ffp_jax.evaluation import loss
from ffp_jax.models import families, functional
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import estimates
from ffp_jax.runtime import cli, sharding
from ffp_jax.text import tokenization

_GIB = 2**30
_RANK = 8  # of LoRA, where the config has none


def plan(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  dtype: jnp.dtype,
  mesh: jax.sharding.Mesh,
) -> dict:
  """Estimates what search, calibration and recovery take on each device.

  The compiler is asked about float32, as CPU compilers widen bfloat16: with
  bfloat16, weights are counted at two bytes and the rest as in float32, which
  is an upper bound.

  Args:
    config: of the run.
    model: of the dense decoder.
    dtype: of the weights.
    mesh: of the devices to plan for.

  Returns:
    'params', 'mesh' (axis to size), 'candidates' and 'flops' of a search
    step, bytes per device: 'weights_bytes', 'search_bytes',
    'calibrate_bytes'; and of recovery by rank, 0 and that of the config or 8:
    'recovery' (rank to (bytes per device, FLOPs of a step)), and the rank of
    the run, 'recovery_rank', None if it has no recovery.
  """
  scored = dataclasses.replace(model, refit=config_lib.refits(config))
  apply = functional.make_apply(scored, remat=config.search.remat)
  nll = functools.partial(loss.nll, apply)
  with jax.set_mesh(mesh):
    params = estimates.abstract_params(model, jnp.float32, mesh)
    scored_params = estimates.abstract_params(scored, jnp.float32, mesh)
    weights = estimates.local_size(params) * dtype.itemsize
    step = estimates.search_memory(config, scored, scored_params, nll)
    layer = estimates.calibration_memory(config, model, params)
    ranks = 0, config.recovery.rank or _RANK
    narrower = estimates.local_size(params) * (4 - dtype.itemsize)
    trained = {
      rank: (
        estimates.recovery_memory(config, model, params, rank).total - narrower,
        estimates.recovery_flops(config, model, rank),
      )
      for rank in ranks
    }
  search_weights = estimates.local_size(scored_params) * dtype.itemsize
  if scored.refit:  # the original output projections are kept beside them
    stack = params['stack']
    kept = stack['attention']['out'], stack['ffn']['down']
    search_weights += estimates.local_size(kept) * dtype.itemsize
  float32_weights = (
    estimates.local_size(scored_params) * np.dtype(np.float32).itemsize
  )
  return {
    'params': families.param_count(model),
    'mesh': dict(mesh.shape),
    'weights_bytes': weights,
    'search_bytes': step.total - float32_weights + search_weights,
    'calibrate_bytes': layer.total + weights,
    'candidates': config.search.candidates,
    'flops': estimates.flops(config, scored),
    'recovery': trained,
    'recovery_rank': config.recovery.rank if config.recovery.tokens else None,
  }


def describe(estimate: dict, memory_gib: float, tflops: float | None) -> str:
  """Returns the estimate of `plan` as text, with its verdict.

  Args:
    estimate: see `plan`.
    memory_gib: memory of one device.
    tflops: TFLOP/s that one device reaches, None if unknown.
  """
  gib = {k: v / _GIB for k, v in estimate.items() if k.endswith('_bytes')}
  peak = max(gib['search_bytes'], gib['calibrate_bytes'])
  sizes = ' x '.join(f'{name} {n}' for name, n in estimate['mesh'].items())
  lines = [
    f'parameters           {estimate["params"] / 1e9:.2f} billion',
    f'mesh                 {sizes}',
    f'weights              {gib["weights_bytes"]:.1f} GiB per device',
    f'search step          {gib["search_bytes"]:.1f} GiB per device',
    f'calibration          {gib["calibrate_bytes"]:.1f} GiB per device',
    f'candidates per step  {estimate["candidates"]}',
    f'FLOPs per step       {estimate["flops"]:.3g}',
  ]
  for rank, (size, flops) in estimate['recovery'].items():
    name = f'recovery, rank {rank}' if rank else 'recovery, all'
    lines.append(
      f'{name:20} {size / _GIB:.1f} GiB per device, {flops:.3g} FLOPs per step'
    )
    if rank == estimate['recovery_rank']:
      peak = max(peak, size / _GIB)
  if tflops:
    devices = np.prod(list(estimate['mesh'].values()))
    seconds = estimate['flops'] / (tflops * 1e12 * devices)
    lines.append(f'seconds per step     {seconds:.1f} at best')
  verdict = 'fits' if peak <= memory_gib else 'DOES NOT FIT'
  return '\n'.join([*lines, f'{verdict} in {memory_gib:g} GiB per device'])


def main(argv: list[str]) -> None:
  """Prints the estimate that the flags ask for."""
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
    estimate = plan(config, model, dtype, mesh)
  except errors.RequestError as error:
    errors.refuse(error)
  print(describe(estimate, args.device_memory_gib, args.tflops))


if __name__ == '__main__':
  config_flags.DEFINE_config_file(
    'config', help_string='Configuration file of the run.'
  )
  flags.DEFINE_integer(
    'devices', 1, 'Number of devices to plan for.', lower_bound=1
  )
  flags.DEFINE_float(
    'device_memory_gib', 80.0, 'Memory of one device in GiB.', lower_bound=0.0
  )
  flags.DEFINE_float(
    'tflops',
    None,
    'TFLOP/s that one device reaches, if known.',
    lower_bound=0.0,
  )
  app.run(
    main,
    flags_parser=functools.partial(
      cli.parse_flags, config='a file such as configs/llama2_7b.py'
    ),
  )
