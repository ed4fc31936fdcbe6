"""Names and shapes of Hugging Face checkpoints, both ways.

The only file that knows family names: it turns config.json into a
`ModelConfig`, and tensors into the decoder's parameters and back.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models import rope
from ffp_jax.models.decoder import ACTIVATIONS, Decoder, ModelConfig
from ffp_jax.models.json_fields import Fields


class Tensor(NamedTuple):
  """Where a parameter lies in a checkpoint.

  A linear layer's weight is stored transposed: its `inputs` leading axes
  here are its last axis there. 0 inputs: stored as it is.
  """

  name: str
  inputs: int


def _layer(prefix, attention_norm, ffn_norm, out, ffn):
  """The tensors of one layer, the layer's number still open."""
  at = f'{prefix}layers.{{i}}.'
  table = {
    'attention_norm/norm/{norm}': Tensor(f'{at}{attention_norm}.{{hf}}', 0),
    'ffn_norm/norm/{norm}': Tensor(f'{at}{ffn_norm}.{{hf}}', 0),
  }
  projections = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj'}
  for ours, theirs in projections.items():
    name = f'{at}self_attn.{theirs}'
    table[f'attention/{ours}'] = Tensor(f'{name}.weight', 1)
    table[f'attention/{ours}_bias'] = Tensor(f'{name}.bias', 0)
  for ours, theirs in {'query': 'q_norm', 'key': 'k_norm'}.items():
    name = f'{at}self_attn.{theirs}'
    table[f'attention/{ours}_norm'] = Tensor(f'{name}.weight', 0)
  table['attention/out'] = Tensor(f'{at}self_attn.{out}.weight', 3)
  table['attention/out_bias'] = Tensor(f'{at}self_attn.{out}.bias', 0)
  for ours, theirs in ffn.items():
    table[f'ffn/{ours}'] = Tensor(f'{at}{theirs}.weight', 1)
    table[f'ffn/{ours}_bias'] = Tensor(f'{at}{theirs}.bias', 0)
  return table


EMBED = ('embed', 'table')  # the path of the embedding
HEAD_NAME = 'lm_head.weight'


def _ends(prefix):
  """The tensors outside the layers."""
  return {
    'embed/table': Tensor(f'{prefix}embed_tokens.weight', 0),
    'position/table': Tensor(f'{prefix}embed_positions.weight', 0),
    'embed_in/kernel': Tensor(f'{prefix}project_in.weight', 1),
    'embed_out/kernel': Tensor(f'{prefix}project_out.weight', 1),
    'head/kernel': Tensor(HEAD_NAME, 1),
  }


_ROPE_FAMILY = (
  _layer(
    'model.',
    'input_layernorm',
    'post_attention_layernorm',
    'o_proj',
    {'gate': 'mlp.gate_proj', 'up': 'mlp.up_proj', 'down': 'mlp.down_proj'},
  ),
  _ends('model.') | {'final_norm/norm/{norm}': Tensor('model.norm.{hf}', 0)},
)
_OPT = (
  _layer(
    'model.decoder.',
    'self_attn_layer_norm',
    'final_layer_norm',
    'out_proj',
    {'up': 'fc1', 'down': 'fc2'},
  ),
  _ends('model.decoder.')
  | {
    'final_norm/norm/{norm}': Tensor('model.decoder.final_layer_norm.{hf}', 0)
  },
)


def _tensor_of(path: str, family: str, layer: int | None) -> Tensor:
  """The checkpoint tensor behind a parameter path such as 'ffn/up'."""
  table = FAMILIES[family].names[1 if layer is None else 0]
  norms = {'scale': 'weight', 'bias': 'bias'}
  head, _, leaf = path.rpartition('/')
  if head.endswith('norm'):
    tensor = table[f'{head}/{{norm}}']
  else:
    tensor, leaf = table[path], 'scale'
  name = tensor.name.format(i=layer, hf=norms[leaf])
  return tensor._replace(name=name)


def _head_size(fields: Fields, width: int, heads: int) -> int:
  """H where the file leaves it to be width / heads."""
  if width % heads:
    raise fields.error(
      f'hidden_size {width} is not a multiple of num_attention_heads {heads}'
    )
  return width // heads


def _rope_config(fields: Fields) -> ModelConfig:
  """LLaMA, from which the others of its kind depart."""
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
  """How one model_type is read."""

  config: object  # Fields to ModelConfig
  names: tuple[dict, dict]
  absent: dict  # what transformers takes for a key that is not there


_LLAMA_ABSENT = {
  'attention_bias': False,
  'hidden_act': 'silu',
  'max_position_embeddings': 2048,
  'mlp_bias': False,
  'partial_rotary_factor': 1.0,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
}
_MISTRAL_ABSENT = _LLAMA_ABSENT | {
  'max_position_embeddings': 131072,
  'num_key_value_heads': 8,
  'sliding_window': 4096,
}
_QWEN_ABSENT = _LLAMA_ABSENT | {
  'max_position_embeddings': 32768,
  'num_key_value_heads': 32,
  'use_sliding_window': False,
}
_OPT_ABSENT = {
  '_remove_final_layer_norm': False,
  'activation_function': 'relu',
  'do_layer_norm_before': True,
  'enable_bias': True,
  'layer_norm_elementwise_affine': True,
  'tie_word_embeddings': True,
}
FAMILIES = {
  'llama': Family(_rope_config, _ROPE_FAMILY, _LLAMA_ABSENT),
  'mistral': Family(_mistral_config, _ROPE_FAMILY, _MISTRAL_ABSENT),
  'opt': Family(_opt_config, _OPT, _OPT_ABSENT),
  'qwen2': Family(_qwen2_config, _ROPE_FAMILY, _QWEN_ABSENT),
  'qwen3': Family(
    _qwen3_config, _ROPE_FAMILY, _QWEN_ABSENT | {'head_dim': 128}
  ),
}


@functools.cache
def param_shapes(config: ModelConfig, dtype) -> dict:
  """Shapes and dtypes of the decoder's parameters, nothing allocated."""
  init = Decoder(config).init
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  tree = jax.eval_shape(init, jax.random.key(0), tokens)['params']
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def param_count(config: ModelConfig) -> int:
  """Parameters of the whole model, tied embeddings once."""
  leaves = jax.tree.leaves(param_shapes(config, jnp.float32))
  return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def _split_path(path: tuple[str, ...]) -> tuple[str, int | None]:
  """('layer_3', 'ffn', 'up') to ('ffn/up', 3); the rest have no layer."""
  head, *rest = path
  if head.startswith('layer_'):
    return '/'.join(rest), int(head.removeprefix('layer_'))
  return '/'.join(path), None


def list_tensors(config: ModelConfig, family: str, dtype):
  """Every tensor of a checkpoint and where it goes.

  Yields:
    (Tensor, parameter path, index in the stack or None, shape here).
  """
  flat = flax.traverse_util.flatten_dict(param_shapes(config, dtype))
  for path, spec in flat.items():
    if path[0] == 'stack':
      for i in range(config.layers):
        tensor = _tensor_of('/'.join(path[1:]), family, i)
        yield tensor, path, i, spec.shape[1:]
    else:
      name, layer = _split_path(path)
      yield _tensor_of(name, family, layer), path, None, spec.shape


def stored_shape(tensor: Tensor, shape) -> tuple[int, ...]:
  """Shape in the checkpoint of a parameter with this shape here."""
  if not tensor.inputs:
    return (int(np.prod(shape)),) if '.bias' in tensor.name else tuple(shape)
  split = len(shape) - 1 if tensor.inputs == 3 else tensor.inputs
  return int(np.prod(shape[split:])), int(np.prod(shape[:split]))
