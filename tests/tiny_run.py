"""A random three-layer LLaMA on disk, a text, and runs that take seconds."""

import json
import os
import pathlib
import pydoc_data.topics
import tempfile

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from ffp_jax.benchmarks import train_small
from ffp_jax.checkpoints import model_config
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.config import defaults
from ffp_jax.models import families
from ffp_jax.models.decoder import ModelConfig

VOCAB = 300
_OWN = tempfile.TemporaryDirectory()  # gone at exit
_COMPILED = os.environ.get('TESTS_COMPILED', _OWN.name)  # see conftest.py
# `compile_quickly` for another process.
ENVIRONMENT = {
  'JAX_COMPILATION_CACHE_DIR': _COMPILED,
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  'JAX_PLATFORMS': 'cpu',
}
HF_CONFIG = {
  'model_type': 'llama',
  'vocab_size': VOCAB,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'tie_word_embeddings': True,
}


def every_family(grouped: dict, opt: dict, *, window: int) -> dict[str, dict]:
  """Changes to HF_CONFIG for a model of every family, by a name.

  Args:
    grouped: changes for all but OPT, with grouped heads.
    opt: changes for OPT.
    window: tokens of Mistral's sliding window.
  """
  opt = opt | {'model_type': 'opt', 'num_key_value_heads': None}
  narrow = opt.get('hidden_size', HF_CONFIG['hidden_size']) // 2
  return {
    'llama': grouped,
    'llama_biased': grouped | {'attention_bias': True, 'mlp_bias': True},
    'mistral': grouped | {'model_type': 'mistral', 'sliding_window': window},
    'qwen2': grouped | {'model_type': 'qwen2', 'vocab_size': VOCAB + 4},
    'qwen3': grouped | {'model_type': 'qwen3', 'tie_word_embeddings': False},
    'opt': opt,
    'opt_post_norm': opt
    | {'do_layer_norm_before': False, 'word_embed_proj_dim': narrow},
  }


def compile_quickly(on: bool):
  """Compiles without most optimisations, and the same code only once.

  Compiling a tiny model takes far longer than running it, and every run
  makes new jitted functions of the same code. For setUpModule; switched off
  in tearDownModule.
  """
  jax.config.update('jax_disable_most_optimizations', on)
  jax.config.update('jax_compilation_cache_dir', _COMPILED if on else None)
  jax.config.update(
    'jax_persistent_cache_min_compile_time_secs', 0.0 if on else 1.0
  )
  # Whether there is a cache is only looked at once.
  compilation_cache.reset_cache()


def params(config: ModelConfig, seed: int = 0) -> dict:
  """Random parameters under which every unit, norm and bias matters.

  Not those of `Decoder.init`, which takes ten seconds to compile and draws
  embeddings, norms and biases that hide wrong ones.

  Args:
    config: dense.
    seed: of all of them.
  """
  source = np.random.default_rng(seed)

  def draw(path, spec):
    noise = source.standard_normal(spec.shape).astype(np.float32)
    if path[-1] == 'table':
      return 0.4 * noise  # no wider than what the layers add
    if path[-1] == 'scale' or path[-1].endswith('bias'):
      return 0.3 * noise + (path[-1] == 'scale')
    stacked = path[0] == 'stack'
    inputs = np.prod(spec.shape[stacked:]) / config.width
    if path[-1] not in ('out', 'down'):
      inputs = spec.shape[stacked]
    return (1.5 if stacked else 1.0) * noise / np.sqrt(inputs)

  flat = flax.traverse_util.flatten_dict(
    families.param_shapes(config, np.float32)
  )
  return flax.traverse_util.unflatten_dict(
    {path: jnp.asarray(draw(path, x), jnp.float32) for path, x in flat.items()}
  )


def text(topics: int = 12) -> str:
  """Some of Python's language reference."""
  topics_of = pydoc_data.topics.topics
  return '\n'.join(topics_of[key] for key in sorted(topics_of)[:topics])


def write_model(
  directory: pathlib.Path, seed: int = 0, dtype='float32', **changes
):
  """Makes a model directory that every command can load.

  Args:
    directory: to make.
    seed: of the weights.
    dtype: of the file.
    **changes: to HF_CONFIG.
  """
  directory.mkdir(parents=True)
  description = HF_CONFIG | changes
  (directory / 'config.json').write_text(json.dumps(description))
  config = model_config.read_model_config(directory)
  family = description['model_type']
  weights = params(config, seed)
  weights_lib.save_params(weights, directory, config, family, jnp.dtype(dtype))
  write_tokenizer(directory)


def inputs(folder: pathlib.Path, topics: int = 2, **changes) -> dict:
  """Writes what a run needs: `model` and `data` of its configuration.

  Args:
    folder: gets `model` and `text.txt`.
    topics: of `text`.
    **changes: to HF_CONFIG.
  """
  write_model(folder / 'model', **changes)
  (folder / 'text.txt').write_text(text(topics))
  return {'model': str(folder / 'model'), 'data': str(folder / 'text.txt')}


def write_tokenizer(directory: pathlib.Path):
  """Byte-level BPE of VOCAB tokens."""
  train_small.train_tokenizer([text()], VOCAB, directory)


# Settings of a recovery of eight steps, with two checkpoints on the way.
RECOVERY = {
  'recovery.tokens': 256,
  'recovery.every': 96,
  'recovery.learning_rate': 1e-3,
}


def config(**overrides) -> ml_collections.ConfigDict:
  """The settings of a run of seconds; `model` and `data` still to be set.

  Args:
    **overrides: by dotted key, such as `**{'budget.sparsity': 0.3}`.
  """
  config = defaults()
  small = {
    'dtype': 'float32',
    'text.context': 32,
    'text.calibration_windows': 6,
    'text.validation_windows': 3,
    'text.reward_windows': 4,
    'text.heldout_windows': 5,
    'text.other': '',
    'budget.sparsity': 0.25,
    'budget.round_ffn': 2,
    'search.context': 16,
    'mesh.tensor': 1,
    'search.steps': (2, 4),
    'search.rows': (1, 1),
    'policy.hidden': (8,),
    'checkpoint.every': 2,
    'recovery.tokens': 0,
  }
  config.update_from_flattened_dict(small | overrides)
  return config
