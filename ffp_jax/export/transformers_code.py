"""Export of pruned models for PyTorch transformers.

transformers reads the widths of each layer from `per_layer_config` in
config.json, but its LLaMA, Mistral, Qwen and OPT build every layer with the
common widths. So `modeling_pruned.py`, which narrows the layers, is written
beside the weights.
"""

import pathlib
import shutil
from typing import Any

from ffp_jax.checkpoints.model import Model
from ffp_jax.export import slicing
from ffp_jax.models.config import ModelConfig

_MODULE = 'modeling_pruned'
_CLASSES = {
  'llama': 'Llama',
  'mistral': 'Mistral',
  'opt': 'OPT',
  'qwen2': 'Qwen2',
  'qwen3': 'Qwen3',
}


def description(model: Model, config: ModelConfig) -> dict[str, Any]:
  """Returns config.json of the compact model.

  Args:
    model: sliced.
    config: of what is written, see `padding.with_units`.
  """
  name = f'Pruned{_CLASSES[model.family]}'
  return slicing.describe_sliced(model.description, config) | {
    'architectures': [f'{name}ForCausalLM'],
    'auto_map': {
      'AutoModel': f'{_MODULE}.{name}Model',
      'AutoModelForCausalLM': f'{_MODULE}.{name}ForCausalLM',
    },
    # Without this, transformers refuses to read the common widths, which it
    # checks itself.
    'allow_global_per_layer_attribute_access': True,
    # vLLM divides a layer's width by its heads where this is missing (OPT).
    'head_dim': config.head_size,
    'per_layer_config': {
      str(i): _widths(model.family, config, i) for i in range(config.layers)
    },
  }


def _widths(family: str, config: ModelConfig, layer: int) -> dict[str, int]:
  """Returns the widths of a layer by the keys of the family's config.json."""
  groups, channels = config.widths(layer)
  ffn = 'ffn_dim' if family == 'opt' else 'intermediate_size'
  return {
    'num_attention_heads': groups * config.heads_per_group,
    'num_key_value_heads': groups,
    ffn: channels,
  }


def copy_to(directory: pathlib.Path):
  """Copies modeling_pruned.py into a model directory."""
  name = f'{_MODULE}.py'
  shutil.copy(pathlib.Path(__file__).with_name(name), directory / name)


def dense_description(model: Model) -> dict[str, Any]:
  """Returns config.json of the model in the dense model's shapes."""
  return {k: v for k, v in model.description.items() if k != 'ffp_jax'}
