import dataclasses
import json

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from ffp_jax.checkpoints import model_config
from ffp_jax.models import families, rope
from tests import testing
from tests.testing import CheckpointTestCase as _TestCase


def _llama(vocab, width, ffn, layers, heads, groups, **rest):
  return {
    'model_type': 'llama',
    'vocab_size': vocab,
    'hidden_size': width,
    'intermediate_size': ffn,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': groups,
    **rest,
  }


def _opt(width, ffn, layers, heads, embed, **rest):
  return {
    'model_type': 'opt',
    'vocab_size': 50272,
    'hidden_size': width,
    'ffn_dim': ffn,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'word_embed_proj_dim': embed,
    'max_position_embeddings': 2048,
    **rest,
  }


# name -> (relevant part of config.json, fields, published parameters)
_HUB = {
  'llama_7b': (
    # Its file predates grouped heads.
    {
      key: value
      for key, value in _llama(32000, 4096, 11008, 32, 32, 0).items()
      if key != 'num_key_value_heads'
    },
    {'groups': 32, 'heads_per_group': 1, 'norm_eps': 1e-6, 'tied': False},
    6738415616,
  ),
  'llama_3.1_8b': (
    _llama(
      128256,
      4096,
      14336,
      32,
      32,
      8,
      max_position_embeddings=131072,
      rms_norm_eps=1e-5,
      rope_theta=500000.0,
      rope_scaling={
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192,
        'rope_type': 'llama3',
      },
    ),
    {
      'rope_theta': 500000.0,
      'rope_scaling': rope.Scaling('llama3', 8.0, 8192, 1.0, 4.0),
    },
    8030261248,
  ),
  'llama_3.2_1b': (
    _llama(
      128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True
    ),
    {'head_size': 64, 'tied': True},
    1235814400,
  ),
  'tinyllama': (
    _llama(32000, 2048, 5632, 22, 32, 4, rope_scaling=None),
    {'groups': 4, 'heads_per_group': 8},
    1100048384,
  ),
  'codellama_7b': (
    _llama(32016, 4096, 11008, 32, 32, 32, rope_theta=1000000),
    {'rope_theta': 1000000.0},
    6738546688,
  ),
  'yi_6b': (
    _llama(64000, 4096, 11008, 32, 32, 4, rope_theta=5000000.0),
    {'groups': 4},
    6061035520,
  ),
  'smollm2_135m': (
    _llama(
      49152,
      576,
      1536,
      30,
      9,
      3,
      rope_interleaved=False,
      rope_theta=100000,
      tie_word_embeddings=True,
    ),
    {'head_size': 64, 'heads_per_group': 3},
    134515008,
  ),
  'mistral_7b_0.1': (
    _llama(32000, 4096, 14336, 32, 32, 8)
    | {'model_type': 'mistral', 'sliding_window': 4096},
    {'window': 4096, 'qkv_bias': False},
    7241732096,
  ),
  'mistral_7b_0.3': (
    _llama(32768, 4096, 14336, 32, 32, 8)
    | {'model_type': 'mistral', 'sliding_window': None, 'rope_theta': 1e6},
    {'window': None, 'rope_theta': 1e6},
    7248023552,
  ),
  'mistral_nemo': (
    _llama(131072, 5120, 14336, 40, 32, 8, head_dim=128)
    | {'model_type': 'mistral', 'sliding_window': None},
    {'head_size': 128},
    12247782400,
  ),
  'qwen2.5_0.5b': (
    _llama(151936, 896, 4864, 24, 14, 2)
    | {
      'model_type': 'qwen2',
      'max_window_layers': 21,
      'sliding_window': 32768,
      'tie_word_embeddings': True,
      'use_sliding_window': False,
    },
    {'qkv_bias': True, 'out_bias': False, 'window': None},
    494032768,
  ),
  'qwen3_0.6b': (
    _llama(151936, 1024, 3072, 28, 16, 8, head_dim=128)
    | {'model_type': 'qwen3', 'tie_word_embeddings': True},
    {'qk_norm': True, 'qkv_bias': False, 'head_size': 128},
    596049920,
  ),
  'opt_125m': (_opt(768, 3072, 12, 12, 768), {'final_norm': True}, 125239296),
  'opt_350m': (
    _opt(1024, 4096, 24, 16, 512, do_layer_norm_before=False),
    {'pre_norm': False, 'final_norm': False, 'embed_width': 512},
    331196416,
  ),
}


class ConfigTest(_TestCase):
  @parameterized.named_parameters(
    ('llama', 'llama_grouped', {
      'heads_per_group': 3, 'groups': 2, 'head_size': 16, 'norm_eps': 1e-3,
      'rope_theta': 500.0, 'tied': False, 'window': None, 'qkv_bias': False,
    }),
    ('llama_biased', 'llama_biased', {
      'head_size': 8, 'tied': True, 'qkv_bias': True, 'out_bias': True,
      'ffn_bias': True, 'rope_theta': 10000.0,
    }),
    ('mistral', 'mistral_short_window', {'window': 3, 'gated': True}),
    ('mistral_no_window', 'mistral_no_window', {'window': None, 'groups': 6}),
    ('opt', 'opt_pre_norm', {
      'norm': 'layer', 'positions': 'learned', 'tied': True, 'groups': 3,
      'heads_per_group': 1, 'activation': 'relu', 'gated': False,
      'embed_width': None, 'final_norm': True, 'max_positions': 20,
    }),
    ('opt_projected', 'opt_post_norm_projected', {
      'pre_norm': False, 'final_norm': False, 'embed_width': 20,
    }),
    ('opt_no_final_norm', 'opt_no_final_norm', {
      'pre_norm': True, 'final_norm': False, 'tied': False,
    }),
  )  # fmt: skip
  def test_fields(self, name, expected):
    config = dataclasses.asdict(testing.pair(name).config)
    self.assertEqual({key: config[key] for key in expected}, expected)

  def test_older_files_name_rope_theta_at_the_top(self):
    folder = self.saved('llama_grouped')

    def older(x):
      del x['rope_parameters']
      x['rope_theta'] = 1234
      x['rope_scaling'] = None

    self.edit(folder / 'config.json', older)
    config = model_config.read_model_config(folder)
    self.assertEqual(config.rope_theta, 1234.0)
    self.assertIsInstance(config.rope_theta, float)

  @parameterized.parameters(*_HUB)
  def test_models_of_the_hub(self, name):
    description, expected, total = _HUB[name]
    folder = self.folder()
    (folder / 'config.json').write_text(json.dumps(description))
    config = model_config.read_model_config(folder)
    found = {key: getattr(config, key) for key in expected}
    self.assertEqual(found, expected)
    self.assertEqual(families.param_count(config), total)

  @parameterized.parameters(
    ('llama_linear', 'type'),
    ('llama_dynamic', 'type'),
    ('llama_llama3', 'rope_type'),
    ('llama_yarn', 'type'),
  )
  def test_older_files_state_rope_scaling(self, name, kind_key):
    folder = self.saved(name)

    def older(x):
      x['rope_scaling'] = x.pop('rope_parameters')
      x['rope_theta'] = x['rope_scaling'].pop('rope_theta')
      x['rope_scaling'][kind_key] = x['rope_scaling'].pop('rope_type')

    self.edit(folder / 'config.json', older)
    self.assertEqual(
      model_config.read_model_config(folder), testing.pair(name).config
    )

  def test_param_shapes_allocate_nothing_and_agree(self):
    pair = testing.pair('opt_pre_norm')
    shapes = families.param_shapes(pair.config, jnp.bfloat16)
    for spec, value in zip(
      jax.tree.leaves(shapes), jax.tree.leaves(pair.params), strict=True
    ):
      self.assertIsInstance(spec, jax.ShapeDtypeStruct)
      self.assertEqual(spec.shape, value.shape)
      self.assertEqual(spec.dtype, jnp.bfloat16)


# llm-compressor writes this for a sparse model with plain weights.
_SPARSE = {
  'quant_method': 'compressed-tensors',
  'format': 'dense',
  'config_groups': {},
  'kv_cache_scheme': None,
  'quantization_status': 'frozen',
  'sparsity_config': {
    'format': 'dense',
    'global_sparsity': 0.5,
    'sparsity_structure': '2:4',
  },
}


class OtherToolsTest(_TestCase):
  def test_sparse_but_stored_dense(self):
    folder = self.saved('llama_grouped')
    self.edit(
      folder / 'config.json', lambda x: x.update(quantization_config=_SPARSE)
    )
    pair = testing.pair('llama_grouped')
    self.assert_trees_equal(self.load(folder), pair.params)
    # Calibration changes the zeros, so that the output must not state them.
    self.assertNotIn(
      'quantization_config', model_config.read_config_json(folder)
    )

  @parameterized.parameters('utf-8-sig', 'utf-16', 'utf-16-le', 'utf-32')
  def test_json_of_any_encoding(self, encoding):
    folder = self.saved('llama_grouped', max_shard_size='20KB')
    for path in folder.glob('*.json'):
      path.write_bytes(path.read_text().encode(encoding))
    pair = testing.pair('llama_grouped')
    self.assertEqual(model_config.read_model_config(folder), pair.config)
    self.assert_trees_equal(self.load(folder), pair.params)


class ConfigErrorTest(_TestCase):
  def refused(self, change, *words, name='llama_grouped'):
    folder = self.saved(name)
    self.edit(folder / 'config.json', change)
    self.assert_refused(lambda: self.load(folder), 'config.json', *words)

  def test_no_config(self):
    folder = self.folder()
    self.assert_refused(
      lambda: model_config.read_model_config(folder), str(folder), 'config.json'
    )

  @parameterized.parameters(
    '', '{"model_type": "llama"', '\x00', '[1]', '3', 'null', '[' * 99_999
  )
  def test_not_a_json_object(self, text):
    folder = self.folder()
    (folder / 'config.json').write_text(text)
    self.assert_refused(
      lambda: model_config.read_model_config(folder),
      str(folder / 'config.json'),
    )

  def test_not_text(self):
    folder = self.folder()
    (folder / 'config.json').write_bytes(b'\xff\xfe\x00\xd8')
    self.assert_refused(
      lambda: model_config.read_model_config(folder),
      str(folder / 'config.json'),
    )

  @parameterized.parameters(
    ('llama_grouped', 'hidden_size'),
    ('llama_grouped', 'num_attention_heads'),
    ('llama_grouped', 'num_hidden_layers'),
    ('llama_grouped', 'intermediate_size'),
    ('mistral_short_window', 'vocab_size'),
    ('opt_pre_norm', 'ffn_dim'),
    ('opt_pre_norm', 'max_position_embeddings'),
  )
  def test_missing_key(self, name, key):
    self.refused(lambda x: x.pop(key), f"'{key}'", name=name)

  @parameterized.parameters('gemma', 'gpt2', 'phi3', 'LLaMA', None, 3)
  def test_unsupported_family(self, family):
    self.refused(
      lambda x: x.update(model_type=family), repr(family), 'llama', 'opt'
    )

  def test_no_model_type(self):
    self.refused(lambda x: x.pop('model_type'), 'model_type')

  @parameterized.parameters(
    ('rope_parameters', 'rope_type'), ('rope_scaling', 'type')
  )
  def test_unsupported_rope_scaling(self, key, kind_key):
    def change(x):
      x.pop('rope_parameters')
      x[key] = {kind_key: 'longrope', 'factor': 2.0}

    self.refused(change, key, "'longrope'", 'llama3', 'yarn')

  @parameterized.parameters('attention_bias', 'mlp_bias', 'tie_word_embeddings')
  def test_a_flag_that_is_null(self, key):
    """Refuses null as transformers 5 does."""
    self.refused(lambda x: x.update({key: None}), key, 'null', 'remove')

  def test_an_adapter(self):
    folder = self.folder()
    (folder / 'adapter_config.json').write_text('{}')
    self.assert_refused(
      lambda: model_config.read_model_config(folder), 'merge_and_unload'
    )

  def test_weights_under_another_name(self):
    self.refused(
      lambda x: x.update(transformers_weights='x.safetensors'),
      "'x.safetensors'",
      'model.safetensors',
    )

  @parameterized.named_parameters(
    ('bitmask', {'sparsity_config': {'format': 'sparse-24-bitmask'}},
     'compressed (sparse-24-bitmask)'),
    ('groups', {'config_groups': {'group_0': {'targets': ['Linear']}}},
     'quantised'),
    ('cache', {'kv_cache_scheme': {'num_bits': 8}}, 'quantised'),
    ('packed', {'format': 'pack-quantized'}, 'quantised'),
    ('no_sparsity', {'sparsity_config': None}, 'quantised'),
  )  # fmt: skip
  def test_compressed(self, changes, word):
    quantised = _SPARSE | changes
    self.refused(lambda x: x.update(quantization_config=quantised), word)

  def test_quantised(self):
    quantised = {'quant_method': 'gptq', 'bits': 4}
    self.refused(lambda x: x.update(quantization_config=quantised), 'quantised')

  @parameterized.named_parameters(
    ('groups', 'llama_grouped', {'num_key_value_heads': 4}, '6', '4'),
    ('no_head_size', 'llama_grouped', {
      'head_dim': None, 'num_attention_heads': 10}, '48', '10'),
    ('odd_head_size', 'llama_grouped', {'head_dim': 7}, 'even', '7'),
    ('opt_heads', 'opt_pre_norm', {'num_attention_heads': 5}, '48', '5'),
    ('zero', 'llama_grouped', {'num_hidden_layers': 0}, 'num_hidden_layers'),
    ('negative', 'opt_pre_norm', {'ffn_dim': -4}, 'ffn_dim', '-4'),
    ('no_groups', 'llama_grouped', {'num_key_value_heads': 0}, '0'),
    ('fraction', 'llama_grouped', {'hidden_size': 48.0}, '48.0'),
    ('text', 'llama_grouped', {'vocab_size': '97'}, "'97'"),
    ('boolean', 'llama_grouped', {'num_hidden_layers': True}, 'True'),
    ('null', 'llama_grouped', {'intermediate_size': None}, 'None'),
    ('list', 'opt_pre_norm', {'hidden_size': [48]}, '[48]'),
    ('huge', 'opt_pre_norm', {'vocab_size': 2**31}, 'vocab_size'),
    ('no_flag', 'llama_grouped', {'attention_bias': 'no'}, "'no'"),
    ('flag_is_number', 'opt_pre_norm', {'enable_bias': 1}, 'enable_bias'),
    ('epsilon', 'llama_grouped', {'rms_norm_eps': -1e-5}, 'rms_norm_eps'),
    ('nan', 'llama_grouped', {'rms_norm_eps': float('nan')}, 'nan'),
    ('infinite', 'llama_grouped', {'rms_norm_eps': float('inf')}, 'inf'),
    ('window', 'mistral_short_window', {'sliding_window': 0}, '0'),
    ('windows_by_layer', 'qwen2_tied', {'use_sliding_window': True},
     'use_sliding_window'),
    ('families', 'llama_grouped', {'model_type': ['llama']}, "['llama']"),
    ('kept', 'llama_grouped', {'ffp_jax': 3}, 'ffp_jax', 'object'),
    ('kept_one', 'llama_grouped', {'ffp_jax': {
      'kept_groups': [1, 2]}}, "'kept_ffn' is missing"),
    ('kept_layers', 'llama_grouped', {'ffp_jax': {
      'kept_groups': [1], 'kept_ffn': [7, 7]}}, 'kept_groups', '2 integers'),
    ('kept_more', 'llama_grouped', {'ffp_jax': {
      'kept_groups': [1, 2], 'kept_ffn': [7, 53]}}, 'kept_ffn', '52'),
    ('kept_less', 'llama_grouped', {'ffp_jax': {
      'kept_groups': [1, -1], 'kept_ffn': [7, 7]}}, 'kept_groups', '[1, -1]'),
  )  # fmt: skip
  def test_sizes_that_make_no_model(self, name, changes, *words):
    self.refused(lambda x: x.update(changes), *words, name=name)

  @parameterized.parameters('gelu_new', 'no_such_activation')
  def test_unsupported_activation(self, kind):
    self.refused(
      lambda x: x.update(activation_function=kind), kind, name='opt_pre_norm'
    )


if __name__ == '__main__':
  absltest.main()
