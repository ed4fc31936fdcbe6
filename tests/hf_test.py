import dataclasses
import json
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
import torch
import transformers
from absl.testing import absltest, parameterized

from ffp_jax import files, hf, rope
from ffp_jax.config import RequestError
from tests import testing

_ONE_A_FAMILY = ('llama_biased', 'mistral_short_window', 'opt_pre_norm')
_MODEL = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'


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


# name -> (config.json as far as it matters, fields, published parameters)
_HUB = {
  'llama_7b': (
    # Its file is older than grouped heads.
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


class _TestCase(parameterized.TestCase):
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def saved(self, name, **kwargs) -> pathlib.Path:
    """A CASES model as transformers saves it."""
    folder = self.folder()
    testing.pair(name).torch.save_pretrained(folder, **kwargs)
    return folder

  def edit(self, path, change):
    """Applies `change` to the dict in a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

  def edit_tensors(self, folder, change):
    tensors = safetensors.numpy.load_file(folder / _MODEL)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / _MODEL)

  def load(self, folder, dtype=np.float32):
    config = hf.model_config(folder)
    return files.load_params(folder, config, dtype)

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


class RoundTripTest(_TestCase):
  @parameterized.parameters(
    'llama_biased',
    'llama_yarn',
    'mistral_short_window',
    'opt_bare_norm',
    'opt_no_final_norm',
    'opt_plain_gelu',
    'opt_post_norm_projected',
    'opt_pre_norm',
    'qwen2_tied',
    'qwen3_grouped',
  )
  def test_what_is_saved_is_read_by_us_and_by_transformers(self, name):
    pair = testing.pair(name)
    folder, family = self.folder(), name.split('_')[0]
    size = files.save_params(pair.params, folder, pair.config, family)
    self.assertEqual(size, (folder / _MODEL).stat().st_size)
    self.assertEqual([x.name for x in folder.iterdir()], [_MODEL])
    pair.torch.config.save_pretrained(folder)
    self.assertEqual(hf.model_config(folder), pair.config)
    self.assert_trees_equal(self.load(folder), pair.params)

    load = transformers.AutoModelForCausalLM.from_pretrained
    model, report = load(folder, output_loading_info=True)
    self.assertEmpty(report['missing_keys'])
    self.assertEmpty(report['unexpected_keys'])
    self.assertEmpty(report['mismatched_keys'])
    theirs = pair.torch.state_dict()
    ours = model.state_dict()
    self.assertEqual(ours.keys(), theirs.keys())
    for key, value in ours.items():
      self.assertTrue(torch.equal(value, theirs[key]), key)

  @parameterized.parameters(*_ONE_A_FAMILY)
  def test_reads_shards(self, name):
    folder = self.saved(name, max_shard_size='20KB')
    self.assertFalse((folder / _MODEL).exists())
    self.assertGreater(len(list(folder.glob('*.safetensors'))), 2)
    self.assert_trees_equal(self.load(folder), testing.pair(name).params)

  def test_the_index_decides_which_files_are_read(self):
    folder = self.saved('opt_pre_norm', max_shard_size='20KB')
    (folder / 'other.safetensors').write_bytes(b'not safetensors')
    (folder / _MODEL).write_bytes(b'not safetensors')
    params = testing.pair('opt_pre_norm').params
    self.assert_trees_equal(self.load(folder), params)

  @parameterized.parameters(torch.bfloat16, torch.float16)
  def test_half_precision(self, dtype):
    folder, out = self.folder(), self.folder()
    model = testing.torch_model('llama_biased').to(dtype)
    model.save_pretrained(folder)
    ours = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
    params = self.load(folder, ours[dtype])
    for value in jax.tree.leaves(params):
      self.assertEqual(value.dtype, ours[dtype])
    widened = self.load(folder)
    self.assert_trees_equal(
      widened, jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    )
    config = hf.model_config(folder)
    files.save_params(params, out, config, 'llama')
    (out / 'config.json').write_text((folder / 'config.json').read_text())
    self.assert_trees_equal(self.load(out, ours[dtype]), params)
    key = 'model.layers.1.self_attn.o_proj.weight'
    theirs = model.state_dict()[key].float().numpy()
    np.testing.assert_array_equal(
      safetensors.numpy.load_file(out / _MODEL)[key].astype(np.float32), theirs
    )

  @parameterized.parameters(*_ONE_A_FAMILY)
  def test_sliced_layers_of_different_width(self, name):
    config = dataclasses.replace(
      testing.pair(name).config, kept_groups=(1, 2), kept_ffn=(7, 50)
    )
    source = np.random.default_rng(0)
    params = jax.tree.map(
      lambda x: source.standard_normal(x.shape).astype(x.dtype),
      hf.param_shapes(config, np.float32),
    )
    folder = self.folder()
    files.save_params(params, folder, config, name.split('_')[0])
    testing.pair(name).torch.config.save_pretrained(folder)
    self.edit(
      folder / 'config.json',
      lambda x: x.update(ffp_jax={'kept_groups': [1, 2], 'kept_ffn': [7, 50]}),
    )
    self.assertEqual(hf.model_config(folder), config)
    self.assert_trees_equal(self.load(folder), params)
    stored = safetensors.numpy.load_file(folder / _MODEL)
    widths = {
      value.shape
      for key, value in stored.items()
      if key.endswith(('up_proj.weight', 'fc1.weight'))
    }
    self.assertEqual(widths, {(7, 48), (50, 48)})


class LayoutTest(_TestCase):
  """Single numbers, found by hand."""

  def test_llama(self):
    params = self.load(self.saved('llama_grouped'))
    theirs = testing.pair('llama_grouped').torch.state_dict()
    stack = params['stack']
    # 6 query heads of 16 on 2 groups: head h belongs to group h // 3.
    self.assertEqual(stack['attention']['query'].shape, (2, 48, 2, 3, 16))
    self.assertEqual(stack['attention']['key'].shape, (2, 48, 2, 16))
    self.assertEqual(stack['attention']['out'].shape, (2, 2, 3, 16, 48))
    at = 'model.layers.1.self_attn.'
    for group, head, h, d in ((0, 0, 0, 0), (1, 2, 5, 40), (0, 1, 15, 7)):
      row = (3 * group + head) * 16 + h
      self.assertEqual(
        stack['attention']['query'][1, d, group, head, h].item(),
        theirs[f'{at}q_proj.weight'][row, d].item(),
      )
      self.assertEqual(
        stack['attention']['out'][1, group, head, h, d].item(),
        theirs[f'{at}o_proj.weight'][d, row].item(),
      )
      for ours, name in (('key', 'k_proj'), ('value', 'v_proj')):
        self.assertEqual(
          stack['attention'][ours][1, d, group, h].item(),
          theirs[f'{at}{name}.weight'][16 * group + h, d].item(),
        )
    for ours in ('gate', 'up'):
      self.assertEqual(
        stack['ffn'][ours][0, 3, 51].item(),
        theirs[f'model.layers.0.mlp.{ours}_proj.weight'][51, 3].item(),
      )
    self.assertEqual(
      stack['ffn']['down'][0, 51, 3].item(),
      theirs['model.layers.0.mlp.down_proj.weight'][3, 51].item(),
    )
    self.assertEqual(
      stack['attention_norm']['norm']['scale'][1, 9].item(),
      theirs['model.layers.1.input_layernorm.weight'][9].item(),
    )
    self.assertEqual(
      stack['ffn_norm']['norm']['scale'][1, 9].item(),
      theirs['model.layers.1.post_attention_layernorm.weight'][9].item(),
    )
    self.assertEqual(
      params['embed']['table'][96, 1].item(),
      theirs['model.embed_tokens.weight'][96, 1].item(),
    )
    self.assertEqual(
      params['head']['kernel'][1, 96].item(),
      theirs['lm_head.weight'][96, 1].item(),
    )

  def test_biases(self):
    params = testing.pair('llama_biased').params['stack']
    theirs = testing.pair('llama_biased').torch.state_dict()
    at = 'model.layers.1.'
    # 6 query heads of 8 on 2 groups.
    self.assertEqual(
      params['attention']['query_bias'][1, 1, 2, 5].item(),
      theirs[f'{at}self_attn.q_proj.bias'][5 * 8 + 5].item(),
    )
    self.assertEqual(
      params['attention']['value_bias'][1, 1, 5].item(),
      theirs[f'{at}self_attn.v_proj.bias'][8 + 5].item(),
    )
    self.assertEqual(
      params['attention']['out_bias'][1, 40].item(),
      theirs[f'{at}self_attn.o_proj.bias'][40].item(),
    )
    self.assertEqual(
      params['ffn']['down_bias'][1, 40].item(),
      theirs[f'{at}mlp.down_proj.bias'][40].item(),
    )

  def test_opt(self):
    params = testing.pair('opt_post_norm_projected').params
    theirs = testing.pair('opt_post_norm_projected').torch.state_dict()
    decoder = 'model.decoder.'
    # Row 0 of the positions is the offset's, kept as it is.
    np.testing.assert_array_equal(
      params['position']['table'], theirs[f'{decoder}embed_positions.weight']
    )
    self.assertEqual(params['position']['table'].shape, (22, 48))
    self.assertEqual(
      params['embed_in']['kernel'][19, 47].item(),
      theirs[f'{decoder}project_in.weight'][47, 19].item(),
    )
    self.assertEqual(
      params['embed_out']['kernel'][47, 19].item(),
      theirs[f'{decoder}project_out.weight'][19, 47].item(),
    )
    # The layer's norms, which OPT names alike.
    for ours, name in (
      ('attention_norm', 'self_attn_layer_norm'),
      ('ffn_norm', 'final_layer_norm'),
    ):
      for leaf, key in (('scale', 'weight'), ('bias', 'bias')):
        self.assertEqual(
          params['stack'][ours]['norm'][leaf][1, 9].item(),
          theirs[f'{decoder}layers.1.{name}.{key}'][9].item(),
        )
    self.assertNotIn('final_norm', params)
    self.assertNotIn('head', params)


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
    config = hf.model_config(folder)
    self.assertEqual(config.rope_theta, 1234.0)
    self.assertIsInstance(config.rope_theta, float)

  @parameterized.parameters(*_HUB)
  def test_models_of_the_hub(self, name):
    description, expected, total = _HUB[name]
    folder = self.folder()
    (folder / 'config.json').write_text(json.dumps(description))
    config = hf.model_config(folder)
    found = {key: getattr(config, key) for key in expected}
    self.assertEqual(found, expected)
    self.assertEqual(hf.param_count(config), total)

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
    self.assertEqual(hf.model_config(folder), testing.pair(name).config)

  def test_param_shapes_allocate_nothing_and_agree(self):
    pair = testing.pair('opt_pre_norm')
    shapes = hf.param_shapes(pair.config, jnp.bfloat16)
    for spec, value in zip(
      jax.tree.leaves(shapes), jax.tree.leaves(pair.params), strict=True
    ):
      self.assertIsInstance(spec, jax.ShapeDtypeStruct)
      self.assertEqual(spec.shape, value.shape)
      self.assertEqual(spec.dtype, jnp.bfloat16)


class ConfigErrorTest(_TestCase):
  def refused(self, change, *words, name='llama_grouped'):
    folder = self.saved(name)
    self.edit(folder / 'config.json', change)
    self.assert_refused(lambda: self.load(folder), 'config.json', *words)

  def test_no_config(self):
    folder = self.folder()
    self.assert_refused(
      lambda: hf.model_config(folder), str(folder), 'config.json'
    )

  @parameterized.parameters(
    '', '{"model_type": "llama"', '\x00', '[1]', '3', 'null', '[' * 99_999
  )
  def test_not_a_json_object(self, text):
    folder = self.folder()
    (folder / 'config.json').write_text(text)
    self.assert_refused(
      lambda: hf.model_config(folder), str(folder / 'config.json')
    )

  def test_not_text(self):
    folder = self.folder()
    (folder / 'config.json').write_bytes(b'\xff\xfe\x00\xd8')
    self.assert_refused(
      lambda: hf.model_config(folder), str(folder / 'config.json')
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
    ('kept_none', 'llama_grouped', {'ffp_jax': {
      'kept_groups': [1, 0], 'kept_ffn': [7, 7]}}, 'kept_groups', '[1, 0]'),
  )  # fmt: skip
  def test_sizes_that_make_no_model(self, name, changes, *words):
    self.refused(lambda x: x.update(changes), *words, name=name)

  @parameterized.parameters('gelu_new', 'no_such_activation')
  def test_unsupported_activation(self, kind):
    self.refused(
      lambda x: x.update(activation_function=kind), kind, name='opt_pre_norm'
    )


class WeightsErrorTest(_TestCase):
  def refused(self, folder, *words):
    self.assert_refused(lambda: self.load(folder), *words)

  def test_no_weights(self):
    folder = self.saved('llama_one')
    (folder / _MODEL).unlink()
    self.refused(folder, str(folder / _MODEL))

  def test_missing_shard(self):
    folder = self.saved('llama_one', max_shard_size='5KB')
    shard = sorted(folder.glob('*.safetensors'))[1]
    shard.unlink()
    self.refused(folder, str(shard))

  @parameterized.parameters(0, 4, 100, 0.5, -1)
  def test_truncated(self, size):
    folder = self.saved('llama_one')
    content = (folder / _MODEL).read_bytes()
    size = int(size * len(content)) if isinstance(size, float) else size
    (folder / _MODEL).write_bytes(content[:size])
    self.refused(folder, str(folder / _MODEL))

  def test_not_safetensors(self):
    folder = self.saved('llama_one')
    (folder / _MODEL).write_bytes(b'<html>Not found</html>' * 99)
    self.refused(folder, str(folder / _MODEL))

  @parameterized.parameters('{"weight_map": ', '{}', '[]')
  def test_broken_index(self, text):
    folder = self.saved('llama_one', max_shard_size='5KB')
    (folder / _INDEX).write_text(text)
    self.refused(folder, str(folder / _INDEX))

  @parameterized.parameters(
    ('llama_one', 'model.layers.0.self_attn.k_proj.weight'),
    ('llama_one', 'model.norm.weight'),
    ('llama_one', 'lm_head.weight'),
    ('opt_pre_norm', 'model.decoder.layers.1.fc1.bias'),
    ('opt_pre_norm', 'model.decoder.embed_positions.weight'),
  )
  def test_missing_tensor(self, name, tensor):
    folder = self.saved(name)
    self.edit_tensors(folder, lambda x: x.pop(tensor))
    self.refused(folder, str(folder), tensor)

  @parameterized.parameters(
    'model.layers.0.self_attn.q_proj.weight',
    'model.layers.0.mlp.down_proj.weight',
    'model.layers.0.input_layernorm.weight',
    'model.embed_tokens.weight',
  )
  def test_wrong_shape(self, tensor):
    folder = self.saved('llama_one')

    def narrower(tensors):
      tensors[tensor] = np.ascontiguousarray(tensors[tensor][..., :-1])

    self.edit_tensors(folder, narrower)
    self.refused(folder, str(folder), tensor)

  def test_transposed_is_a_wrong_shape(self):
    folder = self.saved('llama_one')
    key = 'model.layers.0.mlp.up_proj.weight'

    def transpose(tensors):
      tensors[key] = np.ascontiguousarray(tensors[key].T)

    self.edit_tensors(folder, transpose)
    self.refused(folder, key, '(52, 16)', '(16, 52)')

  def test_shapes_are_checked_before_anything_is_read(self):
    folder = self.saved('opt_pre_norm')
    self.edit(folder / 'config.json', lambda x: x.update(vocab_size=96))
    with mock.patch.object(np, 'empty', side_effect=AssertionError):
      self.refused(folder, 'embed_tokens', '(97, 48)', '(96, 48)')


if __name__ == '__main__':
  absltest.main()
