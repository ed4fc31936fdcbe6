"""Models of PyTorch transformers whose layers differ in width.

ffp_jax writes this file beside the weights of a pruned model; transformers
loads it with `trust_remote_code=True`. Each class is a model of transformers
whose linear layers have the widths in `per_layer_config` of config.json.
"""

from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn


def _narrowed(
  linear: nn.Linear, *, inputs: int | None = None, outputs: int | None = None
) -> nn.Linear:
  """Returns a new layer of other widths; bias, device and dtype stay."""
  return nn.Linear(
    inputs or linear.in_features,
    outputs or linear.out_features,
    bias=linear.bias is not None,
    device=linear.weight.device,
    dtype=linear.weight.dtype,
  )


def _narrow(module: nn.Module, names: Sequence[str], **widths: int):
  """Replaces linear layers of a module; see `_narrowed`."""
  for name in names:
    setattr(module, name, _narrowed(getattr(module, name), **widths))


def _narrow_gated(layer: Any, config: Any):
  """Narrows a decoder layer of LLaMA, Mistral or Qwen."""
  attention, mlp = layer.self_attn, layer.mlp
  queries = config.num_attention_heads * attention.head_dim
  _narrow(attention, ['q_proj'], outputs=queries)
  keys = config.num_key_value_heads * attention.head_dim
  _narrow(attention, ['k_proj', 'v_proj'], outputs=keys)
  _narrow(attention, ['o_proj'], inputs=queries)
  mlp.intermediate_size = config.intermediate_size
  _narrow(mlp, ['gate_proj', 'up_proj'], outputs=config.intermediate_size)
  _narrow(mlp, ['down_proj'], inputs=config.intermediate_size)


def _narrow_opt(layer: Any, config: Any):
  """Narrows a decoder layer of OPT."""
  attention = layer.self_attn
  attention.num_heads = config.num_attention_heads
  width = config.num_attention_heads * attention.head_dim
  _narrow(attention, ['q_proj', 'k_proj', 'v_proj'], outputs=width)
  _narrow(attention, ['out_proj'], inputs=width)
  _narrow(layer, ['fc1'], outputs=config.ffn_dim)
  _narrow(layer, ['fc2'], inputs=config.ffn_dim)


class _Pruned:
  """Mixin that narrows each layer once the model is built."""

  def __init__(self, config: Any):
    super().__init__(config)  # ty: ignore[too-many-positional-arguments]
    narrow = _narrow_opt if config.model_type == 'opt' else _narrow_gated
    layers = self.get_decoder().layers  # ty: ignore[missing-attribute]
    for layer, widths in zip(layers, config.per_layer_config, strict=True):
      narrow(layer, widths)


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
