"""Memory and time of loading, beside safetensors' own reading.

    python -m ffp_jax.benchmarks.load --params=1e9

Writes a random LLaMA of about so many parameters as sharded bfloat16
safetensors to a temporary directory, and loads it in fresh processes: the
peak is the largest resident memory less what it was after the imports, over
the bytes of the weights in the dtype they are loaded into. The files have
just been written, so that all of them come from the page cache.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import app, flags

from ffp_jax.checkpoints import model_config
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.models import families

_WIDTH, _FFN, _VOCAB = 2048, 5632, 32000
_CONFIG = {
  'model_type': 'llama',
  'vocab_size': _VOCAB,
  'hidden_size': _WIDTH,
  'intermediate_size': _FFN,
  'num_attention_heads': 16,
  'num_key_value_heads': 4,
}


def write(directory: pathlib.Path, params: str):
  """A random model, one shard a layer, no more than a shard in memory."""
  layer = _WIDTH * (2.5 * _WIDTH + 3 * _FFN)
  layers = max(1, round((float(params) - 2 * _VOCAB * _WIDTH) / layer))
  description = _CONFIG | {'num_hidden_layers': layers}
  (directory / 'config.json').write_text(json.dumps(description))
  config = model_config.read_model_config(directory)
  shards = {}
  for tensor, _, i, shape in families.list_tensors(
    config, 'llama', ml_dtypes.bfloat16
  ):
    shards.setdefault(i, []).append(
      (tensor.name, families.stored_shape(tensor, shape))
    )
  rng, where = np.random.default_rng(0), {}
  for number, tensors in enumerate(shards.values(), 1):
    name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    drawn = {
      key: (rng.random(shape, np.float32) - 0.5).astype(ml_dtypes.bfloat16)
      for key, shape in tensors
    }
    safetensors.numpy.save_file(drawn, directory / name)
    where |= dict.fromkeys(drawn, name)
  index = directory / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': where}))


def plain(directory: pathlib.Path) -> dict:
  """Seconds that safetensors takes to read every file, one by one."""
  start = time.perf_counter()
  for path in sorted(directory.glob('*.safetensors')):
    safetensors.numpy.load_file(path)
  return {'seconds': time.perf_counter() - start}


def load(directory: pathlib.Path, dtype: str) -> dict:
  """Seconds and peak memory of `weights.load_params`."""
  jax.block_until_ready(jax.numpy.zeros(1))  # what jax itself takes
  config, dtype = (
    model_config.read_model_config(directory),
    jax.numpy.dtype(dtype),
  )
  before = _peak()
  start = time.perf_counter()
  params = jax.block_until_ready(
    weights_lib.load_params(directory, config, dtype)
  )
  seconds = time.perf_counter() - start
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  return {
    'seconds': seconds,
    'weights, GB': weights / 1e9,
    'peak / weights': (_peak() - before) / weights,
  }


def _peak() -> int:
  """Largest resident memory of this process so far, bytes."""
  scale = 1 if sys.platform == 'darwin' else 1024
  return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(argv):
  args = flags.FLAGS
  tasks = {'write': write, 'plain': plain, 'load': load}
  if len(argv) > 1:  # a process of its own
    task, directory, *rest = argv[1:]
    print(json.dumps(tasks[task](pathlib.Path(directory), *rest)))
    return

  with tempfile.TemporaryDirectory(dir=args.tmp) as directory:

    def run(task, *rest):
      command = (sys.executable, '-m', __spec__.name, task, directory, *rest)
      done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
      return json.loads(done.stdout)

    run('write', str(args.params))
    rows = {'safetensors load_file': run('plain')}
    for dtype in ('bfloat16', 'float32'):
      rows[f'load_params, {dtype}'] = run('load', dtype)
    rows['safetensors load_file, again'] = run('plain')
  print(json.dumps(rows, indent=2))


if __name__ == '__main__':
  flags.DEFINE_float('params', 1e9, 'Parameters of the model.')
  flags.DEFINE_string('tmp', None, 'Where to write the model.')
  app.run(main)
