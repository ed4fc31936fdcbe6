"""Speed, memory and size of pruned models beside the dense one.

    python -m ffp_jax.benchmarks.inference --dense=DIR --pruned=DIR
    python -m ffp_jax.benchmarks.inference --dense_gguf=FILE --pruned_gguf=FILE

In JAX (directories) and in llama.cpp (.gguf files; needs xllamacpp, which is
no requirement). Each model has a process of its own; they take turns, so that
a machine whose speed drifts treats all alike. Prefill reads a random prompt
and chooses the first new token; decode are the ones after it.
"""

import collections
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from absl import app, flags

from ffp_jax import report
from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.errors import RequestError, refuse
from ffp_jax.models import decoding as decoding_lib
from ffp_jax.models import families, functional


def jax_model(model, *, batch, prompt_tokens, new_tokens, dtype, random):
  """A model in JAX, to be timed.

  Returns:
    (function to seconds of (prefill, decode), dict of facts).
  """
  directory = hub.resolve_model(model)
  config = decoding_lib.unroll_layers(model_config.read_model_config(directory))
  dtype = functional.resolve_dtype(dtype)
  facts = {
    'device': jax.devices()[0].device_kind,
    'parameters, M': families.param_count(config) / 1e6,
  }
  if random:
    key, shapes = jax.random.key(0), families.param_shapes(config, dtype)
    params = jax.tree.map(
      lambda x: 0.02 * jax.random.normal(key, x.shape, x.dtype), shapes
    )
  else:
    params = weights.load_params(directory, config, dtype)
    size = sum(x.stat().st_size for x in directory.glob('*.safetensors'))
    facts['file, MB'] = size / 1e6
  tokens = np.random.default_rng(0).integers(
    0, config.vocab, (batch, prompt_tokens), np.int32
  )

  def run():
    steps = decoding_lib.generate_tokens(
      params,
      tokens,
      np.full(batch, prompt_tokens),
      config=config,
      slots=prompt_tokens + new_tokens - 1,
    )
    start = time.perf_counter()
    jax.block_until_ready(next(steps))
    middle = time.perf_counter()
    jax.block_until_ready(collections.deque(steps, maxlen=1))
    return middle - start, time.perf_counter() - middle

  return run, facts


def llama_cpp_model(path, *, batch, prompt_tokens, new_tokens, **_):
  """A .gguf file in llama.cpp, to be timed; as `jax_model`."""
  try:
    import xllamacpp
  except ImportError as error:
    raise RequestError('.gguf needs: pip install xllamacpp') from error
  params = xllamacpp.CommonParams()
  params.model.path = path
  params.n_ctx = prompt_tokens + new_tokens
  params.n_parallel = 1
  # By default as many as the host has, which may be more than are ours.
  params.cpuparams.n_threads = len(os.sched_getaffinity(0))
  params.verbosity = -1
  server = xllamacpp.Server(params)
  # Any ids of few digits are in the vocabulary.
  tokens = np.random.default_rng(0).integers(100, 1000, prompt_tokens).tolist()

  def run():
    answer = server.handle_completions(
      {
        'prompt': tokens,
        'n_predict': new_tokens,
        'ignore_eos': True,
        'cache_prompt': False,
        'temperature': 0.0,
      }
    )
    timings = answer['timings']
    found = timings['prompt_n'], timings['predicted_n']
    assert found == (prompt_tokens, new_tokens), found
    return timings['prompt_ms'] / 1000, timings['predicted_ms'] / 1000

  return run, {'file, MB': pathlib.Path(path).stat().st_size / 1e6}


_RUNTIMES = {'jax': jax_model, 'llama.cpp': llama_cpp_model}


def _peak(runtime: str) -> dict:
  """Most memory this process has held, MB."""
  scale = 1 if sys.platform == 'darwin' else 1024
  rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  peak = {'peak host memory, MB': scale * rss / 1e6}
  stats = jax.local_devices()[0].memory_stats() if runtime == 'jax' else None
  if stats:
    peak['peak device memory, MB'] = stats['peak_bytes_in_use'] / 1e6
  return peak


def work(runtime: str, model: str, settings: dict):
  """A process of one model: each line it reads is one turn."""
  # What libraries print must not come between the answers.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def answer(value):
    print(json.dumps(value), file=answers, flush=True)

  try:
    run, facts = _RUNTIMES[runtime](model, **settings)
  except (RequestError, OSError) as error:
    refuse(error)
  run()  # compiles
  answer(facts)
  for _ in sys.stdin:
    answer(run())
  answer(_peak(runtime))


def _start(runtime, model, settings):
  command = (sys.executable, '-m', __spec__.name, runtime, model)
  return subprocess.Popen(
    (*command, json.dumps(settings)),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    # Several processes may share an accelerator.
    env=os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
  )


def compare(runtime: str, models: list[str], settings: dict, repeats: int):
  """Every model's figures, those of the first with nothing to compare with.

  Returns:
    list of dicts, one a model; speeds are medians.

  Raises:
    RequestError: a process has failed, and has said why.
  """
  workers = [_start(runtime, model, settings) for model in models]
  try:
    facts = [_read(worker) for worker in workers]
    turns = [[] for _ in workers]
    for _ in range(repeats):
      for worker, times in zip(workers, turns, strict=True):
        worker.stdin.write('\n')
        worker.stdin.flush()
        times.append(_read(worker))
    rows = []
    for i, worker in enumerate(workers):
      worker.stdin.close()
      prefill, decoding = map(statistics.median, zip(*turns[i], strict=True))
      batch, new = settings['batch'], settings['new_tokens']
      speeds = {
        'prefill tokens/s': batch * settings['prompt_tokens'] / prefill,
        'decode tokens/s': batch * (new - 1) / decoding,
      }
      rows.append({'model': models[i]} | facts[i] | speeds | _read(worker))
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()
  return [with_ratios(row, rows[0]) for row in rows]


def _read(worker):
  if line := worker.stdout.readline():
    return json.loads(line)
  raise RequestError('a process of the benchmark has failed; see above')


def with_ratios(row: dict, dense: dict) -> dict:
  """A model's figures, and what share of the dense model's they are."""
  ratios = {
    f'{key}, x dense': round(value / dense[key], 3)
    for key, value in row.items()
    if isinstance(value, float) and row is not dense
  }
  return row | ratios


def columns(found: dict[str, list]) -> dict[str, dict]:
  """Returns what `report.add_measurements` takes, by dense and pruned."""
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


def main(argv):
  args = flags.FLAGS
  if len(argv) > 1:  # a process of its own
    work(argv[1], argv[2], json.loads(argv[3]))
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
      report.read_run(run)  # so that nothing heavy comes to nothing
      if max(len(args.pruned), len(args.pruned_gguf)) > 1:
        raise RequestError('--run: takes one pruned model a runtime')
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
  flags.DEFINE_string('dense', None, 'Model directory or hub id.')
  flags.DEFINE_multi_string('pruned', [], 'The same, of a pruned model.')
  flags.DEFINE_string('dense_gguf', None, 'The dense model for llama.cpp.')
  flags.DEFINE_multi_string('pruned_gguf', [], 'A pruned model for llama.cpp.')
  flags.DEFINE_integer('prompt_tokens', 128, 'Of the prompt.', lower_bound=1)
  flags.DEFINE_integer('new_tokens', 64, 'After it.', lower_bound=2)
  flags.DEFINE_integer('batch', 1, 'Prompts at once, in JAX.', lower_bound=1)
  flags.DEFINE_integer('repeats', 5, 'Timed turns.', lower_bound=1)
  flags.DEFINE_enum(
    'dtype', 'auto', ('auto', 'float32', 'bfloat16'), 'Of weights in JAX.'
  )
  flags.DEFINE_string(
    'run', None, 'Workdir of a finished run whose report takes the figures too.'
  )
  flags.DEFINE_bool(
    'random', False, 'Random weights: directories need only a config.json.'
  )
  app.run(main)
