import functools
import json
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from ffp_jax import export
from ffp_jax.checkpoints import model_config, weights
from ffp_jax.export import slicing
from ffp_jax.models import families
from ffp_jax.models.decoder import Decoder, Masks
from ffp_jax.pruning import sublayers
from tests import testing, tiny_run

_OPT = {
  'model_type': 'opt',
  'ffn_dim': 44,
  'num_attention_heads': 4,
  'num_hidden_layers': 2,
}
_CASES = {
  'llama_grouped': {'num_attention_heads': 6, 'head_dim': 8},
  'mistral': {
    'model_type': 'mistral',
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'sliding_window': 3,
    'tie_word_embeddings': False,
  },
  'opt_pre_norm': _OPT,
  'opt_post_norm': _OPT
  | {'do_layer_norm_before': False, 'word_embed_proj_dim': 12},
}
_HEADER = 20_000  # bytes; what a safetensors file of few tensors may add


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _masks(config, seed=0):
  """Random masks; the layers keep different numbers, the last one unit."""
  source = np.random.default_rng(seed)
  L = config.layers

  def half(units):
    kept = [units - 1 - i for i in range(L - 1)] + [1]
    mask = np.arange(units) < np.maximum(kept, 1)[:, None]
    return source.permuted(mask, axis=1).astype(np.float32)

  return Masks(half(config.groups), half(config.ffn))


def _tokens():
  return np.random.default_rng(0).integers(0, tiny_run.VOCAB, (2, 9), np.int32)


_DENSE = tempfile.TemporaryDirectory()  # gone at exit


@functools.cache
def _source(name):
  """(dense directory, its config, its parameters)."""
  folder = pathlib.Path(_DENSE.name) / name
  tiny_run.write_model(folder, **_CASES[name])
  config = model_config.read_model_config(folder)
  params = weights.load_params(folder, config, np.float32)
  # NumPy's slices need no compiling.
  return folder, config, jax.tree.map(np.asarray, params)


def _folder(test):
  return pathlib.Path(test.enterContext(tempfile.TemporaryDirectory()))


@functools.cache
def _sliced(name):
  _, config, params = _source(name)
  return export.slice_params(params, config, _masks(config))


@functools.cache
def _apply(config):
  return jax.jit(lambda p, t, m: Decoder(config).apply({'params': p}, t, m))


def _logits(config, params, masks=None):
  return np.asarray(_apply(config)(params, _tokens(), masks))


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


class SliceTest(parameterized.TestCase):
  @parameterized.product(name=[*_CASES], whole=[False, True])
  def test_masked_is_sliced_is_reloaded(self, name, whole):
    source, config, params = _source(name)
    keep = _masks(config)
    keep = testing.without_sublayers(keep) if whole else keep
    small, small_config = export.slice_params(params, config, keep)
    masked = _logits(config, params, keep)
    sliced = _logits(small_config, small)
    self.assertTrue(np.isfinite(masked).all())
    largest = np.abs(masked).max()
    self.assertLess(np.abs(masked - sliced).max() / largest, 1e-5)
    dense = _logits(config, params, jax.tree.map(np.ones_like, keep))
    self.assertGreater(np.abs(masked - dense).max() / largest, 1e-2)

    out = _folder(self) / 'out'
    export.save(small, small_config, source, out)
    read_config = model_config.read_model_config(out)
    self.assertEqual(read_config, small_config)
    read = weights.load_params(out, read_config, np.float32)
    np.testing.assert_array_equal(_logits(read_config, read), sliced)

  @parameterized.parameters(*_CASES)
  def test_widths_are_those_of_the_masks(self, name):
    _, config, _ = _source(name)
    small, small_config = _sliced(name)
    keep = _masks(config)
    self.assertTrue(small_config.sliced)
    self.assertNotIn('stack', small)
    for i in range(config.layers):
      groups, channels = (int(mask[i].sum()) for mask in keep)
      self.assertEqual(small_config.widths(i), (groups, channels))
      layer = small[f'layer_{i}']
      self.assertLen(layer['attention']['out'], groups)
      self.assertLen(layer['ffn']['down'], channels)
    self.assertLess(min(small_config.kept_ffn), max(small_config.kept_ffn))

  @parameterized.parameters(*_CASES)
  def test_kept_values_are_untouched(self, name):
    _, config, params = _source(name)
    small, _ = _sliced(name)
    keep = _masks(config)
    i = config.layers - 1
    (group,) = np.flatnonzero(keep.attention[i])
    (channel,) = np.flatnonzero(keep.ffn[i])
    stack = params['stack']
    layer = small[f'layer_{i}']
    for leaf, axis in (('query', 1), ('key', 1), ('value', 1), ('out', 0)):
      np.testing.assert_array_equal(
        layer['attention'][leaf],
        np.asarray(stack['attention'][leaf][i]).take([group], axis),
      )
    for leaf, x in stack['ffn'].items():
      x = np.asarray(x[i])
      if leaf != 'down_bias':
        x = x.take([channel], 1 if leaf in ('up', 'gate') else 0)
      np.testing.assert_array_equal(layer['ffn'][leaf], x)

  def test_all_ones_only_unstack(self):
    _, config, params = _source('llama_grouped')
    ones = jax.tree.map(np.ones_like, _masks(config))
    small, small_config = export.slice_params(params, config, ones)
    self.assertEqual(_size(small), _size(params))
    self.assertEqual(small_config.kept_ffn, (config.ffn,) * config.layers)


class SizeTest(parameterized.TestCase):
  @parameterized.parameters(*_CASES)
  def test_parameter_counts(self, name):
    _, config, params = _source(name)
    small, small_config = _sliced(name)
    self.assertEqual(families.param_count(config), _size(params))
    self.assertEqual(families.param_count(small_config), _size(small))
    table = sublayers.find_sublayers(
      config, round_heads=1, round_ffn=1, floor=1
    )
    counts = [*small_config.kept_groups, *small_config.kept_ffn]
    removed = table.total - table.kept_cost(counts)
    self.assertGreater(removed, 0)
    self.assertEqual(_size(params) - _size(small), removed)

  @parameterized.product(
    name=('llama_grouped', 'opt_pre_norm'), dtype=('float32', 'bfloat16')
  )
  def test_file_holds_nothing_but_the_kept_parameters(self, name, dtype):
    source, _, _ = _source(name)
    small, small_config = _sliced(name)
    dtype = jnp.dtype(dtype)
    small = jax.tree.map(lambda x: np.asarray(x).astype(dtype), small)
    out = _folder(self) / 'out'
    size = export.save(small, small_config, source, out)
    file = out / 'model.safetensors'
    self.assertEqual(size, file.stat().st_size)
    data = _size(small) * dtype.itemsize
    self.assertBetween(size - data, 0, _HEADER)
    dense = (source / 'model.safetensors').stat().st_size
    self.assertLess(size, 0.9 * dense)
    stored = safetensors.numpy.load_file(file)
    self.assertEqual({x.dtype for x in stored.values()}, {dtype})
    with safetensors.safe_open(file, 'np') as opened:
      # transformers asks for it.
      self.assertEqual(opened.metadata(), {'format': 'pt'})


class SaveTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.source, _, _ = _source('llama_grouped')
    self.small = _sliced('llama_grouped')
    self.folder = _folder(self)
    self.out = self.folder / 'pruned'

  def _save(self):
    return export.save(*self.small, self.source, self.out)

  def _failing(self, module, name, *, after):
    """Makes `module.name` fail, before or after it has done its work."""
    real = getattr(module, name)

    def fail(*args, **kwargs):
      if after:
        real(*args, **kwargs)
      raise OSError('disk full')

    return mock.patch.object(module, name, fail)

  def test_config_and_tokenizer(self):
    self._save()
    names = {path.name for path in self.out.iterdir()}
    self.assertEqual(
      names,
      {
        'config.json',
        'model.safetensors',
        'tokenizer.json',
        'tokenizer_config.json',
      },
    )
    description = json.loads((self.out / 'config.json').read_text())
    kept = description.pop('ffp_jax')
    dense = json.loads((self.source / 'config.json').read_text())
    self.assertEqual(description, dense)
    self.assertEqual(
      kept,
      {
        'kept_groups': list(self.small[1].kept_groups),
        'kept_ffn': list(self.small[1].kept_ffn),
      },
    )
    self.assertEqual(
      (self.out / 'tokenizer.json').read_text(),
      (self.source / 'tokenizer.json').read_text(),
    )

  def test_no_half_written_directory(self):
    for module, name, after in (
      (weights, 'save_params', False),
      (weights, 'save_params', True),
      (slicing.shutil, 'copy', True),
    ):
      with self.subTest(f'{name}, {after}'):
        with self._failing(module, name, after=after):
          with self.assertRaisesRegex(OSError, 'disk full'):
            self._save()
        self.assertEmpty(list(self.folder.iterdir()))

  def test_a_failure_leaves_the_old_one(self):
    self._save()
    before = (self.out / 'model.safetensors').read_bytes()
    with self._failing(slicing.shutil, 'copy', after=True):
      with self.assertRaisesRegex(OSError, 'disk full'):
        self._save()
    self.assertEqual(list(self.folder.iterdir()), [self.out])
    self.assertEqual((self.out / 'model.safetensors').read_bytes(), before)

  def test_replaces_what_was_there(self):
    self.out.mkdir()
    (self.out / 'stale.safetensors').write_text('old')
    self._save()
    self.assertFalse((self.out / 'stale.safetensors').exists())
    self.assertTrue((self.out / 'model.safetensors').exists())
    self.assertEqual(list(self.folder.iterdir()), [self.out])


if __name__ == '__main__':
  absltest.main()
