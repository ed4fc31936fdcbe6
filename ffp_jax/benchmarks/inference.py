"""Measures speed, memory and size of pruned models beside the dense one.

    python -m ffp_jax.benchmarks.inference --dense=DIR --pruned=DIR
    python -m ffp_jax.benchmarks.inference --dense_gguf=FILE --pruned_gguf=FILE

Directories run in JAX, .gguf files in llama.cpp (needs xllamacpp, which is
not a requirement of ffp_jax). Each model has its own process. The processes
take turns, so that a drift of the machine's speed affects all models alike.
Prefill reads a random prompt and chooses the first new token; decode is the
time of the tokens after it.
"""

import json
import pathlib
import statistics

from absl import app, flags

from ffp_jax import report
from ffp_jax.benchmarks import timed_models, turns
from ffp_jax.errors import RequestError, refuse

_MODULE = 'ffp_jax.benchmarks.inference'


def compare(
  runtime: str, models: list[str], settings: dict, repeats: int
) -> list[dict]:
  """Measures models side by side.

  Args:
    runtime: 'jax' or 'llama.cpp'.
    models: the dense one first.
    settings: keyword arguments of `timed_models.jax_model`.
    repeats: timed turns of each model.

  Returns:
    A dict of figures per model, speeds as medians; those of the pruned models
    include ratios to the dense one.

  Raises:
    RequestError: a process has failed, after printing why.
  """
  commands = [
    (_MODULE, runtime, model, json.dumps(settings)) for model in models
  ]
  rows = []
  for model, answers in zip(models, turns.take(commands, repeats), strict=True):
    times = zip(*answers.turns[1:], strict=True)
    prefill, decode = map(statistics.median, times)
    batch, new = settings['batch'], settings['new_tokens']
    speeds = {
      'prefill tokens/s': batch * settings['prompt_tokens'] / prefill,
      'decode tokens/s': batch * (new - 1) / decode,
    }
    rows.append({'model': model} | answers.facts | speeds | answers.last)
  return [with_ratios(row, rows[0]) for row in rows]


def with_ratios(row: dict, dense: dict) -> dict:
  """Returns a model's figures with their ratios to the dense model's."""
  ratios = {
    f'{key}, x dense': round(value / dense[key], 3)
    for key, value in row.items()
    if isinstance(value, float) and row is not dense
  }
  return row | ratios


def columns(found: dict[str, list]) -> dict[str, dict]:
  """Returns figures as `report.add_measurements` takes them.

  Args:
    found: by runtime, the dicts of `compare`.

  Returns:
    By 'dense' and 'pruned', figures whose names end with the runtime.
  """
  return {
    name: {
      f'{key}, {runtime}': value
      for runtime, rows in found.items()
      for key, value in dict(zip(('dense', 'pruned'), rows, strict=False))
      .get(name, {})
      .items()
      if isinstance(value, float) and not key.endswith('x dense')
    }
    for name in ('dense', 'pruned')
  }


def main(argv: list[str]) -> None:
  """Measures the models that the flags name and prints the figures as JSON."""
  args = flags.FLAGS
  if len(argv) > 1:  # the process of one model
    runtime, model, settings = argv[1], argv[2], json.loads(argv[3])
    turns.serve(
      lambda: timed_models.RUNTIMES[runtime](model, **settings),
      lambda: timed_models.peak_memory(runtime),
    )
    return
  settings = {
    'batch': args.batch,
    'prompt_tokens': args.prompt_tokens,
    'new_tokens': args.new_tokens,
    'dtype': args.dtype,
    'random': args.random,
  }
  given = {
    'jax': [args.dense, *args.pruned],
    'llama.cpp': [args.dense_gguf, *args.pruned_gguf],
  }
  found, run = {}, pathlib.Path(args.run or '').expanduser()
  try:
    if args.run:
      report.read_run(run)  # fails early if --run is not a finished run
      if max(len(args.pruned), len(args.pruned_gguf)) > 1:
        raise RequestError('--run: takes one pruned model per runtime')
    for runtime, models in given.items():
      models = [model for model in models if model]
      if models:
        found[runtime] = compare(runtime, models, settings, args.repeats)
    if args.run:
      report.add_measurements(run, 'speed', columns(found))
  except RequestError as error:
    refuse(error)
  print(json.dumps(settings | found, indent=2))


if __name__ == '__main__':
  flags.DEFINE_string('dense', None, 'Directory or hub id of the dense model.')
  flags.DEFINE_multi_string(
    'pruned', [], 'Directory or hub id of a pruned model; may be repeated.'
  )
  flags.DEFINE_string('dense_gguf', None, 'GGUF file of the dense model.')
  flags.DEFINE_multi_string(
    'pruned_gguf', [], 'GGUF file of a pruned model; may be repeated.'
  )
  flags.DEFINE_integer(
    'prompt_tokens', 128, 'Tokens of the prompt.', lower_bound=1
  )
  flags.DEFINE_integer(
    'new_tokens', 64, 'Tokens generated after the prompt.', lower_bound=2
  )
  flags.DEFINE_integer('batch', 1, 'Prompts at once in JAX.', lower_bound=1)
  flags.DEFINE_integer(
    'repeats', 5, 'Timed turns of each model.', lower_bound=1
  )
  flags.DEFINE_enum(
    'dtype',
    'auto',
    ('auto', 'float32', 'bfloat16'),
    'Type of the weights in JAX; auto is bfloat16 on accelerators.',
  )
  flags.DEFINE_string(
    'run', None, 'Workdir of a finished run, whose report gets the figures too.'
  )
  flags.DEFINE_bool(
    'random',
    False,
    'Draw random weights; directories need only a config.json.',
  )
  app.run(main)
