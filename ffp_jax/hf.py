"""Names and shapes of Hugging Face checkpoints, both ways.

The only file that knows family names: it turns config.json into a
`ModelConfig`, and tensors into the decoder's parameters and back.
"""

import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.config import RequestError
from ffp_jax.model import ACTIVATIONS, Decoder, ModelConfig


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
  table['attention/out'] = Tensor(f'{at}self_attn.{out}.weight', 3)
  table['attention/out_bias'] = Tensor(f'{at}self_attn.{out}.bias', 0)
  for ours, theirs in ffn.items():
    table[f'ffn/{ours}'] = Tensor(f'{at}{theirs}.weight', 1)
    table[f'ffn/{ours}_bias'] = Tensor(f'{at}{theirs}.bias', 0)
  return table


def _ends(prefix):
  """The tensors outside the layers."""
  return {
    'embed/table': Tensor(f'{prefix}embed_tokens.weight', 0),
    'position/table': Tensor(f'{prefix}embed_positions.weight', 0),
    'embed_in/kernel': Tensor(f'{prefix}project_in.weight', 1),
    'embed_out/kernel': Tensor(f'{prefix}project_out.weight', 1),
    'head/kernel': Tensor('lm_head.weight', 1),
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


def _rope_config(hf: dict) -> ModelConfig:
  """LLaMA, and all of Mistral but its window."""
  rope = hf.get('rope_parameters') or {}
  scaling = hf.get('rope_scaling') or {}
  kind = {**scaling, **rope}
  kind = kind.get('rope_type', kind.get('type', 'default'))
  if kind not in ('default', None):
    raise RequestError(
      f'config.json: rope scaling {kind!r} is not supported; '
      'use a model with default rotary positions'
    )
  heads = hf['num_attention_heads']
  groups = hf.get('num_key_value_heads') or heads
  if heads % groups:
    raise ValueError(f'{heads} heads on {groups} key/value heads')
  attention_bias = hf.get('attention_bias', False)
  return ModelConfig(
    vocab=hf['vocab_size'],
    width=hf['hidden_size'],
    layers=hf['num_hidden_layers'],
    groups=groups,
    heads_per_group=heads // groups,
    head_size=hf.get('head_dim') or hf['hidden_size'] // heads,
    ffn=hf['intermediate_size'],
    norm='rms',
    norm_eps=hf.get('rms_norm_eps', 1e-6),
    positions='rope',
    rope_theta=float(rope.get('rope_theta', hf.get('rope_theta', 10000.0))),
    max_positions=hf.get('max_position_embeddings', 2048),
    activation=hf.get('hidden_act', 'silu'),
    gated=True,
    qkv_bias=attention_bias,
    out_bias=attention_bias,
    ffn_bias=hf.get('mlp_bias', False),
    tied=hf.get('tie_word_embeddings', False),
  )


def _mistral_config(hf: dict) -> ModelConfig:
  # transformers' default where the key is absent; null means no window.
  window = hf.get('sliding_window', 4096)
  return dataclasses.replace(_rope_config(hf), window=window)


def _opt_config(hf: dict) -> ModelConfig:
  heads = hf['num_attention_heads']
  embed = hf.get('word_embed_proj_dim') or hf['hidden_size']
  pre_norm = hf.get('do_layer_norm_before', True)
  bias = hf.get('enable_bias', True)
  return ModelConfig(
    vocab=hf['vocab_size'],
    width=hf['hidden_size'],
    layers=hf['num_hidden_layers'],
    groups=heads,
    heads_per_group=1,
    head_size=hf['hidden_size'] // heads,
    ffn=hf['ffn_dim'],
    norm='layer',
    norm_eps=1e-5,
    pre_norm=pre_norm,
    final_norm=pre_norm and not hf.get('_remove_final_layer_norm', False),
    positions='learned',
    max_positions=hf['max_position_embeddings'],
    position_offset=2,
    activation=hf.get('activation_function', 'relu'),
    gated=False,
    qkv_bias=bias,
    out_bias=bias,
    ffn_bias=bias,
    tied=hf.get('tie_word_embeddings', True),
    embed_width=None if embed == hf['hidden_size'] else embed,
  )


class Family(NamedTuple):
  """How one model_type is read: its config and its tensor names."""

  config: object
  names: tuple[dict, dict]


FAMILIES = {
  'llama': Family(_rope_config, _ROPE_FAMILY),
  'mistral': Family(_mistral_config, _ROPE_FAMILY),
  'opt': Family(_opt_config, _OPT),
}


def read_json(directory: pathlib.Path) -> dict:
  """config.json of a model directory, with a `model_type` we know."""
  path = directory / 'config.json'
  try:
    hf = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise RequestError(
      f'{directory}: no config.json; is this a model directory?'
    ) from error
  except ValueError as error:
    raise RequestError(f'{path}: not valid JSON ({error})') from error
  family = hf.get('model_type') if isinstance(hf, dict) else None
  if family not in FAMILIES:
    known = ', '.join(FAMILIES)
    raise RequestError(
      f'{path}: model_type {family!r} is not supported; use one of {known}'
    )
  return hf


def model_config(directory: pathlib.Path) -> ModelConfig:
  """The decoder's config of a dense or sliced model directory.

  Raises:
    RequestError: config.json is missing, broken, incomplete or unsupported.
  """
  hf = read_json(directory)
  try:
    config = FAMILIES[hf['model_type']].config(hf)
  except KeyError as error:
    raise RequestError(
      f'{directory / "config.json"}: {error.args[0]!r} is missing'
    ) from error
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise RequestError(
      f'{directory / "config.json"}: sizes that make no model ({error})'
    ) from error
  if not (config.layers > 0 and config.ffn > 0 and config.heads_per_group > 0):
    raise RequestError(
      f'{directory / "config.json"}: layers, FFN width and heads must be '
      'positive, and heads a multiple of key/value heads'
    )
  if config.activation not in ACTIVATIONS:
    raise RequestError(
      f'{directory / "config.json"}: activation {config.activation!r} is not '
      f'supported; use one of {", ".join(ACTIVATIONS)}'
    )
  if 'ffp_jax' in hf:
    try:
      kept = (tuple(hf['ffp_jax'][k]) for k in ('kept_groups', 'kept_ffn'))
      groups, ffn = kept
    except (KeyError, TypeError) as error:
      raise RequestError(
        f'{directory / "config.json"}: ffp_jax must give kept_groups and '
        'kept_ffn, one number a layer'
      ) from error
    config = dataclasses.replace(config, kept_groups=groups, kept_ffn=ffn)
  return config


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


def tensors(config: ModelConfig, family: str, dtype):
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
