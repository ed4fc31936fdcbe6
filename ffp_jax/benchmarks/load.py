"""Measures memory and time of loading beside safetensors' own reading.

    python -m ffp_jax.benchmarks.load --params=1e9

Writes a random LLaMA of about --params parameters as sharded bfloat16
safetensors to a temporary directory and loads it in fresh processes. The peak
is the largest resident memory less that after the imports, divided by the
bytes of the weights in the dtype that they are loaded into. The files have
just been written, so they come from the page cache.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import app, flags

from ffp_jax.benchmarks import turns
from ffp_jax.checkpoints import model_config
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.models import families

_MODULE = 'ffp_jax.benchmarks.load'
_VOCAB = 32000


def describe(params: float) -> dict:
  """Returns the config.json of a LLaMA of about that many parameters.

  The width is 2,048, or less where embeddings would be most of the model.
  """
  width = 2048
  while width > 128 and 2 * _VOCAB * width > params / 2:
    width //= 2
  ffn = 11 * width // 4
  layer = width * (2.5 * width + 3 * ffn)
  return {
    'model_type': 'llama',
    'vocab_size': _VOCAB,
    'hidden_size': width,
    'intermediate_size': ffn,
    'num_attention_heads': 16,
    'num_key_value_heads': 4,
    'num_hidden_layers': max(1, round((params - 2 * _VOCAB * width) / layer)),
  }


def write(directory: pathlib.Path, params: str) -> None:
  """Writes a random model with a shard per layer, holding a shard at a time."""
  description = describe(float(params))
  (directory / 'config.json').write_text(json.dumps(description))
  config = model_config.read_model_config(directory)
  shards = {}
  for tensor, _, i, shape in families.list_tensors(
    config, 'llama', ml_dtypes.bfloat16
  ):
    shards.setdefault(i, []).append(
      (tensor.name, families.stored_shape(tensor, shape))
    )
  rng, files = np.random.default_rng(0), {}
  for number, tensors in enumerate(shards.values(), 1):
    name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    drawn = {
      key: (rng.random(shape, np.float32) - 0.5).astype(ml_dtypes.bfloat16)
      for key, shape in tensors
    }
    safetensors.numpy.save_file(drawn, directory / name)
    files |= dict.fromkeys(drawn, name)
  index = directory / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': files}))


def load_plainly(directory: pathlib.Path) -> dict:
  """Measures the seconds in which safetensors reads all files, one by one."""
  start = time.perf_counter()
  for path in sorted(directory.glob('*.safetensors')):
    safetensors.numpy.load_file(path)
  return {'seconds': time.perf_counter() - start}


def load(directory: pathlib.Path, dtype: str) -> dict:
  """Measures seconds and peak memory of `weights.load_params`."""
  jax.block_until_ready(jax.numpy.zeros(1))  # starts JAX before measuring
  config = model_config.read_model_config(directory)
  before = turns.peak_memory()
  start = time.perf_counter()
  params = jax.block_until_ready(
    weights_lib.load_params(directory, config, jax.numpy.dtype(dtype))
  )
  seconds = time.perf_counter() - start
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  return {
    'seconds': seconds,
    'weights, GB': weights / 1e9,
    'peak / weights': (turns.peak_memory() - before) / weights,
  }


def main(argv: list[str]) -> None:
  """Measures in processes of one task each and prints the figures as JSON."""
  args = flags.FLAGS
  tasks = {'write': write, 'load_plainly': load_plainly, 'load': load}
  if len(argv) > 1:  # the process of one task
    task, directory, *rest = argv[1:]
    print(json.dumps(tasks[task](pathlib.Path(directory), *rest)))
    return

  with tempfile.TemporaryDirectory(dir=args.tmp) as directory:

    def run(task, *rest):
      command = (sys.executable, '-m', _MODULE, task, directory, *rest)
      done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
      return json.loads(done.stdout)

    run('write', str(args.params))
    rows = {'safetensors load_file': run('load_plainly')}
    for dtype in ('bfloat16', 'float32'):
      rows[f'load_params, {dtype}'] = run('load', dtype)
    rows['safetensors load_file, again'] = run('load_plainly')
  print(json.dumps(rows, indent=2))


if __name__ == '__main__':
  flags.DEFINE_float('params', 1e9, 'Number of parameters of the model.')
  flags.DEFINE_string('tmp', None, 'Directory for the temporary model.')
  app.run(main)
