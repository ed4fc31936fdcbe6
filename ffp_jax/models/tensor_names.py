"""Names of the tensors in Hugging Face checkpoints, by family."""

from typing import NamedTuple

EMBED = ('embed', 'table')  # the parameter path of the embedding
HEAD_NAME = 'lm_head.weight'


class Tensor(NamedTuple):
  """Describes the tensor of a checkpoint that holds a parameter.

  The weight of a linear layer is stored transposed: its `inputs` leading axes
  here are the last axis there. With 0 inputs it is stored as it is.
  """

  name: str
  inputs: int


class Names(NamedTuple):
  """Maps the parameter paths of a family, such as 'ffn/up', to tensors.

  Norms have '{norm}' for the last part of the path and '{hf}' for that of the
  name, as their scale and bias are named alike; layers have '{i}' for their
  number.
  """

  layer: dict[str, Tensor]
  outside: dict[str, Tensor]  # outside the layers


def find_tensor(names: Names, path: str, layer: int | None) -> Tensor:
  """Returns the tensor that holds a parameter.

  Args:
    names: of the family.
    path: of the parameter, within the layer if there is one.
    layer: number of the layer; None for parameters outside the layers.
  """
  table = names.outside if layer is None else names.layer
  norms = {'scale': 'weight', 'bias': 'bias'}
  head, _, leaf = path.rpartition('/')
  if head.endswith('norm'):
    tensor = table[f'{head}/{{norm}}']
  else:
    tensor, leaf = table[path], 'scale'
  name = tensor.name.format(i=layer, hf=norms[leaf])
  return tensor._replace(name=name)


def _layer_tensors(prefix, attention_norm, ffn_norm, out, ffn):
  """Returns the tensors of a layer.

  Args:
    prefix: of all names.
    attention_norm, ffn_norm: names of the two norms.
    out: name of attention's output projection.
    ffn: names of the FFN's projections, by ours.
  """
  layer = f'{prefix}layers.{{i}}.'
  table = {
    'attention_norm/norm/{norm}': Tensor(f'{layer}{attention_norm}.{{hf}}', 0),
    'ffn_norm/norm/{norm}': Tensor(f'{layer}{ffn_norm}.{{hf}}', 0),
  }
  projections = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj'}
  for ours, theirs in projections.items():
    name = f'{layer}self_attn.{theirs}'
    table[f'attention/{ours}'] = Tensor(f'{name}.weight', 1)
    table[f'attention/{ours}_bias'] = Tensor(f'{name}.bias', 0)
  for ours, theirs in {'query': 'q_norm', 'key': 'k_norm'}.items():
    name = f'{layer}self_attn.{theirs}'
    table[f'attention/{ours}_norm'] = Tensor(f'{name}.weight', 0)
  table['attention/out'] = Tensor(f'{layer}self_attn.{out}.weight', 3)
  table['attention/out_bias'] = Tensor(f'{layer}self_attn.{out}.bias', 0)
  for ours, theirs in ffn.items():
    table[f'ffn/{ours}'] = Tensor(f'{layer}{theirs}.weight', 1)
    table[f'ffn/{ours}_bias'] = Tensor(f'{layer}{theirs}.bias', 0)
  return table


def _outside_tensors(prefix, final_norm):
  """Returns the tensors outside the layers."""
  return {
    'embed/table': Tensor(f'{prefix}embed_tokens.weight', 0),
    'position/table': Tensor(f'{prefix}embed_positions.weight', 0),
    'embed_in/kernel': Tensor(f'{prefix}project_in.weight', 1),
    'embed_out/kernel': Tensor(f'{prefix}project_out.weight', 1),
    'head/kernel': Tensor(HEAD_NAME, 1),
    'final_norm/norm/{norm}': Tensor(f'{prefix}{final_norm}.{{hf}}', 0),
  }


LLAMA = Names(
  _layer_tensors(
    'model.',
    'input_layernorm',
    'post_attention_layernorm',
    'o_proj',
    {'gate': 'mlp.gate_proj', 'up': 'mlp.up_proj', 'down': 'mlp.down_proj'},
  ),
  _outside_tensors('model.', 'norm'),
)
OPT = Names(
  _layer_tensors(
    'model.decoder.',
    'self_attn_layer_norm',
    'final_layer_norm',
    'out_proj',
    {'up': 'fc1', 'down': 'fc2'},
  ),
  _outside_tensors('model.decoder.', 'final_layer_norm'),
)
