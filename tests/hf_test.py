import dataclasses

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from ffp_jax import hf
from tests import testing
from tests.testing import CheckpointTestCase as _TestCase


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

  @parameterized.parameters('', '{"model_type": "llama"', '\x00', '[1]', '3')
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

  @parameterized.parameters('gpt2', 'LLaMA', None, 3)
  def test_unsupported_family(self, family):
    self.refused(
      lambda x: x.update(model_type=family), repr(family), 'llama', 'opt'
    )

  def test_no_model_type(self):
    self.refused(lambda x: x.pop('model_type'), 'model_type')

  @parameterized.parameters(
    ('rope_parameters', 'rope_type', 'llama3'),
    ('rope_parameters', 'rope_type', 'yarn'),
    ('rope_scaling', 'type', 'linear'),
    ('rope_scaling', 'rope_type', 'dynamic'),
  )
  def test_unsupported_rope_scaling(self, key, kind_key, kind):
    def change(x):
      x.pop('rope_parameters')
      x[key] = {kind_key: kind, 'factor': 2.0, 'rope_theta': 10000.0}

    self.refused(change, repr(kind))

  @parameterized.parameters('gelu_new', 'no_such_activation')
  def test_unsupported_activation(self, kind):
    self.refused(
      lambda x: x.update(activation_function=kind), kind, name='opt_pre_norm'
    )


if __name__ == '__main__':
  absltest.main()
