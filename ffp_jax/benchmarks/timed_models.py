"""Models to time, in JAX and in llama.cpp, behind one signature."""

import collections
import os
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from ffp_jax.benchmarks import turns
from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.errors import RequestError
from ffp_jax.models import decoding as decoding_lib
from ffp_jax.models import families, functional


def jax_model(
  model: str,
  *,
  batch: int,
  prompt_tokens: int,
  new_tokens: int,
  dtype: str,
  random: bool,
) -> tuple[Callable[[], tuple[float, float]], dict]:
  """Loads a model in JAX.

  Args:
    model: directory or hub id.
    batch: prompts at once.
    prompt_tokens: length of the random prompts.
    new_tokens: tokens to generate after each.
    dtype: of the weights, or 'auto'.
    random: draws the weights; the directory needs only a config.json.

  Returns:
    (function that runs it once and returns the seconds of prefill and decode,
    dict of facts).
  """
  directory = hub.resolve_model(model)
  config = decoding_lib.unroll_layers(model_config.read_model_config(directory))
  held = functional.resolve_dtype(dtype)
  facts = {
    'device': jax.devices()[0].device_kind,
    'parameters, M': families.param_count(config) / 1e6,
  }
  if random:
    key, shapes = jax.random.key(0), families.param_shapes(config, held)
    params = jax.tree.map(
      lambda x: 0.02 * jax.random.normal(key, x.shape, x.dtype), shapes
    )
  else:
    params = weights.load_params(directory, config, held)
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


def llama_cpp_model(
  path: str, *, batch: int, prompt_tokens: int, new_tokens: int, **_
) -> tuple[Callable[[], tuple[float, float]], dict]:
  """Loads a .gguf file in llama.cpp; see `jax_model`.

  Raises:
    RequestError: xllamacpp is not installed.
  """
  del batch  # llama.cpp gets one prompt
  try:
    import xllamacpp
  except ImportError as error:
    raise RequestError('.gguf needs: pip install xllamacpp') from error
  params = xllamacpp.CommonParams()  # ty: ignore[missing-attribute]
  params.model.path = path
  params.n_ctx = prompt_tokens + new_tokens
  params.n_parallel = 1
  # The default counts the host's CPUs, which may be more than we may use.
  params.cpuparams.n_threads = len(os.sched_getaffinity(0))
  params.verbosity = -1
  server = xllamacpp.Server(params)  # ty: ignore[missing-attribute]
  # Low ids, which every vocabulary in use has.
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


RUNTIMES = {'jax': jax_model, 'llama.cpp': llama_cpp_model}


def peak_memory(runtime: str) -> dict:
  """Returns the most memory that this process has held, in MB."""
  peak = {'peak host memory, MB': turns.peak_memory() / 1e6}
  stats = jax.local_devices()[0].memory_stats() if runtime == 'jax' else None
  if stats:
    peak['peak device memory, MB'] = stats['peak_bytes_in_use'] / 1e6
  return peak
