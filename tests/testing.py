"""Tiny random PyTorch models of every family, and the same ones in JAX."""

import copy
import functools
import json
import pathlib
import tempfile
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy
import torch
import transformers
from absl.testing import parameterized

from ffp_jax.checkpoints import model_config, weights
from ffp_jax.errors import RequestError
from ffp_jax.export import slicing
from ffp_jax.models.decoder import Masks, ModelConfig

# Every width differs from every other, so that no wrong axis goes unseen.
_ROPE = {
  'vocab_size': 97,
  'hidden_size': 48,
  'intermediate_size': 52,
  'num_hidden_layers': 2,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'max_position_embeddings': 32,
  'rms_norm_eps': 1e-3,
}
_OPT = {
  'vocab_size': 97,
  'hidden_size': 48,
  'ffn_dim': 52,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'max_position_embeddings': 20,
  'dropout': 0.0,
}


def _stretched(kind, **numbers):
  """Changes to _ROPE: positions stretched from 8, fewer than tests use."""
  if kind in ('llama3', 'yarn'):
    numbers['original_max_position_embeddings'] = 8
  rope = {'rope_type': kind, 'rope_theta': 100.0, 'factor': 4.0} | numbers
  return {'head_dim': 16, 'rope_parameters': rope}


# name -> (transformers config class, its arguments)
CASES = {
  # Head size 16 is not 48 / 6.
  'llama_grouped': (
    transformers.LlamaConfig,
    _ROPE
    | {
      'head_dim': 16,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0},
    },
  ),
  'llama_biased': (
    transformers.LlamaConfig,
    _ROPE
    | {'attention_bias': True, 'mlp_bias': True, 'tie_word_embeddings': True},
  ),
  'llama_one': (
    transformers.LlamaConfig,
    _ROPE
    | {
      'hidden_size': 16,
      'num_hidden_layers': 1,
      'num_attention_heads': 1,
      'num_key_value_heads': 1,
      'head_dim': 8,
    },
  ),
  'llama_linear': (
    transformers.LlamaConfig,
    _ROPE | _stretched('linear'),
  ),
  'llama_dynamic': (
    transformers.LlamaConfig,
    _ROPE | _stretched('dynamic') | {'max_position_embeddings': 8},
  ),
  'llama_llama3': (
    transformers.LlamaConfig,
    _ROPE | _stretched('llama3', low_freq_factor=0.1, high_freq_factor=1.0),
  ),
  'llama_yarn': (
    transformers.LlamaConfig,
    _ROPE | _stretched('yarn', beta_fast=0.8, beta_slow=0.1),
  ),
  'mistral_yarn_scales': (
    transformers.MistralConfig,
    _ROPE
    | _stretched(
      'yarn',
      beta_fast=0.8,
      beta_slow=0.1,
      truncate=False,
      mscale=3.0,
      mscale_all_dim=0.5,
    ),
  ),
  'mistral_short_window': (
    transformers.MistralConfig,
    _ROPE | {'head_dim': 8, 'sliding_window': 3},
  ),
  'mistral_long_window': (
    transformers.MistralConfig,
    _ROPE | {'num_key_value_heads': 3, 'sliding_window': 30},
  ),
  # 6 heads of 6 are narrower than 48.
  'mistral_no_window': (
    transformers.MistralConfig,
    _ROPE | {'num_key_value_heads': 6, 'head_dim': 6, 'sliding_window': None},
  ),
  'qwen2_tied': (
    transformers.Qwen2Config,
    _ROPE | {'tie_word_embeddings': True},
  ),
  'qwen3_grouped': (transformers.Qwen3Config, _ROPE | {'head_dim': 10}),
  'opt_pre_norm': (transformers.OPTConfig, _OPT),
  'opt_post_norm_projected': (
    transformers.OPTConfig,
    _OPT | {'do_layer_norm_before': False, 'word_embed_proj_dim': 20},
  ),
  'opt_no_final_norm': (
    transformers.OPTConfig,
    _OPT | {'_remove_final_layer_norm': True, 'tie_word_embeddings': False},
  ),
  'opt_bare_norm': (
    transformers.OPTConfig,
    _OPT | {'layer_norm_elementwise_affine': False},
  ),
  'opt_plain_gelu': (
    transformers.OPTConfig,
    _OPT
    | {
      'enable_bias': False,
      'activation_function': 'gelu',
      'num_hidden_layers': 1,
    },
  ),
}


class Pair(NamedTuple):
  """One random model, twice."""

  torch: torch.nn.Module
  config: ModelConfig
  params: dict


def torch_model(name: str, seed: int = 0) -> torch.nn.Module:
  """A CASES model in float32; no norm or bias is left at 0 or 1."""
  torch.set_num_threads(1)
  kind, kwargs = CASES[name]
  config = kind(**kwargs, attn_implementation='eager')
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  source = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for key, value in model.named_parameters():
      value.normal_(generator=source)
      if value.ndim == 2:
        # Embeddings keep standard deviation 1, as their fan-in is one row.
        value.mul_(1.0 if 'embed' in key else value.shape[1] ** -0.5)
      else:
        value.mul_(0.3).add_('norm' in key and key.endswith('weight'))
  return model.requires_grad_(False)


@functools.cache
def pair(name: str) -> Pair:
  """A CASES model, and what `hf` reads of its saved checkpoint."""
  model = torch_model(name)
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    config = model_config.read_model_config(pathlib.Path(folder))
    params = weights.load_params(pathlib.Path(folder), config, np.float32)
    return Pair(model, config, params)


def tokens(batch: int, time: int, seed: int = 0) -> np.ndarray:
  """Random token ids of the CASES vocabulary, int32 [batch, time]."""
  source = np.random.default_rng(seed)
  return source.integers(0, 97, (batch, time), np.int32)


def random_masks(config: ModelConfig, seed: int = 0) -> Masks:
  """Random 0/1 masks; every layer has both, but a lone unit is kept."""
  source = np.random.default_rng(seed)

  def half(units):
    mask_LxU = np.tile(1 - np.arange(units) % 2, (config.layers, 1))
    return source.permuted(mask_LxU, axis=1).astype(np.float32)

  return Masks(half(config.groups), half(config.ffn))


def without_sublayers(keep: Masks) -> Masks:
  """Masks without the attention of layer 0 and the FFN of the last layer."""
  attention, ffn = (np.array(mask) for mask in keep)
  attention[0], ffn[-1] = 0.0, 0.0
  return Masks(attention, ffn)


def masks_of(config: ModelConfig, groups, channels) -> Masks:
  """Random masks that keep so many units of each layer."""
  source = np.random.default_rng(0)

  def half(units, kept):
    mask_LxU = np.arange(units) < np.array(kept)[:, None]
    return source.permuted(mask_LxU, axis=1).astype(np.float32)

  return Masks(half(config.groups, groups), half(config.ffn, channels))


def write_pruned(dense: pathlib.Path, groups, channels) -> pathlib.Path:
  """Prunes a model directory, at random.

  Args:
    dense: directory of the model.
    groups, channels: to keep, [L] each.

  Returns:
    The directory of the pruned model, `pruned` beside the dense one.
  """
  config = model_config.read_model_config(dense)
  params = weights.load_params(dense, config, np.float32)
  keep = masks_of(config, groups, channels)
  small = slicing.slice_params(params, config, keep)
  slicing.save(*small, dense, dense.with_name('pruned'))
  return dense.with_name('pruned')


def blocks(model) -> list[dict[str, torch.nn.Linear]]:
  """The linear modules of each layer, under our names."""
  if hasattr(model.model, 'decoder'):
    return [
      {
        'query': layer.self_attn.q_proj,
        'key': layer.self_attn.k_proj,
        'value': layer.self_attn.v_proj,
        'out': layer.self_attn.out_proj,
        'up': layer.fc1,
        'down': layer.fc2,
      }
      for layer in model.model.decoder.layers
    ]
  return [
    {
      'query': layer.self_attn.q_proj,
      'key': layer.self_attn.k_proj,
      'value': layer.self_attn.v_proj,
      'out': layer.self_attn.o_proj,
      'gate': layer.mlp.gate_proj,
      'up': layer.mlp.up_proj,
      'down': layer.mlp.down_proj,
    }
    for layer in model.model.layers
  ]


def without_units(pair: Pair, masks: Masks) -> torch.nn.Module:
  """A copy of the PyTorch model, the weights of masked units zeroed."""
  model = copy.deepcopy(pair.torch)
  c = pair.config
  for block, attention, ffn in zip(blocks(model), *masks, strict=True):
    keep_of = {
      'query': np.repeat(attention, c.heads_per_group * c.head_size),
      'key': np.repeat(attention, c.head_size),
      'value': np.repeat(attention, c.head_size),
      'gate': ffn,
      'up': ffn,
    }
    for name, linear in block.items():
      if name in keep_of:
        keep = torch.tensor(keep_of[name])
        linear.weight.mul_(keep[:, None])
        if linear.bias is not None:
          linear.bias.mul_(keep)
    block['out'].weight.mul_(torch.tensor(keep_of['query']))
    block['down'].weight.mul_(torch.tensor(ffn))
  return model


def output_inputs(pair: Pair, tokens_BxT):
  """What PyTorch feeds the output projections.

  Returns:
    float32 (attention [L,B,T,K,G,H], FFN [L,B,T,F]).
  """
  seen = {'out': [], 'down': []}
  handles = [
    block[name].register_forward_pre_hook(
      lambda _, inputs, name=name: seen[name].append(inputs[0].numpy())
    )
    for block in blocks(pair.torch)
    for name in seen
  ]
  torch_logits(pair.torch, tokens_BxT)
  for handle in handles:
    handle.remove()
  c, lead = pair.config, (pair.config.layers, *tokens_BxT.shape)
  return (
    np.stack(seen['out']).reshape(
      *lead, c.groups, c.heads_per_group, c.head_size
    ),
    np.stack(seen['down']).reshape(*lead, c.ffn),
  )


def torch_logits(model, tokens_BxT, real_BxT=None) -> np.ndarray:
  """Logits [B,T,V] of a PyTorch model; `real` is 0 where there is padding."""
  if real_BxT is not None:
    real_BxT = torch.tensor(real_BxT).long()
  with torch.no_grad():
    output = model(torch.tensor(tokens_BxT).long(), attention_mask=real_BxT)
    return output.logits.numpy()


class CheckpointTestCase(parameterized.TestCase):
  """Model directories to make, to damage and to load."""

  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def saved(self, name, **kwargs) -> pathlib.Path:
    """A CASES model as transformers saves it."""
    folder = self.folder()
    pair(name).torch.save_pretrained(folder, **kwargs)
    return folder

  def edit(self, path, change):
    """Applies `change` to the dict in a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

  def edit_tensors(self, folder, change):
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')

  def load(self, folder, dtype=np.float32):
    config = model_config.read_model_config(folder)
    return weights.load_params(folder, config, dtype)

  def assert_read_as_transformers(self, folder):
    """Every number and the tie are what transformers loads in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32
    )
    config, theirs = model_config.read_model_config(folder), model.state_dict()
    embedding = model.get_input_embeddings().weight
    self.assertEqual(config.tied, model.lm_head.weight is embedding)
    family = model.config.model_type
    params = weights.load_params(folder, config, np.float32)
    for name, value in weights.named_tensors(params, config, family):
      np.testing.assert_array_equal(value, theirs[name].numpy(), name)

  def assert_trees_equal(self, a, b):
    """Same keys, dtypes and bits."""
    self.assertEqual(jax.tree.structure(a), jax.tree.structure(b))

    def equal(a, b):
      self.assertEqual(a.dtype, b.dtype)
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(equal, a, b)

  def assert_refused(self, call, *words):
    """RequestError of one line, with every word in it."""
    with self.assertRaises(RequestError) as caught:
      call()
    message = str(caught.exception)
    self.assertNotEmpty(message)
    self.assertNotIn('\n', message)
    for word in words:
      self.assertIn(word, message)
