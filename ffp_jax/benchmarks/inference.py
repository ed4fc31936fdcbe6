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

from ffp_jax import decode, evaluate, files, hf, hub
from ffp_jax.config import RequestError, refuse


def jax_model(model, *, batch, prompt_tokens, new_tokens, dtype, random):
  """A model in JAX, to be timed.

  Returns:
    (function to seconds of (prefill, decode), bytes of its weights' files).
  """
  directory = hub.locate(model)
  config = decode.unrolled(hf.model_config(directory))
  dtype = evaluate.dtype_of(dtype)
  if random:
    key, shapes = jax.random.key(0), hf.param_shapes(config, dtype)
    params = jax.tree.map(
      lambda x: 0.02 * jax.random.normal(key, x.shape, x.dtype), shapes
    )
    size = sum(x.nbytes for x in jax.tree.leaves(params))
  else:
    params = files.load_params(directory, config, dtype)
    size = sum(x.stat().st_size for x in directory.glob('*.safetensors'))
  tokens = np.random.default_rng(0).integers(
    0, config.vocab, (batch, prompt_tokens), np.int32
  )

  def run():
    steps = decode.continuations(
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

  return run, size


def llama_cpp_model(path, *, batch, prompt_tokens, new_tokens, **_):
  """A .gguf file in llama.cpp, to be timed; as `jax_model`."""
  import xllamacpp

  params = xllamacpp.CommonParams()
  params.model.path = path
  params.n_ctx = prompt_tokens + new_tokens
  params.n_parallel = 1
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

  return run, pathlib.Path(path).stat().st_size


_RUNTIMES = {'jax': jax_model, 'llama.cpp': llama_cpp_model}


def _peak() -> dict:
  """Most memory this process has held, bytes."""
  scale = 1 if sys.platform == 'darwin' else 1024
  peak = {'host': scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
  if stats := jax.local_devices()[0].memory_stats():
    peak['device'] = stats['peak_bytes_in_use']
  return peak


def work(runtime: str, model: str, settings: dict):
  """A process of one model: each line it reads is one turn."""
  # What libraries print must not come between the answers.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def answer(value):
    print(json.dumps(value), file=answers, flush=True)

  run, size = _RUNTIMES[runtime](model, **settings)
  run()  # compiles
  answer({'size': size, 'device': jax.devices()[0].device_kind})
  for _ in sys.stdin:
    answer(run())
  answer(_peak())


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
  """Every model's figures; the first is what ratios are to.

  Returns:
    dict from model to tokens a second, bytes and ratios.
  """
  workers = [_start(runtime, model, settings) for model in models]

  def read(worker):
    line = worker.stdout.readline()
    if not line:
      raise RequestError(f'{runtime}: a process has failed; see above')
    return json.loads(line)

  facts = [read(worker) for worker in workers]
  turns = [[] for _ in workers]
  for _ in range(repeats):
    for worker, times in zip(workers, turns, strict=True):
      worker.stdin.write('\n')
      worker.stdin.flush()
      times.append(read(worker))
  rows = {}
  for model, worker, fact, times in zip(
    models, workers, facts, turns, strict=True
  ):
    worker.stdin.close()
    peak = read(worker)
    worker.wait()
    prefill, step = map(statistics.median, zip(*times, strict=True))
    batch, new = settings['batch'], settings['new_tokens']
    # llama.cpp counts the first new token as decoded.
    steps = new if runtime == 'llama.cpp' else new - 1
    rows[model] = {
      'prefill tokens/s': batch * settings['prompt_tokens'] / prefill,
      'decode tokens/s': batch * steps / step,
      'peak memory, MB': {k: round(v / 1e6) for k, v in peak.items()},
      'weights, MB': fact['size'] / 1e6,
      'device': fact['device'],
    }
  return rows


def with_ratios(rows: dict) -> dict:
  """Speeds and sizes of all but the first over those of the first."""
  dense, *pruned = rows.values()
  for row in pruned:
    for key in ('prefill tokens/s', 'decode tokens/s', 'weights, MB'):
      row[f'{key}, x dense'] = round(row[key] / dense[key], 3)
  return rows


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
  found = {}
  try:
    for runtime, models in given.items():
      models = [model for model in models if model]
      if models:
        rows = compare(runtime, models, settings, args.repeats)
        found[runtime] = with_ratios(rows)
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
  flags.DEFINE_bool(
    'random', False, 'Random weights: directories need only a config.json.'
  )
  app.run(main)
