"""Plans runs of well-known models on slices of TPUs, for the tables of docs.

JAX_PLATFORMS=cpu python -m ffp_jax.benchmarks.tpu_plans \
  --config=configs/llama2_7b.py --out=FILE.json --model=llama-2-7b \
  --model=mistral-7b --topology=v5e:4x4 --topology=v5p:2x2x2

Compiles the search step of each by the TPU's own compiler, which needs libtpu
and no TPU; with --whole every program of the run. Heads and channels are split
over 8 chips, the width over the others. What is in FILE already is not compiled
again.
"""

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from ffp_jax.errors import RequestError, refuse
from ffp_jax.models import families
from ffp_jax.models.config import ModelConfig
from ffp_jax.models.rope import Scaling
from ffp_jax.pruning import compilation, programs
from ffp_jax.runtime import cli, sharding, storage, topology

_TENSOR = 8  # devices that split heads and channels, where there are as many
_LLAMA_2 = functools.partial(ModelConfig, vocab=32_000, head_size=128)
# Sizes as in the config.json of each on the hub.
MODELS = {
  'llama-2-7b': _LLAMA_2(
    width=4096, layers=32, groups=32, heads_per_group=1, ffn=11_008
  ),
  'llama-2-13b': _LLAMA_2(
    width=5120, layers=40, groups=40, heads_per_group=1, ffn=13_824
  ),
  'llama-2-70b': _LLAMA_2(
    width=8192, layers=80, groups=8, heads_per_group=8, ffn=28_672
  ),
  'llama-3.1-8b': ModelConfig(
    vocab=128_256,
    width=4096,
    layers=32,
    groups=8,
    heads_per_group=4,
    head_size=128,
    ffn=14_336,
    rope_theta=500_000.0,
    rope_scaling=Scaling(
      kind='llama3', factor=8.0, trained=8192, slow=1.0, fast=4.0
    ),
  ),
  'mistral-7b': _LLAMA_2(
    width=4096,
    layers=32,
    groups=8,
    heads_per_group=4,
    ffn=14_336,
    window=4096,
  ),
  'opt-66b': ModelConfig(
    vocab=50_272,
    width=9216,
    layers=64,
    groups=72,
    heads_per_group=1,
    head_size=128,
    ffn=36_864,
    norm='layer',
    positions='learned',
    position_offset=2,
    activation='relu',
    gated=False,
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    tied=True,
  ),
}


def make_mesh(name: str) -> jax.sharding.Mesh:
  """Returns the mesh that a topology is planned with."""
  devices = topology.find_devices(name)
  tensor = math.gcd(_TENSOR, len(devices))
  return sharding.make_mesh(1, -1, tensor, devices=devices)


def measure(
  name: str, where: str, config: ml_collections.ConfigDict, *, whole: bool
) -> list[dict]:
  """Compiles the programs of a run in bfloat16.

  Args:
    name: of the model, see `MODELS`.
    where: topology, such as v5e:4x4.
    config: settings of the run.
    whole: whether to compile all programs that the run calls, rather than its
      search step alone.

  Returns:
    A row for each: what memory it takes on a chip in GiB, the GB that a chip
    receives, the fewest seconds and what limits them, and the seconds of its
    compilation.
  """
  mesh, (chip, _) = make_mesh(where), topology.parse(where)
  model, dtype = MODELS[name], jnp.dtype('bfloat16')
  if whole:
    listed = programs.list_programs(config, model, dtype, mesh)
  else:
    listed = [programs.search_step(config, model, dtype, mesh)]
  rows = []
  for program in listed:
    if not program.calls:
      continue
    row = {
      'model': name,
      'billions': round(families.param_count(model) / 1e9, 2),
      'topology': where,
      'mesh': list(mesh.shape.values()),
      'program': program.name,
      'calls': program.calls,
      'flops': program.flops.total,
    }
    found = compilation.compile_for_topology(program, mesh)
    if isinstance(found, compilation.TooLarge):
      row |= {'refused': found.message}
    else:
      limit, seconds = compilation.longest_bound(found, chip)
      row |= {
        'gib': round(found.total / 2**30, 2),
        'gb_received': round(found.received / 1e9, 2),
        'seconds': float(f'{seconds:.3g}'),
        'limit': limit,
        'compiled_in': round(found.seconds, 1),
      }
    logging.info('%s', row)
    rows.append(row)
  return rows


def table(rows: Sequence[dict]) -> str:
  """Returns rows of `measure` as a table in Markdown."""
  lines = [
    '| model | slice | mesh | program | GiB a chip | of | GB received '
    '| at best | calls |',
    '|---|---|---|---|--:|--:|--:|--:|--:|',
  ]
  for row in rows:
    chip, _ = topology.parse(row['topology'])
    mesh = ' x '.join(map(str, row['mesh']))
    cells = [row['model'], row['topology'], mesh, row['program']]
    if 'refused' in row:
      cells += ['does not fit', f'{chip.hbm_gib:g}', '', '']
    else:
      cells += [
        f'{row["gib"]:.2f}',
        f'{chip.hbm_gib:g}',
        f'{row["gb_received"]:.3g}',
        f'{row["seconds"]:.3g} s, {row["limit"]}',
      ]
    lines.append('| ' + ' | '.join([*cells, str(row['calls'])]) + ' |')
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  """Adds what the flags ask for to the file and prints a table of it."""
  del argv
  args = flags.FLAGS
  jax.config.update('jax_platforms', 'cpu')
  logging.set_verbosity(logging.INFO)
  out = pathlib.Path(args.out)
  try:
    for where in args.topology:
      topology.parse(where)
    rows = json.loads(out.read_text()) if out.exists() else []
    for name, where in itertools.product(args.model, args.topology):
      same = [x for x in rows if (x['model'], x['topology']) == (name, where)]
      if same and (len(same) > 1 or not args.whole):
        continue
      rows = [x for x in rows if x not in same]
      rows += measure(name, where, args.config, whole=args.whole)
      storage.write_atomically(out, storage.to_json(rows, indent=1) + '\n')
  except RequestError as error:
    refuse(error)
  except topology.NoCompiler:
    refuse(f"--topology needs the TPU's compiler: {topology.INSTALL}")
  print(table(rows))


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', help_string='Settings of a run.')
  flags.DEFINE_multi_enum('model', ['llama-2-7b'], list(MODELS), 'Whose run.')
  flags.DEFINE_multi_string('topology', ['v5e:4x4'], 'Slice of TPUs.')
  flags.DEFINE_bool('whole', False, 'Compile every program of the run.')
  flags.DEFINE_string('out', None, 'JSON file of the rows.')
  app.run(
    main,
    flags_parser=functools.partial(
      cli.parse_flags,
      config='a file such as configs/llama2_7b.py',
      out='the JSON file to write',
    ),
  )
