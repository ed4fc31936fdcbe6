"""Slicing: turns a masked model into a physically smaller one, on disk too."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
from etils import epath

from ffp_jax.checkpoints import model_config, weights
from ffp_jax.checkpoints.model import Model
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.runtime.sharding import to_host
from ffp_jax.runtime.storage import staged

# The axis of a layer's parameter that runs over units.
UNIT_AXIS = {
  'attention': {
    'query': 1,
    'key': 1,
    'value': 1,
    'query_bias': 0,
    'key_bias': 0,
    'value_bias': 0,
    'out': 0,
  },
  'ffn': {'gate': 1, 'up': 1, 'gate_bias': 0, 'up_bias': 0, 'down': 0},
}
# What goes with the weights, besides config.json.
COMPANIONS = (
  'tokenizer*',
  'special_tokens_map.json',
  'vocab.*',
  'merges.txt',
  'added_tokens.json',
  'generation_config.json',
  'chat_template*',
  'additional_chat_templates/*.jinja',
)


def slice_params(
  params: dict, config: ModelConfig, keep: Masks
) -> tuple[dict, ModelConfig]:
  """Drops the removed units from the arrays.

  Args:
    params: of the dense decoder, stacked.
    config: the dense decoder's.
    keep: masks, [L,K] and [L,F].

  Returns:
    (NumPy parameters of the sliced decoder, its `ModelConfig`).
  """
  attention, ffn = (to_host(mask) > 0 for mask in keep)
  ends = {name: tree for name, tree in params.items() if name != 'stack'}
  small = jax.tree.map(to_host, ends)
  for i in range(config.layers):
    units = {'attention': attention[i], 'ffn': ffn[i]}
    small[f'layer_{i}'] = {
      module: _slice_module(module, tree, i, units.get(module))
      for module, tree in params['stack'].items()
    }
  sliced = dataclasses.replace(
    config,
    kept_groups=tuple(int(n) for n in attention.sum(-1)),
    kept_ffn=tuple(int(n) for n in ffn.sum(-1)),
  )
  return small, sliced


def _slice_module(module, tree, layer, units):
  """Returns one layer's parameters of a part, without the removed units."""
  if units is None:  # a norm
    return {
      name: {leaf: to_host(x[layer]) for leaf, x in inner.items()}
      for name, inner in tree.items()
    }
  index = np.flatnonzero(units)
  axes = UNIT_AXIS[module]
  return {
    name: np.take(to_host(x[layer]), index, axes[name])
    if name in axes
    else to_host(x[layer])
    for name, x in tree.items()
  }


def save(
  params: dict,
  config: ModelConfig,
  source: pathlib.Path,
  out: pathlib.Path,
  *,
  dtype: np.dtype | None = None,
) -> int:
  """Writes a sliced model as a directory that every command can load.

  The directory is written beside `out` and renamed: `out` is complete or
  absent.

  Args:
    params, config: from `slice_params`.
    source: directory of the dense model, for its config and tokenizer.
    out: directory to make; one that is there already is replaced.
    dtype: of the file, None for that of `params`.

  Returns:
    Bytes of the weights file.
  """
  description = describe_sliced(model_config.read_config_json(source), config)
  family = description['model_type']
  for stale in out.parent.glob(
    f'.{out.name}.*'
  ):  # of a process that was killed
    shutil.rmtree(stale)
  with staged(out) as stage:
    stage.mkdir()
    size = weights.save_params(params, stage, config, family, dtype)
    (stage / 'config.json').write_text(json.dumps(description, indent=2))
    copy_companions(source, stage)
    if out.exists():
      epath.Path(out).rmtree()
  return size


def describe_sliced(description: dict, config: ModelConfig) -> dict:
  """Returns config.json of a sliced model, given that of the dense one."""
  kept = {
    'kept_groups': list(config.kept_groups or ()),
    'kept_ffn': list(config.kept_ffn or ()),
  }
  tied = {'tie_word_embeddings': config.tied}
  return description | tied | {'ffp_jax': kept}


def slice_model(model: Model, params: dict, keep: Masks) -> Model:
  """Returns the small model in memory.

  Args:
    model: the dense one.
    params: of its decoder, calibrated; stacked.
    keep: masks, [L,K] and [L,F].
  """
  small, config = slice_params(params, model.config, keep)
  return dataclasses.replace(
    model,
    params=small,
    config=config,
    description=describe_sliced(model.description, config),
  )


def copy_companions(source: pathlib.Path, out: pathlib.Path):
  """Copies tokenizer and generation settings from a model directory."""
  for pattern in COMPANIONS:
    for path in source.glob(pattern):
      copy = out / path.relative_to(source)
      copy.parent.mkdir(exist_ok=True)
      shutil.copy(path, copy)
