"""What makes a pruned model loadable by PyTorch's transformers.

Its config.json says by `per_layer_config` what each layer's widths are, but
its own LLaMA, Mistral, Qwen and OPT build every layer from the common ones;
so a short module of ours goes with the weights and narrows the layers.
"""

import dataclasses
import pathlib
import shutil

import numpy as np

from ffp_jax.checkpoints.model import Model
from ffp_jax.models import families

_MODULE = 'modeling_pruned'
_CLASSES = {
  'llama': 'Llama',
  'mistral': 'Mistral',
  'opt': 'OPT',
  'qwen2': 'Qwen2',
  'qwen3': 'Qwen3',
}


def description(model: Model) -> dict:
  """config.json of the compact model."""
  name = f'Pruned{_CLASSES[model.family]}'
  return model.description | {
    'architectures': [f'{name}ForCausalLM'],
    'auto_map': {
      'AutoModel': f'{_MODULE}.{name}Model',
      'AutoModelForCausalLM': f'{_MODULE}.{name}ForCausalLM',
    },
    # transformers checks the common widths, and refuses to read them without.
    'allow_global_per_layer_attribute_access': True,
    'per_layer_config': {
      str(i): _widths(model, i) for i in range(model.config.layers)
    },
  }


def _widths(model: Model, layer: int) -> dict:
  """One layer's widths, in the family's words."""
  groups, channels = model.config.widths(layer)
  heads = groups * model.config.heads_per_group
  if model.family == 'opt':
    return {'num_attention_heads': heads, 'ffn_dim': channels}
  return {
    'num_attention_heads': heads,
    'num_key_value_heads': groups,
    'intermediate_size': channels,
  }


def copy_to(directory: pathlib.Path):
  """Puts the module beside the weights."""
  name = f'{_MODULE}.py'
  shutil.copy(pathlib.Path(__file__).with_name(name), directory / name)


def dense_description(model: Model) -> dict:
  """config.json of the model in the dense model's shapes."""
  return {k: v for k, v in model.description.items() if k != 'ffp_jax'}


def padded(model: Model):
  """The tensors in the dense model's shapes, kept units first, then zeros.

  The order of units doesn't matter, and one of zeros adds nothing: what
  enters the output projection is 0, as every activation is 0 at 0.

  Yields:
    (Hugging Face name, array).
  """
  dense = dataclasses.replace(model.config, kept_groups=None, kept_ffn=None)
  shapes = {
    tensor.name: families.stored_shape(tensor, shape)
    for tensor, _, _, shape in families.list_tensors(
      dense, model.family, np.float32
    )
  }
  for name, value in model.tensors():
    room = [(0, n - k) for n, k in zip(shapes[name], value.shape, strict=True)]
    yield name, np.pad(value, room)
