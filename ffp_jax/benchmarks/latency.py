"""Milliseconds of a layer's modules by how much they keep, for a budget.

    python -m ffp_jax.benchmarks.latency --model=MODEL --tokens=512 \\
      --out=latency.json
    python -m ffp_jax.main ... --config.budget.latency=0.2 \\
      --config.budget.latency_table=latency.json

Prefill of one prompt by this machine's JAX, random weights of the model's
shapes (a directory with config.json will do), medians of turns that all counts
take, so that a machine whose speed drifts treats them alike. For another
runtime, write a file of the same form.
"""

import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ffp_jax.checkpoints import hub, model_config
from ffp_jax.errors import RequestError, refuse
from ffp_jax.models import functional
from ffp_jax.models.decoder import Layer
from ffp_jax.pruning.calibration import SUBLAYERS
from ffp_jax.runtime import cli

# Share of a module's units, the dense module last.
_SHARES = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0)


def half_layers(config, tokens: int, dtype):
  """What is timed: (kind, count) to a function of no arguments."""
  source = np.random.default_rng(0)
  dense = {'attention': config.groups, 'ffn': config.ffn}
  x = jnp.asarray(source.standard_normal((1, tokens, config.width)), dtype)
  runs = {}
  for kind, units in dense.items():
    for count in sorted({max(1, round(share * units)) for share in _SHARES}):
      runs[kind, count] = _run(config, {**dense, kind: count}, kind, x, source)
  return runs


def _run(config, widths, kind, x, source):
  names = next(x for x in SUBLAYERS if x.name == kind)
  layer = Layer(config, widths['attention'], widths['ffn'])

  def run(params):
    inputs = layer.apply(params, x, method=names.inputs)
    return layer.apply(params, x, inputs, method=names.output)

  at = jnp.arange(x.shape[1])[None]
  shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, at))
  params = jax.tree.map(
    lambda s: jnp.asarray(0.02 * source.standard_normal(s.shape), x.dtype),
    shapes,
  )
  step = jax.jit(run)
  return lambda: jax.block_until_ready(step(params))


def measure(runs: dict, repeats: int) -> dict:
  """Medians in milliseconds, kind to count to time."""
  for run in runs.values():
    run()  # compiles
  seen = {key: [] for key in runs}
  for _ in range(repeats):
    for key, run in runs.items():
      start = time.perf_counter()
      run()
      seen[key].append(1000 * (time.perf_counter() - start))
  table = {'attention': {}, 'ffn': {}}
  for (kind, count), times in seen.items():
    table[kind][str(count)] = round(statistics.median(times), 4)
  return table


def main(argv):
  del argv
  args, out = flags.FLAGS, pathlib.Path(flags.FLAGS.out).expanduser()
  try:
    if not out.absolute().parent.is_dir():
      raise RequestError(f'--out: no directory {out.absolute().parent}')
    config = model_config.read_model_config(hub.resolve_model(args.model))
    if config.sliced:
      raise RequestError(f'--model: {args.model!r} is pruned; give the dense')
    dtype = functional.resolve_dtype(args.dtype)
    table = measure(half_layers(config, args.tokens, dtype), args.repeats)
    out.write_text(json.dumps(table, indent=2) + '\n')
  except (RequestError, OSError) as error:
    refuse(error)
  print(json.dumps(table, indent=2))


if __name__ == '__main__':
  flags.DEFINE_string('model', 'demo', 'Model directory or hub id.')
  flags.DEFINE_string('out', 'latency.json', 'File to write.')
  flags.DEFINE_integer('tokens', 512, 'Of the prompt.', lower_bound=1)
  flags.DEFINE_integer('repeats', 15, 'Timed turns.', lower_bound=1)
  flags.DEFINE_enum(
    'dtype', 'auto', ('auto', 'float32', 'bfloat16'), 'Of the weights.'
  )
  app.run(main, flags_parser=cli.parse_flags)
