"""Estimates whether a run fits, before there are weights or devices.

python -m ffp_jax.plan --config=configs/llama2_7b.py --topology=v5e:4x4
python -m ffp_jax.plan --config=configs/llama2_7b.py --devices=8 \
  --device_memory_gib=80 --tflops=400

Compiles every program of the run ahead of time and reads what each takes: with
--topology for a slice of TPUs, by the TPU's own compiler (pip install
'libtpu==0.0.42.*'), with --devices for virtual devices, by that of the CPU.
"""

import functools
import math
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from ffp_jax import config as config_lib
from ffp_jax import errors
from ffp_jax.checkpoints import hub, model_config
from ffp_jax.models import families
from ffp_jax.pruning import abstract, compilation
from ffp_jax.pruning import programs as programs_lib
from ffp_jax.pruning.compilation import Compiled, TooLarge
from ffp_jax.runtime import cli, collectives, sharding, topology
from ffp_jax.text import tokenization

_GIB = 2**30


def describe(
  found: Sequence[Compiled | TooLarge],
  memory_gib: float,
  chip: topology.Chip | None = None,
  tflops: float | None = None,
) -> str:
  """Returns what was compiled as text, with its verdict.

  Args:
    found: the programs of a run.
    memory_gib: memory of one device.
    chip: that the programs are compiled for; None on a CPU.
    tflops: TFLOP/s that one device reaches, without a chip, if known.
  """
  lines = [
    f'{"GiB per device":21}{"arguments":>9}{"temporary":>10}{"all":>7}'
    f'{"FLOPs":>9}{"seconds at best":>17}{"calls":>7}{"compiled in":>13}'
  ]
  for x in found:
    if isinstance(x, TooLarge):
      lines.append(f'{x.program.name:21}{x.message}')
      continue
    arguments, temporary, total = (
      n / _GIB for n in (x.arguments, x.temporary, x.total)
    )
    lines.append(
      f'{x.program.name:21}{arguments:9.2f}{temporary:10.2f}{total:7.2f}'
      f'{x.program.flops.total:9.2g}{_at_best(x, chip, tflops):>17}'
      f'{x.program.calls:7}{x.seconds:11.1f} s'
    )
  if chip:
    lines += ['', *_describe_collectives(found)]
  lines += ['', *_describe_run(found, chip, tflops)]
  return '\n'.join([*lines, _verdict(found, memory_gib)])


def _describe_run(found, chip, tflops) -> list[str]:
  """Returns what all calls of the run take together, if known, as a line."""
  called = [x for x in found if x.program.calls]
  if not (chip or tflops) or any(isinstance(x, TooLarge) for x in called):
    return []
  seconds = sum(x.program.calls * _longest(x, chip, tflops)[1] for x in called)
  compiled = sum(x.seconds for x in called)
  return [
    f'the run computes for {seconds:.3g} s at best, '
    f'and compiled here in {compiled:.0f} s'
  ]


def _at_best(x: Compiled, chip, tflops) -> str:
  """Returns the fewest seconds of a program, and what limits it, if known."""
  if not (chip or tflops):
    return ''
  limit, seconds = _longest(x, chip, tflops)
  return f'{seconds:.3g} {limit}'.rstrip()


def _longest(x: Compiled, chip, tflops) -> tuple[str, float]:
  """Returns what limits a program, if known, and its fewest seconds."""
  if chip:
    return compilation.longest_bound(x, chip)
  return '', x.program.flops.total / x.program.parts / (tflops * 1e12)


def _describe_collectives(found) -> list[str]:
  """Returns a table of what a device receives, as lines."""

  compiled = [x for x in found if isinstance(x, Compiled)]
  kinds = [*collectives.KINDS]
  if not any(x.received_between_slices for x in compiled):
    kinds.remove(collectives.BETWEEN_SLICES)

  def line(name, cells):
    widths = (len(kind) + 2 for kind in kinds)
    row = (f'{x:>{n}}' for x, n in zip(cells, widths, strict=True))
    return f'{name:21}' + ''.join(row)

  lines = [line('GB a chip receives', kinds)]
  for x in compiled:
    gb = dict.fromkeys(kinds, 0.0)
    for one in x.collectives:
      gb[one.kind] += one.size * one.times / 1e9
    lines.append(line(x.program.name, (f'{n:.3g}' for n in gb.values())))
  return lines


def _verdict(found, memory_gib: float) -> str:
  """Returns whether all programs that the run calls fit."""
  used = [x for x in found if x.program.calls]
  refused = [x for x in used if isinstance(x, TooLarge)]
  if refused:
    names = ', '.join(x.program.name for x in refused)
    return f'DOES NOT FIT in {memory_gib:g} GiB per device: {names}'
  largest = max(used, key=lambda x: x.total)
  verdict = 'fits' if largest.total <= memory_gib * _GIB else 'DOES NOT FIT'
  return (
    f'{verdict} in {memory_gib:g} GiB per device; the largest program is '
    f'{largest.program.name} with {largest.total / _GIB:.2f} GiB'
  )


def describe_meshes(
  found: dict[tuple[int, int, int], Compiled | TooLarge], chip: topology.Chip
) -> str:
  """Returns meshes with what their search steps take, the best first.

  Args:
    found: sizes of the mesh axes to the search step.
    chip: that they are compiled for.
  """
  rows = []
  for sizes, x in found.items():
    name = ' x '.join(map(str, sizes))
    if isinstance(x, TooLarge):
      rows.append((math.inf, f'{name:12}{x.message}'))
      continue
    row = (
      f'{name:12}{x.total / _GIB:8.2f}{x.received / 1e9:14.3g}'
      f'{_at_best(x, chip, None):>17}{x.seconds:11.1f} s'
    )
    if x.total > chip.hbm_gib * _GIB:
      rows.append((math.inf, f'{row}  DOES NOT FIT'))
    else:
      rows.append((compilation.longest_bound(x, chip)[1], row))
  header = (
    f'{"search step":12}{"GiB":>8}{"GB received":>14}{"seconds at best":>17}'
    f'{"compiled in":>13}'
  )
  return '\n'.join([header, *(row for _, row in sorted(rows))])


def _progress(items: list) -> tqdm:
  return tqdm(
    items, desc='compile', leave=False, disable=not sys.stderr.isatty()
  )


def _check_flags(args) -> None:
  """Refuses flags that don't go together, and topologies without a chip."""
  given = [
    name
    for name in ('devices', 'device_memory_gib', 'tflops')
    if args[name].present
  ]
  if args.topology and given:
    errors.refuse(f'--{given[0]} is of a device; --topology says it for a TPU')
  for name in ('mesh', 'slices'):
    if args[name].present and not args.topology:
      errors.refuse(f'--{name}={args[name].value} needs --topology')
  fixed = [key for key in cli.overrides() if key.startswith('mesh.')]
  if args.mesh and fixed:
    errors.refuse(f'--config.{fixed[0]} and --mesh=search both say the mesh')
  if args.topology:
    topology.parse(args.topology)


def main(argv: list[str]) -> None:
  """Prints the estimate that the flags ask for."""
  del argv
  args = flags.FLAGS
  config = args.config
  jax.config.update('jax_platforms', 'cpu')
  try:
    _check_flags(args)
    config_lib.validate(config)
    model = model_config.read_model_config(hub.resolve_model(config.model))
    tokenization.check_tokens(model, (), config.text.context)
    dtype = jnp.dtype('bfloat16' if config.dtype == 'auto' else config.dtype)
    print(_plan(args, config, model, dtype))
  except errors.RequestError as error:
    errors.refuse(error)


def _plan(args, config, model, dtype) -> str:
  """Returns the estimate as text."""
  run = config, model, dtype
  if not args.topology:
    return _plan_cpu(*run, args.devices, args.device_memory_gib, args.tflops)
  chip, count = topology.parse(args.topology)
  try:
    devices = topology.find_devices(args.topology, args.slices)
  except topology.NoCompiler:
    missing = f"--topology needs the TPU's compiler: {topology.INSTALL}"
    if args.mesh:
      raise errors.RequestError(missing) from None
    print(f'ffp_jax: {missing}; estimated on CPU instead', file=sys.stderr)
    count *= args.slices
    return _plan_cpu(*run, count, chip.hbm_gib, chip.tflops)
  if args.mesh:
    return _search_mesh(*run, devices, chip)
  return _plan_topology(*run, devices, chip)


def _plan_cpu(config, model, dtype, count, memory_gib, tflops) -> str:
  """Returns the estimate by the compiler of the CPU as text."""
  jax.config.update('jax_num_cpu_devices', count)
  mesh = sharding.make_mesh(**config.mesh)
  pairs = zip(
    programs_lib.list_programs(config, model, dtype, mesh),
    programs_lib.list_programs(config, model, jnp.dtype('float32'), mesh),
    strict=True,
  )
  found = [
    compilation.compile_for_cpu(*pair, mesh) for pair in _progress(list(pairs))
  ]
  about = _describe_model(config, model, dtype, mesh)
  return f'{about}\n\n{describe(found, memory_gib, tflops=tflops)}'


def _plan_topology(config, model, dtype, devices, chip) -> str:
  """Returns the estimate for TPUs as text."""
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  programs = programs_lib.list_programs(config, model, dtype, mesh)
  found = [
    compilation.compile_for_topology(x, mesh) for x in _progress(programs)
  ]
  about = _describe_model(config, model, dtype, mesh)
  return f'{about}\n\n{describe(found, chip.hbm_gib, chip)}'


def _search_mesh(config, model, dtype, devices, chip) -> str:
  """Returns the ranked meshes as text."""
  found = {}
  for sizes in _progress(compilation.list_meshes(config, model, len(devices))):
    mesh = sharding.make_mesh(*sizes, devices=devices)
    step = programs_lib.search_step(config, model, dtype, mesh)
    found[sizes] = compilation.compile_for_topology(step, mesh)
  return describe_meshes(found, chip)


def _describe_model(config, model, dtype, mesh) -> str:
  """Returns the lines above the table of programs."""
  sizes = ' x '.join(f'{name} {n}' for name, n in mesh.shape.items())
  params = abstract.params(model, dtype, mesh)
  weights = abstract.local_bytes(params) / _GIB
  return '\n'.join(
    [
      f'parameters           {families.param_count(model) / 1e9:.2f} billion',
      f'mesh                 {sizes}',
      f'weights              {weights:.2f} GiB per device, {dtype.name}',
      f'candidates per step  {config.search.candidates}',
    ]
  )


if __name__ == '__main__':
  config_flags.DEFINE_config_file(
    'config', help_string='Configuration file of the run.'
  )
  flags.DEFINE_string(
    'topology', None, 'Slice of TPUs to plan for, such as v5e:4x4.'
  )
  flags.DEFINE_integer(
    'slices', 1, 'Number of such slices, on one network.', lower_bound=1
  )
  flags.DEFINE_enum(
    'mesh',
    None,
    ['search'],
    'Compile the search step alone, for every mesh that fits the model.',
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
