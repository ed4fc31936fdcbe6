import json
import pathlib
import tempfile
from unittest import mock

import gguf
import jax
import numpy as np
import torch
import transformers
from absl.testing import absltest, parameterized

from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.export import formats
from ffp_jax.models import families
from ffp_jax.models.decoder import Decoder
from tests import testing, tiny_run

_GROUPED = {
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 6,  # 32 is no multiple of 6 heads
}
_OPT = {'ffn_dim': 48, 'num_attention_heads': 4}
_CASES = tiny_run.every_family(_GROUPED, _OPT, window=3)
_GROUPS, _FFN = (3, 2, 1), (47, 33, 18)
# Of layers without attention, the first among them, and without FFN.
_FEWER = (0, 2, 0), (47, 0, 0)
_HEADER = 20_000  # bytes
_FOLDER = tempfile.TemporaryDirectory()  # gone at exit


def setUpModule():
  tiny_run.compile_quickly(True)
  transformers.logging.set_verbosity_error()


def tearDownModule():
  tiny_run.compile_quickly(False)


def _pruned(name, kept=(_GROUPS, _FFN)) -> pathlib.Path:
  """A pruned model directory whose layers all differ, made once."""
  folder = pathlib.Path(_FOLDER.name) / f'{name}_{kept}'
  if not folder.exists():
    tiny_run.write_model(folder / 'dense', **_CASES[name])
    testing.write_pruned(folder / 'dense', *kept)
  return folder / 'pruned'


def _tokens():
  return np.random.default_rng(0).integers(0, tiny_run.VOCAB, (2, 9))


def _ours(directory) -> np.ndarray:
  config = model_config.read_model_config(directory)
  params = weights.load_params(directory, config, np.float32)
  return np.asarray(
    jax.jit(Decoder(config).apply)({'params': params}, _tokens())
  )


def _theirs(model) -> np.ndarray:
  return testing.torch_logits(model, _tokens())


def _load(directory, **kwargs):
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, **kwargs
  ).eval()


class _TestCase(testing.CheckpointTestCase):
  def exported(self, model, format, dtype=None):
    out = self.folder() / 'out'
    formats.export(str(model), format, out, dtype=dtype, pre=None)
    return out

  def assert_close(self, got, want):
    self.assertGreater(want.std(), 0.3)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


class CompactTest(_TestCase):
  @parameterized.product(name=[*_CASES], kept=[(_GROUPS, _FFN), _FEWER])
  def test_logits(self, name, kept):
    source = _pruned(name, kept)
    out = self.exported(source, 'hf')
    want = _ours(source)
    loaded = _load(out, trust_remote_code=True)
    size = model_config.read_model_config(source).head_size
    self.assertEqual(
      [p.shape[0] for n, p in loaded.named_parameters() if 'k_proj.w' in n],
      [max(k, 1) * size for k in kept[0]],
    )
    self.assert_close(_theirs(loaded), want)
    self.assert_close(_ours(out), want)
    # What transformers saves of it, it loads again.
    again = self.folder() / 'again'
    loaded.save_pretrained(again)
    self.assert_close(_theirs(_load(again, trust_remote_code=True)), want)

  @parameterized.product(
    name=['llama', 'mistral', 'opt'], kept=[(_GROUPS, _FFN), _FEWER]
  )
  def test_generates_the_same_with_any_cache(self, name, kept):
    source = _pruned(name, kept)
    loaded = _load(self.exported(source, 'hf'), trust_remote_code=True)
    prompt = torch.tensor(_tokens()[:, :5])

    def generate(**kwargs):
      ids = loaded.generate(
        prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs
      )
      return ids.tolist()

    uncached = generate(use_cache=False)
    self.assertLen(uncached[0], 13)
    self.assertEqual(generate(use_cache=True), uncached)
    self.assertEqual(generate(cache_implementation='static'), uncached)

  def test_bare_model(self):
    out = self.exported(_pruned('llama'), 'hf')
    bare = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    self.assertEqual(
      [layer.mlp.down_proj.in_features for layer in bare.layers], list(_FFN)
    )

  def test_code_has_to_be_trusted(self):
    out = self.exported(_pruned('llama'), 'hf')
    with self.assertRaises((ValueError, RuntimeError)):
      _load(out, trust_remote_code=False)

  @parameterized.parameters(('float32', 4), ('bfloat16', 2))
  def test_size(self, dtype, size):
    source = _pruned('llama')
    out = self.exported(source, 'hf', dtype)
    data = families.param_count(model_config.read_model_config(source)) * size
    file = (out / 'model.safetensors').stat().st_size
    self.assertBetween(file - data, 0, _HEADER)
    description = json.loads((out / 'config.json').read_text())
    self.assertEqual(description['dtype'], dtype)

  def test_tokenizer_and_code_go_along(self):
    out = self.exported(_pruned('llama'), 'hf')
    self.assertEqual(
      {path.name for path in out.iterdir()},
      {
        'README.md',
        'config.json',
        'model.safetensors',
        'modeling_pruned.py',
        'tokenizer.json',
        'tokenizer_config.json',
      },
    )


class CardTest(_TestCase):
  def test_allocation_and_figures(self):
    folder = self.folder()
    source = _pruned('llama')
    (folder / 'pruned').symlink_to(source)
    count = families.param_count(model_config.read_model_config(source))
    results = {
      'dense': {'ppl': 12.345},
      'calibrated': {'ppl': 23.456},
      'params_pruned': count,
      'other': {
        'dense': {'ppl': 30.0},
        'calibrated': {'ppl': 45.0},
        'protocol': {'text': 'general', 'windows': 2, 'tokens': 1022},
      },
      'protocol': {
        'text': 'pydoc',
        'split': 'held-out',
        'context': 512,
        'windows': 3,
        'tokens': 1533,
      },
    }
    home = source.parent / 'results.json'
    self.addCleanup(home.unlink)
    home.write_text(json.dumps(results))
    card = (self.exported(source, 'hf') / 'README.md').read_text()
    for line in (
      '| 0 | 3 of 4 | 47 of 48 |',
      '| model | perplexity | x dense | general | x dense |',
      '|---|--:|--:|--:|--:|',
      '| dense | 12.35 | 1.00 | 30.00 | 1.00 |',
      '| searched + calibration | 23.46 | 1.90 | 45.00 | 1.50 |',
      'general: likewise, 2 windows, 1,022 tokens scored.',
      'trust_remote_code=True',
    ):
      self.assertIn(line, card)
    self.assertIn('1,533 tokens', card.replace('\n', ' '))
    del results['other']
    home.write_text(json.dumps(results))
    card = (self.exported(source, 'hf') / 'README.md').read_text()
    self.assertIn('| searched + calibration | 23.46 | 1.90 |\n', card)
    home.write_text(json.dumps(results | {'params_pruned': count + 1}))
    card = (self.exported(source, 'hf') / 'README.md').read_text()
    self.assertNotIn('12.35', card)


class DenseTest(_TestCase):
  @parameterized.product(name=[*_CASES], kept=[(_GROUPS, _FFN), _FEWER])
  def test_logits_and_shapes(self, name, kept):
    source = _pruned(name, kept)
    out = self.exported(source, 'hf_dense')
    want = _ours(source)
    dense = source.with_name('dense')
    self.assertEqual(
      model_config.read_model_config(out), model_config.read_model_config(dense)
    )
    file, of_dense = (
      (path / 'model.safetensors').stat().st_size for path in (out, dense)
    )
    self.assertEqual(file, of_dense)
    self.assert_close(_theirs(_load(out)), want)
    self.assert_close(_ours(out), want)
    self.assertIn('not smaller', (out / 'README.md').read_text())


class OrbaxTest(_TestCase):
  @parameterized.parameters(
    ('dense', _FEWER), ('pruned', (_GROUPS, _FFN)), ('pruned', _FEWER)
  )
  def test_and_back(self, folder, kept):
    source = _pruned('llama', kept).with_name(folder)
    out = self.exported(source, 'orbax')
    config = model_config.read_model_config(source)
    self.assertEqual(model_config.read_model_config(out), config)
    want = weights.load_params(source, config, np.float32)
    self.assert_trees_equal(weights.load_params(out, config, np.float32), want)

  def test_to_another_format(self):
    source = _pruned('llama')
    out = self.exported(self.exported(source, 'orbax'), 'hf')
    file = 'model.safetensors'
    self.assertEqual((out / file).read_bytes(), (source / file).read_bytes())

  def test_another_models_parameters(self):
    out = self.exported(_pruned('llama'), 'orbax')
    self.edit(out / 'config.json', lambda x: x.update(num_hidden_layers=2))
    self.edit(out / 'config.json', lambda x: x.pop('ffp_jax'))
    self.assert_refused(lambda: self.load(out), str(out))

  def test_damaged(self):
    out = self.exported(_pruned('llama'), 'orbax')
    for path in (out / 'params').rglob('*'):
      if path.is_file():
        path.write_bytes(path.read_bytes()[:10])
    self.assert_refused(lambda: self.load(out), str(out))


class TiedTest(_TestCase):
  """What is written says of the embedding what was read, not config.json."""

  def dense(self, name, *, other_head) -> pathlib.Path:
    """config.json says tied; the file has two tensors, or only the head."""
    folder = self.folder() / 'dense'
    tiny_run.write_model(folder, **_CASES[name])
    decoder = 'decoder.' if name.startswith('opt') else ''
    embed = f'model.{decoder}embed_tokens.weight'

    def change(tensors):
      head = tensors[embed] if other_head else tensors.pop(embed)
      tensors['lm_head.weight'] = head[::-1].copy() if other_head else head

    self.edit(folder / 'config.json', lambda x: x.pop('tie_word_embeddings'))
    if not name.startswith('opt'):  # whose default it is
      self.edit(
        folder / 'config.json', lambda x: x.update(tie_word_embeddings=True)
      )
    self.edit_tensors(folder, change)
    return folder

  @parameterized.product(
    name=('llama', 'qwen2', 'opt'),
    other_head=(True, False),
    format=('hf', 'hf_dense', 'orbax'),
  )
  def test_pruned(self, name, other_head, format):
    dense = self.dense(name, other_head=other_head)
    config = model_config.read_model_config(dense)
    self.assertEqual(config.tied, not other_head)
    pruned = testing.write_pruned(
      dense, (config.groups,) * 3, (config.ffn,) * 3
    )
    out = self.exported(pruned, format)
    want = _theirs(_load(dense))
    for folder in (pruned, out):
      description = json.loads((folder / 'config.json').read_text())
      self.assertEqual(description['tie_word_embeddings'], not other_head)
      self.assert_close(_ours(folder), want)
    if format != 'orbax':
      self.assert_close(_theirs(_load(out, trust_remote_code=True)), want)

  @parameterized.parameters(True, False)
  def test_gguf(self, other_head):
    dense = self.dense('llama', other_head=other_head)
    out = self.exported(dense, 'gguf')
    out = out.rename(out.with_suffix('.gguf'))
    names = {tensor.name for tensor in gguf.GGUFReader(out).tensors}
    self.assertEqual('output.weight' in names, other_head)
    home = mock.patch.object(pathlib.Path, 'home', return_value=self.folder())
    with home:
      again = hub.resolve_model(str(out))
    self.assertEqual(model_config.read_model_config(again).tied, not other_head)
    self.assert_close(_ours(again), _theirs(_load(dense)))

  @parameterized.parameters('float64', 'sparse')
  def test_what_the_model_no_longer_is(self, kind):
    """Weights of 64 bits become 32, and a sparse model's are not sparse."""
    folder = self.folder() / 'dense'
    tiny_run.write_model(folder)

    def widen(tensors):
      for key, value in tensors.items():
        tensors[key] = value.astype(np.float64)

    if kind == 'float64':
      self.edit_tensors(folder, widen)
    else:
      dense = {'format': 'dense'}
      sparse = dense | {'quant_method': 'x', 'sparsity_config': dense}
      self.edit(
        folder / 'config.json', lambda x: x.update(quantization_config=sparse)
      )
    out = self.exported(folder, 'orbax')
    description = json.loads((out / 'config.json').read_text())
    self.assertEqual(description['dtype'], 'float32')
    self.assertNotIn('quantization_config', description)
    self.assert_close(_ours(out), _ours(folder))


if __name__ == '__main__':
  absltest.main()
