import dataclasses
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
import torch
import transformers
from absl.testing import absltest, parameterized

from ffp_jax import files, hf
from tests import testing
from tests.testing import CheckpointTestCase as _TestCase

_ONE_A_FAMILY = ('llama_biased', 'mistral_short_window', 'opt_pre_norm')
_MODEL = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'


class RoundTripTest(_TestCase):
  @parameterized.parameters(
    *(x for x in testing.CASES if x not in ('llama_one', 'mistral_no_window'))
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
