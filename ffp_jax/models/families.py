"""Model families: how config.json and parameters map to our decoder.

With tensor_names.py the only file that knows family names: it turns
config.json into a `ModelConfig`, and lists the tensors of a checkpoint with
the parameters that they belong to.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models import removed, rope, tensor_names
from ffp_jax.models.config import ModelConfig
from ffp_jax.models.decoder import Decoder
from ffp_jax.models.ffn import ACTIVATIONS
from ffp_jax.models.json_fields import Fields
from ffp_jax.models.tensor_names import Tensor

EMBED = tensor_names.EMBED
HEAD_NAME = tensor_names.HEAD_NAME


def _head_size(fields: Fields, width: int, heads: int) -> int:
  """Returns width / heads, the head size where the file states none."""
  if width % heads:
    raise fields.error(
      f'hidden_size {width} is not a multiple of num_attention_heads {heads}'
    )
  return width // heads


def _rope_config(fields: Fields) -> ModelConfig:
  """Reads the config of LLaMA, which similar families modify."""
  heads = fields.integer('num_attention_heads')
  groups = fields.optional('num_key_value_heads', heads)
  if heads % groups:
    raise fields.error(
      f'num_attention_heads {heads} is not a multiple of '
      f'num_key_value_heads {groups}'
    )
  width = fields.integer('hidden_size')
  if fields.given('head_dim'):
    head_size = fields.integer('head_dim')
  else:
    head_size = _head_size(fields, width, heads)
  theta, scaling = rope.read_scaling(fields, head_size)
  attention_bias = fields.flag('attention_bias')
  return ModelConfig(
    vocab=fields.integer('vocab_size'),
    width=width,
    layers=fields.integer('num_hidden_layers'),
    groups=groups,
    heads_per_group=heads // groups,
    head_size=head_size,
    ffn=fields.integer('intermediate_size'),
    norm='rms',
    norm_eps=fields.number('rms_norm_eps'),
    positions='rope',
    rope_theta=theta,
    rope_scaling=scaling,
    max_positions=fields.integer('max_position_embeddings'),
    activation=fields.choice('hidden_act', ACTIVATIONS),
    gated=True,
    qkv_bias=attention_bias,
    out_bias=attention_bias,
    ffn_bias=fields.flag('mlp_bias'),
    tied=fields.flag('tie_word_embeddings'),
  )


def _mistral_config(fields: Fields) -> ModelConfig:
  return dataclasses.replace(
    _rope_config(fields),
    qkv_bias=False,
    out_bias=False,
    ffn_bias=False,
    window=fields.optional('sliding_window', None),
  )


def _qwen2_config(fields: Fields) -> ModelConfig:
  if fields.flag('use_sliding_window'):
    raise fields.error(
      'use_sliding_window is true; windows that differ by layer are not '
      'supported, use a model without'
    )
  return dataclasses.replace(
    _rope_config(fields), qkv_bias=True, out_bias=False, ffn_bias=False
  )


def _qwen3_config(fields: Fields) -> ModelConfig:
  bias = fields.flag('attention_bias')
  return dataclasses.replace(
    _qwen2_config(fields), qkv_bias=bias, out_bias=bias, qk_norm=True
  )


def _opt_config(fields: Fields) -> ModelConfig:
  width = fields.integer('hidden_size')
  heads = fields.integer('num_attention_heads')
  embed = fields.optional('word_embed_proj_dim', width)
  pre_norm = fields.flag('do_layer_norm_before')
  bias = fields.flag('enable_bias')
  affine = fields.flag('layer_norm_elementwise_affine')
  return ModelConfig(
    vocab=fields.integer('vocab_size'),
    width=width,
    layers=fields.integer('num_hidden_layers'),
    groups=heads,
    heads_per_group=1,
    head_size=_head_size(fields, width, heads),
    ffn=fields.integer('ffn_dim'),
    norm='layer' if affine else 'bare_layer',
    norm_eps=1e-5,
    pre_norm=pre_norm,
    final_norm=pre_norm and not fields.flag('_remove_final_layer_norm'),
    positions='learned',
    max_positions=fields.integer('max_position_embeddings'),
    position_offset=2,
    activation=fields.choice('activation_function', ACTIVATIONS),
    gated=False,
    qkv_bias=bias,
    out_bias=bias,
    ffn_bias=bias,
    tied=fields.flag('tie_word_embeddings'),
    embed_width=None if embed == width else embed,
  )


class Family(NamedTuple):
  """Describes how one `model_type` is read."""

  config: Callable[[Fields], ModelConfig]
  names: tensor_names.Names
  defaults: dict  # transformers' default for each missing key


_LLAMA_DEFAULTS = {
  'attention_bias': False,
  'hidden_act': 'silu',
  'max_position_embeddings': 2048,
  'mlp_bias': False,
  'partial_rotary_factor': 1.0,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
}
_MISTRAL_DEFAULTS = _LLAMA_DEFAULTS | {
  'max_position_embeddings': 131072,
  'num_key_value_heads': 8,
  'sliding_window': 4096,
}
_QWEN_DEFAULTS = _LLAMA_DEFAULTS | {
  'max_position_embeddings': 32768,
  'num_key_value_heads': 32,
  'use_sliding_window': False,
}
_OPT_DEFAULTS = {
  '_remove_final_layer_norm': False,
  'activation_function': 'relu',
  'do_layer_norm_before': True,
  'enable_bias': True,
  'layer_norm_elementwise_affine': True,
  'tie_word_embeddings': True,
}
FAMILIES = {
  'llama': Family(_rope_config, tensor_names.LLAMA, _LLAMA_DEFAULTS),
  'mistral': Family(_mistral_config, tensor_names.LLAMA, _MISTRAL_DEFAULTS),
  'opt': Family(_opt_config, tensor_names.OPT, _OPT_DEFAULTS),
  'qwen2': Family(_qwen2_config, tensor_names.LLAMA, _QWEN_DEFAULTS),
  'qwen3': Family(
    _qwen3_config, tensor_names.LLAMA, _QWEN_DEFAULTS | {'head_dim': 128}
  ),
}


@functools.cache
def param_shapes(config: ModelConfig, dtype: Any) -> dict:
  """Returns the decoder's parameters as `jax.ShapeDtypeStruct`s.

  Args:
    config: of the decoder.
    dtype: of the weights; the factors of a refit have their own types.
  """

  def init():
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Decoder(config).init(jax.random.key(0), tokens)

  tree = jax.eval_shape(init)['params']

  def with_dtype(path, x):
    name = path[-1].key
    factor = name.removeprefix('refit_')
    own = dtype if factor == name else removed.stored_type(factor, dtype)
    return jax.ShapeDtypeStruct(x.shape, own)

  return jax.tree.map_with_path(with_dtype, tree)


def param_count(config: ModelConfig) -> int:
  """Returns the number of parameters, counting tied embeddings once."""
  leaves = jax.tree.leaves(param_shapes(config, jnp.float32))
  return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def _split_path(path: tuple[str, ...]) -> tuple[str, int | None]:
  """Turns ('layer_3', 'ffn', 'up') into ('ffn/up', 3).

  The layer is None for parameters outside the layers.
  """
  head, *rest = path
  if head.startswith('layer_'):
    return '/'.join(rest), int(head.removeprefix('layer_'))
  return '/'.join(path), None


def list_tensors(
  config: ModelConfig, family: str, dtype: Any
) -> Iterator[tuple[Tensor, tuple[str, ...], int | None, tuple[int, ...]]]:
  """Lists the tensors of a checkpoint and the parameters that they belong to.

  A parameter without numbers, of a sublayer without units, has no tensor.

  Args:
    config: of the decoder.
    family: a key of FAMILIES.
    dtype: any; it changes nothing here.

  Yields:
    (tensor, parameter path, layer in the stack or None, shape of the
    parameter or of its slice for that layer).
  """
  names = FAMILIES[family].names
  flat = flax.traverse_util.flatten_dict(param_shapes(config, dtype))
  for path, spec in flat.items():
    if 0 in spec.shape:
      continue
    if path[0] == 'stack':
      for i in range(config.layers):
        tensor = tensor_names.find_tensor(names, '/'.join(path[1:]), i)
        yield tensor, path, i, spec.shape[1:]
    else:
      name, layer = _split_path(path)
      tensor = tensor_names.find_tensor(names, name, layer)
      yield tensor, path, None, spec.shape


def stored_shape(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
  """Returns the shape that a parameter of shape `shape` has in a checkpoint."""
  if not tensor.inputs:
    return (int(np.prod(shape)),) if '.bias' in tensor.name else tuple(shape)
  split = len(shape) - 1 if tensor.inputs == 3 else tensor.inputs
  return int(np.prod(shape[split:])), int(np.prod(shape[:split]))
