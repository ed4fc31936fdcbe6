"""Models whose layers differ in width, for transformers (PyTorch).

Written by ffp_jax beside the weights of a pruned model, and loaded with
`trust_remote_code=True`. Each model is the one of transformers, its linear
layers narrowed to what `per_layer_config` in config.json says.
"""

import transformers
from torch import nn


def _narrowed(linear: nn.Linear, *, inputs=None, outputs=None) -> nn.Linear:
  """A new layer of other widths, where and what the old one was."""
  return nn.Linear(
    inputs or linear.in_features,
    outputs or linear.out_features,
    bias=linear.bias is not None,
    device=linear.weight.device,
    dtype=linear.weight.dtype,
  )


def _narrow(module, names, **widths):
  for name in names:
    setattr(module, name, _narrowed(getattr(module, name), **widths))


def _narrow_gated(layer, own):
  """One layer of LLaMA and what is like it."""
  attention, mlp = layer.self_attn, layer.mlp
  queries = own.num_attention_heads * attention.head_dim
  _narrow(attention, ['q_proj'], outputs=queries)
  keys = own.num_key_value_heads * attention.head_dim
  _narrow(attention, ['k_proj', 'v_proj'], outputs=keys)
  _narrow(attention, ['o_proj'], inputs=queries)
  mlp.intermediate_size = own.intermediate_size
  _narrow(mlp, ['gate_proj', 'up_proj'], outputs=own.intermediate_size)
  _narrow(mlp, ['down_proj'], inputs=own.intermediate_size)


def _narrow_opt(layer, own):
  attention = layer.self_attn
  attention.num_heads = own.num_attention_heads
  width = own.num_attention_heads * attention.head_dim
  _narrow(attention, ['q_proj', 'k_proj', 'v_proj'], outputs=width)
  _narrow(attention, ['out_proj'], inputs=width)
  _narrow(layer, ['fc1'], outputs=own.ffn_dim)
  _narrow(layer, ['fc2'], inputs=own.ffn_dim)


class _Pruned:
  """Narrows each layer once the model is built."""

  def __init__(self, config):
    super().__init__(config)
    narrow = _narrow_opt if config.model_type == 'opt' else _narrow_gated
    layers = self.get_decoder().layers
    for layer, own in zip(layers, config.per_layer_config, strict=True):
      narrow(layer, own)


class PrunedLlamaModel(_Pruned, transformers.LlamaModel):
  pass


class PrunedLlamaForCausalLM(_Pruned, transformers.LlamaForCausalLM):
  pass


class PrunedMistralModel(_Pruned, transformers.MistralModel):
  pass


class PrunedMistralForCausalLM(_Pruned, transformers.MistralForCausalLM):
  pass


class PrunedQwen2Model(_Pruned, transformers.Qwen2Model):
  pass


class PrunedQwen2ForCausalLM(_Pruned, transformers.Qwen2ForCausalLM):
  pass


class PrunedQwen3Model(_Pruned, transformers.Qwen3Model):
  pass


class PrunedQwen3ForCausalLM(_Pruned, transformers.Qwen3ForCausalLM):
  pass


class PrunedOPTModel(_Pruned, transformers.OPTModel):
  pass


class PrunedOPTForCausalLM(_Pruned, transformers.OPTForCausalLM):
  pass
