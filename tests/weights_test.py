import dataclasses
import io
import json
import pathlib
import pickle
import sys
import tarfile
from unittest import mock

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
import torch
import transformers
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from ffp_jax.checkpoints import directory, model_config, shards, weights
from ffp_jax.models import families
from tests import testing
from tests.testing import CheckpointTestCase as _TestCase

_ONE_A_FAMILY = ('llama_biased', 'mistral_short_window', 'opt_pre_norm')
_MODEL = 'model.safetensors'
_FLAX = 'flax_model.msgpack'
_TORCH = 'pytorch_model.bin'
_INDEX = 'model.safetensors.index.json'


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
    size = weights.save_params(pair.params, folder, pair.config, family)
    self.assertEqual(size, (folder / _MODEL).stat().st_size)
    self.assertEqual([x.name for x in folder.iterdir()], [_MODEL])
    pair.torch.config.save_pretrained(folder)
    self.assertEqual(model_config.read_model_config(folder), pair.config)
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
    config = model_config.read_model_config(folder)
    weights.save_params(params, out, config, 'llama')
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
      families.param_shapes(config, np.float32),
    )
    folder = self.folder()
    weights.save_params(params, folder, config, name.split('_')[0])
    testing.pair(name).torch.config.save_pretrained(folder)
    self.edit(
      folder / 'config.json',
      lambda x: x.update(ffp_jax={'kept_groups': [1, 2], 'kept_ffn': [7, 50]}),
    )
    self.assertEqual(model_config.read_model_config(folder), config)
    self.assert_trees_equal(self.load(folder), params)
    stored = safetensors.numpy.load_file(folder / _MODEL)
    widths = {
      value.shape
      for key, value in stored.items()
      if key.endswith(('up_proj.weight', 'fc1.weight'))
    }
    self.assertEqual(widths, {(7, 48), (50, 48)})


def _flax_tree(name) -> dict:
  """Nests and names a CASES model as transformers' Flax models did."""
  tree = {}
  for key, value in testing.pair(name).torch.state_dict().items():
    *path, leaf = key.split('.')
    value = value.numpy()
    if 'embed_' in path[-1]:
      leaf = 'embedding'
    elif value.ndim == 2:
      leaf, value = 'kernel', np.ascontiguousarray(value.T)
    elif 'layer_norm' in path[-1] and leaf == 'weight':
      leaf = 'scale'  # of flax's LayerNorm; RMS norms had 'weight'
    if key == 'lm_head.weight' and testing.pair(name).config.tied:
      continue
    at = tree
    for part in path:
      at = at.setdefault(part, {})
    at[leaf] = value
  return tree


class FlaxTest(_TestCase):
  def written(self, name, tree=None) -> pathlib.Path:
    folder = self.folder()
    testing.pair(name).torch.config.save_pretrained(folder)
    content = flax.serialization.to_bytes(tree or _flax_tree(name))
    (folder / _FLAX).write_bytes(content)
    return folder

  @parameterized.parameters(*testing.CASES)
  def test_reads_every_family(self, name):
    loaded = self.load(self.written(name))
    self.assert_trees_equal(loaded, testing.pair(name).params)

  def test_a_tree_under_params(self):
    folder = self.written(
      'opt_pre_norm', {'params': _flax_tree('opt_pre_norm')}
    )
    self.assert_trees_equal(
      self.load(folder), testing.pair('opt_pre_norm').params
    )

  @parameterized.parameters('llama_biased', 'opt_post_norm_projected')
  def test_arrays_in_chunks(self, name):
    with mock.patch.object(flax.serialization, 'MAX_CHUNK_SIZE', 1000):
      folder = self.written(name)
    self.assertIn(b'msgpack_chunked', (folder / _FLAX).read_bytes())
    with mock.patch.object(shards, '_PIECE', 100):
      self.assert_trees_equal(self.load(folder), testing.pair(name).params)

  def test_shards(self):
    tree = _flax_tree('opt_pre_norm')
    folder = self.written('opt_pre_norm')
    (folder / _FLAX).unlink()
    layers = tree['model']['decoder'].pop('layers')
    parts = {'a.msgpack': tree}
    parts['b.msgpack'] = {'model': {'decoder': {'layers': layers}}}
    for name, part in parts.items():
      (folder / name).write_bytes(flax.serialization.to_bytes(part))
    index = {'weight_map': {'x': 'a.msgpack', 'y': 'b.msgpack'}}
    (folder / f'{_FLAX}.index.json').write_text(json.dumps(index))
    self.assert_trees_equal(
      self.load(folder), testing.pair('opt_pre_norm').params
    )

  @parameterized.parameters(0, 1, 50, 0.5, -1)
  def test_truncated(self, size):
    folder = self.written('llama_one')
    content = (folder / _FLAX).read_bytes()
    size = int(size * len(content)) if isinstance(size, float) else size
    (folder / _FLAX).write_bytes(content[:size])
    self.assert_refused(lambda: self.load(folder), str(folder / _FLAX))

  @parameterized.parameters(
    b'<html>',
    b'\x81',
    b'\xc1',
    b'\x90',
    b'\x81\xa1a\xc7\x05\x01abcde',
    b'\x81' * 9999,
  )
  def test_damaged(self, content):
    folder = self.written('llama_one')
    (folder / _FLAX).write_bytes(content)
    self.assert_refused(lambda: self.load(folder), str(folder / _FLAX))


class _Evil:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


class TorchTest(_TestCase):
  def written(self, name, dtype=torch.float32) -> pathlib.Path:
    folder = self.folder()
    model = testing.torch_model(name).to(dtype)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / _TORCH)
    return folder

  @parameterized.parameters(*_ONE_A_FAMILY, 'opt_post_norm_projected')
  def test_reads_every_family(self, name):
    loaded = self.load(self.written(name))
    self.assert_trees_equal(loaded, testing.pair(name).params)

  @parameterized.parameters('float16', 'bfloat16')
  def test_half_precision(self, dtype):
    folder = self.written('llama_grouped', getattr(torch, dtype))
    want = jax.tree.map(
      lambda x: np.asarray(x).astype(dtype).astype(np.float32),
      testing.pair('llama_grouped').params,
    )
    self.assert_trees_equal(self.load(folder), want)

  def test_shards(self):
    folder = self.written('opt_pre_norm')
    state = sorted(torch.load(folder / _TORCH).items())
    (folder / _TORCH).unlink()
    where = {}
    for i, part in enumerate((state[:9], state[9:])):
      name = f'pytorch_model-{i}.bin'
      torch.save(dict(part), folder / name)
      where |= {key: name for key, _ in part}
    index = folder / f'{_TORCH}.index.json'
    index.write_text(json.dumps({'weight_map': where}))
    self.assert_trees_equal(
      self.load(folder), testing.pair('opt_pre_norm').params
    )

  def test_without_torch(self):
    folder = self.written('llama_one')
    with mock.patch.dict(sys.modules, torch=None):
      self.assert_refused(
        lambda: self.load(folder), 'pip install torch', 'safetensors'
      )

  @parameterized.parameters('float32', 'float16', 'bfloat16', 'float64')
  def test_the_old_format(self, dtype):
    folder = self.written('llama_grouped', getattr(torch, dtype))
    state = torch.load(folder / _TORCH)
    torch.save(state, folder / _TORCH, _use_new_zipfile_serialization=False)
    self.assert_read_as_transformers(folder)

  @parameterized.parameters(0, 10, 200, 0.5, -1)
  def test_the_old_format_truncated(self, size):
    folder = self.written('llama_one')
    state = torch.load(folder / _TORCH)
    torch.save(state, folder / _TORCH, _use_new_zipfile_serialization=False)
    content = (folder / _TORCH).read_bytes()
    size = int(size * len(content)) if isinstance(size, float) else size
    (folder / _TORCH).write_bytes(content[:size])
    self.assert_refused(
      lambda: self.load(folder), str(folder / _TORCH), 'truncated'
    )

  @parameterized.parameters(True, False)
  def test_a_whole_model(self, zipped):
    folder = self.written('llama_one')
    torch.save(
      testing.torch_model('llama_one'),
      folder / _TORCH,
      _use_new_zipfile_serialization=zipped,
    )
    self.assert_refused(
      lambda: self.load(folder), 'whole pickled model', 'save_pretrained'
    )

  def test_the_oldest_format(self):
    folder = self.written('llama_one')
    with tarfile.open(folder / _TORCH, 'w') as tar:
      for name in ('storages', 'tensors', 'pickle'):
        content = pickle.dumps(0)
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    self.assert_refused(lambda: self.load(folder), 'tar', 'save_pretrained')

  def test_a_training_state(self):
    folder = self.written('llama_one')
    state = torch.load(folder / _TORCH)
    torch.save({'epoch': 3, 'state_dict': state}, folder / _TORCH)
    self.assert_refused(lambda: self.load(folder), "['state_dict']")

  def test_not_contiguous(self):
    folder = self.written('llama_one')
    state = torch.load(folder / _TORCH)
    for key, value in state.items():
      state[key] = value.T.contiguous().T if value.ndim == 2 else value
    torch.save(state, folder / _TORCH)
    self.assert_read_as_transformers(folder)

  def test_runs_no_code(self):
    folder = self.written('llama_one')
    torch.save({'x': _Evil(folder / 'made')}, folder / _TORCH)
    self.assert_refused(
      lambda: self.load(folder), str(folder / _TORCH), 'more than tensors'
    )
    self.assertFalse((folder / 'made').exists())

  @parameterized.parameters(0, 10, 0.5, -1)
  def test_truncated(self, size):
    folder = self.written('llama_one')
    content = (folder / _TORCH).read_bytes()
    size = int(size * len(content)) if isinstance(size, float) else size
    (folder / _TORCH).write_bytes(content[:size])
    self.assert_refused(lambda: self.load(folder), str(folder / _TORCH))

  def test_not_a_state_dict(self):
    folder = self.written('llama_one')
    torch.save(torch.zeros(3), folder / _TORCH)
    self.assert_refused(lambda: self.load(folder), str(folder / _TORCH))


def _whole(folder, tensors):
  safetensors.numpy.save_file(tensors, folder / _MODEL)


def _shards(folder, tensors):
  where = {}
  for i, key in enumerate(sorted(tensors)):
    name = f'model-{i % 2}.safetensors'
    where[key] = name
  for name in set(where.values()):
    part = {key: tensors[key] for key in where if where[key] == name}
    safetensors.numpy.save_file(part, folder / name)
  index = {'metadata': {}, 'weight_map': where}
  (folder / _INDEX).write_text(json.dumps(index))


def _stale_index(folder, tensors):
  where = dict.fromkeys(tensors, 'model-9.safetensors')
  index = {'metadata': {}, 'weight_map': where}
  (folder / _INDEX).write_text(json.dumps(index))


def _bin(folder, tensors, name=_TORCH):
  state = {key: torch.from_numpy(value) for key, value in tensors.items()}
  torch.save(state, folder / name)


def _bin_shards(folder, tensors):
  _bin(folder, tensors, 'pytorch_model-1.bin')
  where = dict.fromkeys(tensors, 'pytorch_model-1.bin')
  index = {'metadata': {}, 'weight_map': where}
  (folder / f'{_TORCH}.index.json').write_text(json.dumps(index))


def _another_name(folder, tensors):
  safetensors.numpy.save_file(tensors, folder / 'consolidated.safetensors')


def _unread(folder, tensors):
  del tensors
  for name in (_FLAX, 'x.gguf'):
    (folder / name).write_bytes(b'not read')
  (folder / 'params').mkdir()


class ChoiceTest(_TestCase):
  """Tests the choice among several checkpoints in one directory."""

  def written(self, *saves) -> pathlib.Path:
    folder = self.saved('llama_one')
    tensors = safetensors.numpy.load_file(folder / _MODEL)
    (folder / _MODEL).unlink()
    for i, save in enumerate(saves):
      save(folder, {key: value + i for key, value in tensors.items()})
    return folder

  @parameterized.parameters(
    ((_shards, _whole), 'model-0.safetensors'),
    ((_whole, _stale_index), _INDEX),
    ((_shards, _whole, _bin), _TORCH),
    ((_bin, _shards), _TORCH),
    ((_bin_shards, _bin), 'pytorch_model-1.bin'),
    ((_bin_shards, _shards), 'pytorch_model-1.bin'),
    ((_another_name, _whole), 'consolidated.safetensors'),
    ((_another_name, _bin), 'consolidated.safetensors'),
    ((_whole, _unread), _FLAX),
    ((_shards, _unread), 'x.gguf'),
    ((_bin, _unread), 'params'),
    ((_bin_shards, _unread), _FLAX),
  )
  def test_what_transformers_reads(self, saves, passed_over):
    folder = self.written(*saves)
    with self.assertLogs('absl', 'WARNING') as logs:
      self.assert_read_as_transformers(folder)
    (line,) = [x.getMessage() for x in logs.records]
    read, passed = line.split('passed over: ')
    self.assertIn(str(folder), read)
    self.assertIn(passed_over, passed)

  @parameterized.parameters(_whole, _shards, _bin, _bin_shards)
  def test_one_save_says_nothing(self, save):
    folder = self.written(save)
    with self.assertNoLogs('absl', 'WARNING'):
      self.assert_read_as_transformers(folder)

  def test_without_torch_flax_before_bin(self):
    folder = self.written(_bin)
    tree = flax.serialization.msgpack_serialize(_flax_tree('llama_one'))
    (folder / _FLAX).write_bytes(tree)
    with mock.patch.dict(sys.modules, torch=None):
      loaded = self.load(folder)
    self.assert_trees_equal(loaded, testing.pair('llama_one').params)

  def test_two_gguf_files(self):
    folder = self.written()
    for name in ('a.gguf', 'b.gguf'):
      (folder / name).touch()
    self.assert_refused(lambda: self.load(folder), 'single .gguf')

  def test_other_names_are_named(self):
    folder = self.written(_another_name)
    self.assert_refused(lambda: self.load(folder), 'consolidated.safetensors')

  def test_a_dead_link(self):
    folder = self.written()
    (folder / _MODEL).symlink_to('/no/such/file')
    self.assert_refused(lambda: self.load(folder), '/no/such/file')

  def test_a_distributed_checkpoint(self):
    folder = self.written(_whole)
    name = 'shard-00000-model-00001-of-00001.safetensors'
    (folder / _MODEL).rename(folder / name)
    self.assert_refused(lambda: self.load(folder), name, 'save_pretrained')

  @parameterized.parameters(_MODEL, _TORCH)
  def test_a_git_lfs_pointer(self, name):
    folder = self.written()
    (folder / name).write_text('version https://git-lfs.github.com/spec/v1\n')
    self.assert_refused(lambda: self.load(folder), name, 'git lfs pull')


class TiedTest(_TestCase):
  """Tests models that are tied by config.json, or by default."""

  _EMBED = {
    'llama_biased': 'model.embed_tokens.weight',
    'qwen2_tied': 'model.embed_tokens.weight',
    'opt_pre_norm': 'model.decoder.embed_tokens.weight',
    'opt_post_norm_projected': 'model.decoder.embed_tokens.weight',
  }

  def written(self, name, change) -> pathlib.Path:
    """Writes a model; `change` takes the tensors and the embedding's name."""
    folder = self.saved(name)
    self.edit_tensors(folder, lambda x: change(x, self._EMBED[name]))
    return folder

  @parameterized.product(name=(*_EMBED,), row=(0, 50, 96))
  def test_both_stored_and_different(self, name, row):
    def change(tensors, embed):
      head = tensors[embed].copy()
      head[row, -1] += 1
      tensors['lm_head.weight'] = head

    folder = self.written(name, change)
    with self.assertLogs('absl', 'WARNING') as logs:
      self.assert_read_as_transformers(folder)
    self.assertIn('not tied', logs.output[0])
    self.assertFalse(model_config.read_model_config(folder).tied)

  @parameterized.parameters(*_EMBED)
  def test_both_stored_and_equal(self, name):
    def change(tensors, embed):
      tensors['lm_head.weight'] = tensors[embed]

    folder = self.written(name, change)
    with self.assertNoLogs('absl', 'WARNING'):
      self.assert_read_as_transformers(folder)
    self.assertTrue(model_config.read_model_config(folder).tied)

  @parameterized.parameters(*_EMBED)
  def test_only_the_head_is_stored(self, name):
    def change(tensors, embed):
      tensors['lm_head.weight'] = tensors.pop(embed)

    folder = self.written(name, change)
    self.assert_read_as_transformers(folder)
    self.assert_trees_equal(self.load(folder), testing.pair(name).params)

  def test_equal_in_other_precision(self):
    def change(tensors, embed):
      half = tensors[embed].astype(np.float16)
      tensors[embed] = half.astype(np.float32)
      tensors['lm_head.weight'] = half

    folder = self.written('llama_biased', change)
    self.assert_read_as_transformers(folder)

  @parameterized.product(scale=(1, 2), zipped=(True, False))
  def test_in_a_torch_file(self, scale, zipped):
    folder = self.saved('llama_biased')
    state = dict(testing.pair('llama_biased').torch.state_dict())
    state['lm_head.weight'] = state['lm_head.weight'] * scale
    (folder / _MODEL).unlink()
    torch.save(state, folder / _TORCH, _use_new_zipfile_serialization=zipped)
    self.assert_read_as_transformers(folder)
    self.assertEqual(model_config.read_model_config(folder).tied, scale == 1)

  def test_neither_is_stored(self):
    folder = self.written('llama_biased', lambda x, embed: x.pop(embed))
    self.assert_refused(lambda: self.load(folder), 'embed_tokens', 'missing')

  def test_another_shape(self):
    def change(tensors, embed):
      tensors['lm_head.weight'] = tensors[embed][:-1].copy()

    folder = self.written('llama_biased', change)
    self.assert_refused(lambda: self.load(folder), 'lm_head', '(96, 48)')

  def test_no_weights_yet(self):
    folder = self.saved('llama_biased')
    (folder / _MODEL).unlink()
    self.assertTrue(model_config.read_model_config(folder).tied)


class NamesTest(_TestCase):
  @parameterized.parameters(*_ONE_A_FAMILY)
  def test_the_bare_decoder(self, name):
    folder = self.saved(name)

    def bare(tensors):
      for key in list(tensors):
        tensors[key.removeprefix('model.')] = tensors.pop(key)

    self.edit_tensors(folder, bare)
    self.assert_trees_equal(self.load(folder), testing.pair(name).params)

  @parameterized.parameters(*_ONE_A_FAMILY)
  def test_one_model_too_many(self, name):
    folder = self.saved(name)

    def more(tensors):
      for key in list(tensors):
        tensors[f'model.{key}'] = tensors.pop(key)

    self.edit_tensors(folder, more)
    self.assert_read_as_transformers(folder)

  @parameterized.parameters(
    ('module.', 'DataParallel'),
    ('_orig_mod.', 'torch.compile'),
    ('base_model.model.', 'PEFT'),
  )
  def test_the_prefix_of_a_wrapper(self, prefix, word):
    """Refuses a model that transformers would initialise at random."""
    folder = self.saved('llama_one')

    def wrap(tensors):
      for key in list(tensors):
        tensors[prefix + key] = tensors.pop(key)

    self.edit_tensors(folder, wrap)
    self.assert_refused(lambda: self.load(folder), repr(prefix), word)

  @parameterized.parameters(
    ('qweight', 'quantised'), ('bitmask', 'compressed'),
    ('base_layer.weight', 'merge_and_unload'),
  )  # fmt: skip
  def test_a_weight_stored_in_parts(self, part, word):
    folder = self.saved('llama_one')
    stem = 'model.layers.0.mlp.up_proj.'

    def rename(tensors):
      tensors[stem + part] = tensors.pop(f'{stem}weight')

    self.edit_tensors(folder, rename)
    self.assert_refused(lambda: self.load(folder), f'{stem}weight', word)

  def test_fewer_layers_than_stored(self):
    folder = self.saved('llama_grouped')
    self.edit(folder / 'config.json', lambda x: x.update(num_hidden_layers=1))
    self.assert_read_as_transformers(folder)

  def test_what_nothing_asks_for(self):
    folder = self.saved('llama_biased')

    def more(tensors):
      key = 'model.layers.0.self_attn.rotary_emb.inv_freq'
      tensors[key] = np.full(4, np.nan)

    self.edit_tensors(folder, more)
    self.assert_trees_equal(
      self.load(folder), testing.pair('llama_biased').params
    )


class NumbersTest(_TestCase):
  _KEY = 'model.layers.0.mlp.down_proj.weight'

  def refused(self, dtype, change, *words):
    folder = self.saved('llama_one')
    self.edit_tensors(folder, change)
    self.assert_refused(
      lambda: self.load(folder, dtype), str(folder), self._KEY, *words
    )

  @parameterized.product(
    bad=(np.nan, np.inf, -np.inf),
    stored=(np.float32, np.float16, ml_dtypes.bfloat16),
    dtype=(np.float32, ml_dtypes.bfloat16),
  )
  def test_not_finite(self, bad, stored, dtype):
    def change(tensors):
      for key, value in tensors.items():
        tensors[key] = value.astype(stored)
      tensors[self._KEY][-1, 2] = bad

    self.refused(dtype, change, 'NaN')

  def test_more_than_the_dtype_holds(self):
    def change(tensors):
      tensors[self._KEY][3, 2] = np.finfo(np.float32).max

    self.refused(ml_dtypes.bfloat16, change, 'bfloat16')

  @parameterized.parameters(
    (np.int8, 'I8'),
    (np.int64, 'I64'),
    (np.uint8, 'U8'),
    (ml_dtypes.float8_e4m3fn, 'F8_E4M3'),
    (ml_dtypes.float8_e5m2, 'F8_E5M2'),
  )
  def test_no_float(self, dtype, name):
    def change(tensors):
      tensors[self._KEY] = tensors[self._KEY].astype(dtype)

    with mock.patch.object(np, 'memmap', side_effect=AssertionError):
      self.refused(np.float32, change, name, 'float64')

  @parameterized.parameters('', 'norm', 'down_proj')
  def test_double_precision(self, word):
    folder = self.saved('llama_one')
    source = np.random.default_rng(0)

    def change(tensors):
      for key, value in tensors.items():
        if word in key:
          noise = source.standard_normal(value.shape) * 1e-9
          tensors[key] = value.astype(np.float64) + noise

    self.edit_tensors(folder, change)
    self.assert_read_as_transformers(folder)
    config = model_config.read_model_config(folder)
    found = weights.check_files(folder, config, np.float32)
    self.assertEqual(weights.main_dtype(*found), np.float32)


class DuplicateTest(_TestCase):
  def test_a_tensor_in_two_shards(self):
    folder = self.saved('llama_one', max_shard_size='5KB')
    first, second, *_ = sorted(folder.glob('*.safetensors'))
    tensors = safetensors.numpy.load_file(first)
    key = min(tensors)
    tensors = safetensors.numpy.load_file(second) | {key: tensors[key]}
    safetensors.numpy.save_file(tensors, second)
    self.assert_refused(lambda: self.load(folder), str(folder), key)

  def test_a_name_twice_in_a_header(self):
    folder = self.saved('llama_one')
    content = (folder / _MODEL).read_bytes()
    size = int.from_bytes(content[:8], 'little')
    header = content[8 : 8 + size].rstrip()
    key = 'model.norm.weight'
    entry = json.dumps({key: json.loads(header)[key]}).encode()
    header = header[:-1] + b',' + entry[1:]
    header += b' ' * (-len(header) % 8)
    (folder / _MODEL).write_bytes(
      len(header).to_bytes(8, 'little') + header + content[8 + size :]
    )
    self.assert_refused(lambda: self.load(folder), _MODEL, key, 'twice')

  def test_a_name_twice_in_an_index(self):
    folder = self.saved('llama_one', max_shard_size='5KB')
    name = next(folder.glob('*.safetensors')).name
    (folder / _INDEX).write_text(
      f'{{"weight_map": {{"a": "{name}", "a": "{name}"}}}}'
    )
    self.assert_refused(lambda: self.load(folder), _INDEX, "'a'", 'twice')


class OutsideTest(_TestCase):
  def sharded(self, folder):
    testing.pair('llama_one').torch.save_pretrained(
      folder, max_shard_size='5KB'
    )
    return sorted(folder.glob('*.safetensors'))[0]

  def refused_as(self, name, folder, shard):
    def rename(index):
      for key, value in index['weight_map'].items():
        if value == shard.name:
          index['weight_map'][key] = name

    self.edit(folder / _INDEX, rename)
    self.assert_refused(lambda: self.load(folder), _INDEX, repr(name))

  @parameterized.parameters('../{}', '{outer}/{}', 'sub/../../{}', '..', '')
  def test_names_that_lead_outside(self, pattern):
    outer = self.folder()
    (outer / 'model' / 'sub').mkdir(parents=True)
    shard = self.sharded(outer / 'model')
    (outer / shard.name).write_bytes(shard.read_bytes())
    name = pattern.format(shard.name, outer=outer)
    self.refused_as(name, outer / 'model', shard)

  @parameterized.parameters('{other}/{name}', '{name}')
  def test_links_lead_where_they_will(self, target):
    folder, other = self.folder(), self.folder()
    first, *shards = sorted(self.sharded(folder).parent.glob('*.safetensors'))
    for shard in (first, *shards):
      target_name = target.format(other=other, name=f'far_{shard.name}')
      shard.rename(folder / target_name)
      shard.symlink_to(target_name)
    self.assert_read_as_transformers(folder)

  def test_a_dead_link(self):
    folder = self.folder()
    shard = self.sharded(folder)
    shard.unlink()
    shard.symlink_to('/no/such/file')
    self.assert_refused(
      lambda: self.load(folder), str(shard), 'missing', '/no/such/file'
    )

  def test_a_folder_within(self):
    folder = self.folder()
    shard = self.sharded(folder)
    (folder / 'sub').mkdir()
    shard.rename(folder / 'sub' / 'x.safetensors')

    def rename(index):
      for key, value in index['weight_map'].items():
        if value == shard.name:
          index['weight_map'][key] = 'sub/x.safetensors'

    self.edit(folder / _INDEX, rename)
    self.assert_read_as_transformers(folder)

  @parameterized.parameters(3, None, [['x']])
  def test_no_name(self, name):
    folder = self.folder()
    self.sharded(folder)
    index = json.dumps({'weight_map': {'a': name}})
    (folder / _INDEX).write_text(index)
    self.assert_refused(lambda: self.load(folder), _INDEX)

  def test_the_links_of_the_hub_cache(self):
    cache = self.folder()
    folder = cache / 'snapshots' / 'abc'
    folder.mkdir(parents=True)
    (cache / 'blobs').mkdir()
    self.sharded(folder)
    for i, path in enumerate(folder.iterdir()):
      path.rename(cache / 'blobs' / str(i))
      path.symlink_to(f'../../blobs/{i}')
    self.assert_trees_equal(self.load(folder), testing.pair('llama_one').params)


class ShardingTest(_TestCase):
  """Loads onto eight virtual devices."""

  def placed(self, folder, rule):
    """Loads with a sharding for each parameter, by path and shape."""
    mesh = jax.make_mesh((2, 4), ('a', 'b'))
    config = model_config.read_model_config(folder)
    shardings = jax.tree_util.tree_map_with_path(
      lambda path, x: jax.sharding.NamedSharding(
        mesh, rule(jax.tree_util.keystr(path), x.shape)
      ),
      families.param_shapes(config, np.float32),
    )
    params = weights.load_params(folder, config, np.float32, shardings)
    jax.tree.map(
      lambda x, sharding: self.assertEqual(x.sharding, sharding),
      params,
      shardings,
    )
    return params

  @parameterized.product(
    name=('llama_grouped', 'llama_biased', 'opt_post_norm_projected'),
    turn=(0, 1, 2),
    piece=(1 << 20, 64),
  )
  def test_equals_one_device(self, name, turn, piece):
    def rule(_, shape):
      # Puts mesh axes on the first axes that they divide, from varying starts.
      spec, free = [None] * len(shape), {'a': 2, 'b': 4}
      for i in range(len(shape)):
        axis = (i + turn) % len(shape)
        for mesh_axis, size in list(free.items()):
          if shape[axis] % size == 0:
            spec[axis] = mesh_axis
            del free[mesh_axis]
            break
      return P(*spec)

    with mock.patch.object(shards, '_PIECE', piece):
      params = self.placed(self.saved(name), rule)
    self.assert_trees_equal(params, testing.pair(name).params)
    widest = params['stack']['attention']['query']
    self.assertNotEqual(widest.addressable_shards[0].data.shape, widest.shape)

  @parameterized.parameters(
    ('query', P(None, None, 'a')),
    ('query', P(None, 'b')),
    ('query', P('a', 'b')),
    ('out', P(None, 'a')),
    ('out', P(None, 'a', None, None, 'b')),
  )
  def test_a_shard_reads_only_what_it_needs(self, leaf, spec):
    read, stored_name = [], {'query': 'q_proj', 'out': 'o_proj'}[leaf]

    def counting(where):
      def wrap(name, tensor):
        def count(index):
          if stored_name in name:
            read.append(np.prod([x.stop - x.start for x in index]))
          return tensor.read(index)

        return tensor._replace(read=count)

      return {name: wrap(name, tensor) for name, tensor in where.items()}

    open_all = directory.open_tensors
    folder = self.saved('llama_grouped')
    with mock.patch.object(
      directory, 'open_tensors', lambda *x: counting(open_all(*x))
    ):
      params = self.placed(
        folder, lambda path, _: spec if leaf in path else P()
      )
    self.assert_trees_equal(params, testing.pair('llama_grouped').params)
    self.assertEqual(sum(read), params['stack']['attention'][leaf].size)

  def test_on_cpu_nothing_is_copied(self):
    made = []
    aligned = shards._aligned

    def remember(*args):
      made.append(aligned(*args))
      return made[-1]

    with mock.patch.object(shards, '_aligned', remember):
      params = self.load(self.saved('llama_grouped'))
    ours = {x.ctypes.data for x in made}
    theirs = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    self.assertEqual(ours, theirs)


class LayoutTest(_TestCase):
  """Checks single numbers whose places were worked out by hand."""

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
    # Rows before position 0 are kept, so that the tables are the same.
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
    # The norms of a layer, whose names in OPT are easily confused.
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
