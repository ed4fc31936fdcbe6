"""Measures the latency of a layer's sublayers by the units that they keep.

    python -m ffp_jax.benchmarks.latency --model=MODEL --tokens=512 \\
      --out=latency.json
    python -m ffp_jax.main ... --config.budget.latency=0.2 \\
      --config.budget.latency_table=latency.json

The table is what `budget.latency_table` reads: milliseconds of the prefill of
one prompt in JAX on this machine, with random weights of the model's shapes (a
directory with config.json is enough). All counts take turns, so that a drift
of the machine's speed affects all alike; figures are medians. For another
runtime, write a file of the same form.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ffp_jax.checkpoints import hub, model_config
from ffp_jax.errors import RequestError, refuse
from ffp_jax.models import functional
from ffp_jax.models.decoder import Layer, ModelConfig
from ffp_jax.pruning.calibration import SUBLAYERS
from ffp_jax.runtime import cli

# Shares of a sublayer's units to measure, the dense sublayer last.
_SHARES = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0)


def half_layers(
  config: ModelConfig, tokens: int, dtype: np.dtype
) -> dict[tuple[str, int], Callable[[], jax.Array]]:
  """Makes the sublayers to time.

  Args:
    config: of the dense model.
    tokens: of the prompt.
    dtype: of weights and activations.

  Returns:
    By ('attention' or 'ffn', units kept), a function that runs the sublayer
    and waits for it.
  """
  rng = np.random.default_rng(0)
  dense = {'attention': config.groups, 'ffn': config.ffn}
  x = jnp.asarray(rng.standard_normal((1, tokens, config.width)), dtype)
  runs = {}
  for kind, units in dense.items():
    for count in sorted({max(1, round(share * units)) for share in _SHARES}):
      kept = {**dense, kind: count}
      runs[kind, count] = _make_run(config, kept, kind, x, rng)
  return runs


def _make_run(
  config: ModelConfig,
  kept: dict[str, int],
  kind: str,
  x_1xTxD: jax.Array,
  rng: np.random.Generator,
) -> Callable[[], jax.Array]:
  """Returns a function that runs one sublayer of a random layer."""
  methods = next(sublayer for sublayer in SUBLAYERS if sublayer.name == kind)
  layer = Layer(config, kept['attention'], kept['ffn'])

  def run(params):
    inputs = layer.apply(params, x_1xTxD, method=methods.inputs)
    return layer.apply(params, x_1xTxD, inputs, method=methods.output)

  position = jnp.arange(x_1xTxD.shape[1])[None]
  shapes = jax.eval_shape(
    lambda: layer.init(jax.random.key(0), x_1xTxD, position)
  )
  params = jax.tree.map(
    lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape), x_1xTxD.dtype),
    shapes,
  )
  step = jax.jit(run)
  return lambda: jax.block_until_ready(step(params))


def measure(
  runs: Mapping[tuple[str, int], Callable[[], jax.Array]], repeats: int
) -> dict[str, dict[str, float]]:
  """Returns median milliseconds by kind and count.

  Args:
    runs: of `half_layers`.
    repeats: timed turns of each.
  """
  for run in runs.values():
    run()  # compiles
  spent = {key: [] for key in runs}
  for _ in range(repeats):
    for key, run in runs.items():
      start = time.perf_counter()
      run()
      spent[key].append(1000 * (time.perf_counter() - start))
  table = {'attention': {}, 'ffn': {}}
  for (kind, count), times in spent.items():
    table[kind][str(count)] = round(statistics.median(times), 4)
  return table


def main(argv: list[str]) -> None:
  """Measures the model that the flags name and writes the table."""
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
  flags.DEFINE_string(
    'model', 'demo', 'Directory or hub id of the dense model.'
  )
  flags.DEFINE_string('out', 'latency.json', 'File to write the table to.')
  flags.DEFINE_integer('tokens', 512, 'Tokens of the prompt.', lower_bound=1)
  flags.DEFINE_integer(
    'repeats', 15, 'Timed turns of each count.', lower_bound=1
  )
  flags.DEFINE_enum(
    'dtype',
    'auto',
    ('auto', 'float32', 'bfloat16'),
    'Type of the weights; auto is bfloat16 on accelerators.',
  )
  app.run(main, flags_parser=cli.parse_flags)
