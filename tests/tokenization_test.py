import base64
import functools
import json
import pathlib
import pydoc_data.topics
import shutil
import tempfile
from unittest import mock

import numpy as np
import sentencepiece
import tokenizers
import transformers
from absl.testing import absltest, parameterized

from ffp_jax.checkpoints import model_config
from ffp_jax.errors import RequestError
from ffp_jax.models import families, rope
from ffp_jax.text import tokenization, tokenizer_faults
from tests import testing, tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_TEXT = tiny_run.text(1)[:500] + ' 12 \N{SNOWMAN}\n\n  end'
_POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n'
_TOKENIZER = ('tokenizer.json', 'tokenizer_config.json')
_OPT = {
  'model_type': 'opt',
  'vocab_size': tiny_run.VOCAB,
  'hidden_size': 32,
  'ffn_dim': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'max_position_embeddings': 64,
}


@functools.cache
def _bytes() -> pathlib.Path:
  """Makes a directory with a byte-level tokenizer.json, but no weights."""
  path = pathlib.Path(_FOLDER.name) / 'bytes'
  path.mkdir()
  (path / 'config.json').write_text(json.dumps(tiny_run.HF_CONFIG))
  tiny_run.write_tokenizer(path)
  return path


@functools.cache
def _pieces() -> pathlib.Path:
  """Makes a SentencePiece model like that of LLaMA."""
  path = pathlib.Path(_FOLDER.name) / 'pieces'
  lines = pydoc_data.topics.topics['for'].splitlines()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(line for line in lines if line.strip()),
    model_prefix=str(path),
    vocab_size=400,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return path.with_suffix('.model')


class FolderTestCase(testing.CheckpointTestCase):
  def model(self, *, without=(), config=None, **contents) -> pathlib.Path:
    """Returns a changed copy of a model directory.

    Args:
      without: names of files to leave out.
      config: of config.json, or None to leave it.
      **contents: by name, its dot an underscore, what to write.
    """
    path = self.folder() / 'model'
    shutil.copytree(_bytes(), path)
    for name in without:
      (path / name).unlink()
    if config:
      (path / 'config.json').write_text(json.dumps(config))
    for name, content in contents.items():
      stem, _, suffix = name.rpartition('_')
      if not isinstance(content, bytes | str):
        content = json.dumps(content)
      if isinstance(content, str):
        content = content.encode()
      (path / f'{stem}.{suffix}').write_bytes(content)
    return path

  def edited(self, **changes) -> pathlib.Path:
    """Returns a copy with other top-level values in tokenizer.json."""
    path = self.model()
    self.edit(path / 'tokenizer.json', lambda x: x.update(changes))
    return path

  def ids(self, path) -> list[int]:
    return tokenization.tokenize(path, _TEXT).ids.tolist()


class EncodeTest(FolderTestCase):
  def setUp(self):
    super().setUp()
    self.plain = self.ids(_bytes())
    backend = tokenizers.Tokenizer.from_file(str(_bytes() / 'tokenizer.json'))
    self.assertEqual(self.plain, backend.encode(_TEXT).ids)

  @parameterized.parameters('Left', 'Right')
  def test_truncation_and_padding_of_training_are_not_ours(self, side):
    word = {'pad_id': 1, 'pad_type_id': 0, 'pad_token': '!'}
    path = self.edited(
      truncation={
        'direction': side,
        'max_length': 10,
        'strategy': 'LongestFirst',
        'stride': 0,
      },
      padding={
        'strategy': {'Fixed': 900},
        'direction': side,
        'pad_to_multiple_of': None,
      }
      | word,
    )
    self.assertEqual(self.ids(path), self.plain)

  def test_eos_behind_every_text(self):
    end = {'SpecialToken': {'id': '!', 'type_id': 0}}
    path = self.edited(
      post_processor={
        'type': 'TemplateProcessing',
        'single': [{'Sequence': {'id': 'A', 'type_id': 0}}, end],
        'pair': [],
        'special_tokens': {'!': {'id': '!', 'ids': [7], 'tokens': ['!']}},
      }
    )
    self.assertEqual(self.ids(path), [*self.plain, 7])

  def test_pad_beyond_the_embedding(self):
    path = self.model(
      tokenizer_config_json={
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'pad_token': '<pad>',
      }
    )
    tokenizer = tokenization.load_tokenizer(path)
    self.assertEqual(tokenizer.pad_token_id, tiny_run.VOCAB)
    tokens = tokenization.tokenize(path, _TEXT)
    self.assertEqual(tokens.ids.tolist(), self.plain)
    tokenization.check_tokens(
      model_config.read_model_config(path), tokens.ids, 16
    )

  def test_class_that_transformers_has_not(self):
    path = self.model(tokenizer_config_json={'tokenizer_class': 'LLaMATok'})
    self.assertEqual(self.ids(path), self.plain)

  def test_vocab_json_and_merges(self):
    model = json.loads((_bytes() / 'tokenizer.json').read_text())['model']
    merges = [x if isinstance(x, str) else ' '.join(x) for x in model['merges']]
    path = self.model(
      without=_TOKENIZER,
      config=_OPT,
      vocab_json=model['vocab'],
      merges_txt='#version: 0.2\n' + '\n'.join(merges) + '\n',
      tokenizer_config_json={
        'tokenizer_class': 'GPT2Tokenizer',
        'bos_token': '!',
        'eos_token': '!',
        'unk_token': '!',
        'add_bos_token': True,
      },
    )
    self.assertEqual(self.ids(path), [model['vocab']['!'], *self.plain])

  @parameterized.parameters('llama', 'mistral')
  def test_sentencepiece(self, family):
    path = self.model(
      without=_TOKENIZER,
      config=tiny_run.HF_CONFIG | {'model_type': family},
      tokenizer_model=_pieces().read_bytes(),
      tokenizer_config_json={
        'tokenizer_class': 'LlamaTokenizer',
        'bos_token': '<s>',
        'eos_token': '</s>',
        'unk_token': '<unk>',
        'add_bos_token': True,
      },
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(_pieces()))
    self.assertEqual(self.ids(path), [1, *theirs.encode(_TEXT)])
    self.assertEqual(tokenization.tokenize(path, _TEXT).bos, 1)

  def test_sentencepiece_alone_is_as_in_transformers(self):
    path = self.model(
      without=_TOKENIZER, tokenizer_model=_pieces().read_bytes()
    )
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    self.assertEqual(self.ids(path), theirs(_TEXT)['input_ids'])

  def test_word_without_a_token(self):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}))
    path = self.model(tokenizer_json=words.to_str())
    self.assert_refused(lambda: self.ids(path), 'cannot encode the text', 'UNK')


class LoadTest(FolderTestCase):
  def refused(self, path, *words):
    """Refuses with these words, and does not name what isn't the fault."""
    self.assert_refused(
      lambda: tokenization.load_tokenizer(path), f'{path}: ', *words
    )

  @parameterized.parameters(
    {'pre_tokenizer': {'type': 'SplitNewKind'}},
    {'normalizer': {'type': 'NewKind'}},
    {'model': {'type': 'NewKind', 'vocab': {}}},
    {'decoder': {'type': 'NewKind'}},
  )
  def test_tokenizer_json_of_a_newer_library(self, **changes):
    version = f'tokenizers {tokenizers.__version__}'
    self.refused(
      self.edited(**changes), 'tokenizer.json cannot', version, '--upgrade'
    )

  @parameterized.parameters(
    ('{"model": ', 'not valid JSON'),
    ('', 'empty'),
    ('[]', 'not a JSON object'),
    ('<html>', 'not valid JSON'),
    (b'{"a": "\xe9"}', 'not valid JSON'),
    ('\ufeff{}', 'byte-order mark'),
  )
  def test_damaged_json(self, content, word):
    for name in _TOKENIZER:
      path = self.model(**{name.replace('.', '_'): content})
      self.refused(path, f'{name} ', word)

  @parameterized.parameters(
    ('tokenizer.json', ()),
    ('tokenizer_config.json', ()),
    ('special_tokens_map.json', ()),
    ('tokenizer.model', _TOKENIZER),
    ('vocab.json', _TOKENIZER),
  )
  def test_pointer_of_git_lfs(self, name, without):
    path = self.model(without=without, **{name.replace('.', '_'): _POINTER})
    self.refused(path, name, 'Git LFS pointer', 'git lfs pull')

  @parameterized.parameters('llama', 'mistral', 'qwen2', 'opt')
  def test_no_vocabulary(self, family):
    config = _OPT if family == 'opt' else tiny_run.HF_CONFIG
    for without in _TOKENIZER, _TOKENIZER[:1]:
      path = self.model(without=without, config=config | {'model_type': family})
      self.refused(
        path, 'no tokenizer:', 'tokenizer.json', 'tokenizer.model', 'merges.txt'
      )

  def test_class_that_makes_up_a_vocabulary(self):
    for name in 'LlamaTokenizer', 'GPT2Tokenizer':
      path = self.model(
        without=_TOKENIZER, tokenizer_config_json={'tokenizer_class': name}
      )
      # Otherwise the case would prove nothing.
      theirs = transformers.AutoTokenizer.from_pretrained(path)
      self.assertLess(len(theirs), 10)
      self.refused(path, 'no tokenizer:', 'merges.txt')

  def test_dangling_link(self):
    path = self.model(without=_TOKENIZER)
    (path / 'tokenizer.json').symlink_to(path / 'gone')
    self.refused(path, 'no tokenizer:')

  @parameterized.parameters(
    ('vocab_json', '{"a": 0}', 'vocab.json without merges.txt'),
    ('merges_txt', '#version: 0.2\na b\n', 'merges.txt without vocab.json'),
  )
  def test_half_of_a_vocabulary(self, name, content, words):
    path = self.model(without=_TOKENIZER, config=_OPT, **{name: content})
    self.refused(path, words)

  def test_damaged_sentencepiece(self):
    for content in _pieces().read_bytes()[:1000], b'\xff' * 99:
      path = self.model(without=_TOKENIZER, tokenizer_model=content)
      self.refused(path, 'tokenizer.model is not a SentencePiece model')

  def test_sentencepiece_is_not_installed(self):
    path = self.model(without=_TOKENIZER, tokenizer_model=b'\xff' * 99)
    with mock.patch.object(
      tokenizer_faults.importlib.util, 'find_spec', return_value=None
    ):
      self.refused(path, 'tokenizer.model', 'pip install sentencepiece')

  def test_tiktoken(self):
    lines = (f'{base64.b64encode(bytes([i])).decode()} {i}' for i in range(256))
    path = self.model(without=_TOKENIZER, tokenizer_model='\n'.join(lines))
    missing = {'tiktoken': None, 'tiktoken.load': None}
    with mock.patch.dict('sys.modules', missing):
      self.refused(path, 'tokenizer.model', 'pip install tiktoken')

  @parameterized.parameters(
    {'auto_map': {'AutoTokenizer': ['tokenization_my.My', None]}},
    {'auto_map': {'AutoTokenizer': [None, 'tokenization_my.MyFast']}},
    {'auto_map': ['tokenization_my.My', None]},
    {'auto_map': {'AutoTokenizer': ['org/name--tokenization_my.My', None]}},
  )
  def test_code_of_its_own_is_not_run(self, auto_map):
    path = self.model(
      tokenizer_config_json={'tokenizer_class': 'My', 'auto_map': auto_map},
      tokenization_my_py='raise AssertionError',
    )
    with mock.patch('builtins.input', side_effect=AssertionError):
      self.refused(path, 'code of its own', "save('tokenizer.json')")

  @parameterized.parameters(
    {'bos_token': 5}, {'tokenizer_class': 5}, {'extra_special_tokens': 5}
  )
  def test_settings_of_the_wrong_kind(self, **settings):
    path = self.model(tokenizer_config_json=settings)
    self.refused(path, 'no usable tokenizer', 'tokenizer_config.json')


class EndsTest(FolderTestCase):
  """Compares with the generation settings of PyTorch transformers."""

  @parameterized.parameters(
    ({'eos_token_id': [5, 7]}, 3, {5, 7}),
    ({'eos_token_id': 5}, [3, 4], {5}),
    ({'eos_token_id': 0}, 3, {0}),
    ({'bos_token_id': 5}, 3, set()),
    ({'eos_token_id': None}, 3, set()),
    ('{"eos_', 3, {3}),
    ('\ufeff{"eos_token_id": 5}', 3, {3}),
    (None, [3, 0], {3, 0}),
    (None, 3, {3}),
    (None, None, set()),
  )
  def test_which_file_wins(self, generation, stated, expected):
    config = tiny_run.HF_CONFIG | {'eos_token_id': stated}
    path = self.model(config=config)
    theirs = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.from_pretrained(path)
    )
    theirs.save_pretrained(path)
    (path / 'generation_config.json').unlink()
    (path / 'config.json').write_text(json.dumps(config))
    if generation is not None:
      if not isinstance(generation, str):
        generation = json.dumps(generation)
      (path / 'generation_config.json').write_text(generation)
    theirs = type(theirs).from_pretrained(path).generation_config.eos_token_id
    theirs = theirs if isinstance(theirs, list) else [theirs]
    self.assertEqual(expected, {*theirs} - {None})
    tokenizer = tokenization.load_tokenizer(path)
    self.assertEqual(tokenization.end_ids(path, tokenizer), expected)
    tokenizer.eos_token_id = 9
    self.assertEqual(tokenization.end_ids(path, tokenizer), expected | {9})

  @parameterized.parameters(
    ('3',), (3.0,), (True,), ([[3]],), ([3, 'a'],), ({'a': 3},)
  )
  def test_no_ids(self, stated):
    path = self.model(generation_config_json={'eos_token_id': stated})
    tokenizer = tokenization.load_tokenizer(path)
    self.assert_refused(
      lambda: tokenization.end_ids(path, tokenizer),
      'eos_token_id',
      repr(stated),
    )


class CheckTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    tokenization.warn_once.cache_clear()

  def config(self, family='llama', **changes) -> families.ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      values = _OPT if family == 'opt' else tiny_run.HF_CONFIG
      (path / 'config.json').write_text(json.dumps(values | changes))
      return model_config.read_model_config(path)

  @parameterized.parameters(
    ({}, 64),
    ({'rope_scaling': {'type': 'linear', 'factor': 4.0}}, 256),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, 128),
    (
      {
        'rope_scaling': {
          'rope_type': 'yarn',
          'factor': 4.0,
          'original_max_position_embeddings': 64,
        }
      },
      256,
    ),
    (
      {
        'rope_scaling': {
          'rope_type': 'yarn',
          'factor': 4.0,
          'original_max_position_embeddings': 16,
        }
      },
      64,
    ),
    (
      {
        'rope_scaling': {
          'rope_type': 'llama3',
          'factor': 32.0,
          'low_freq_factor': 1.0,
          'high_freq_factor': 4.0,
          'original_max_position_embeddings': 8,
        }
      },
      64,
    ),
  )
  def test_beyond_rotary_positions(self, changes, most):
    config = self.config(**changes)
    with self.assertNoLogs('absl', 'WARNING'):
      tokenization.check_tokens(config, (), most)
    with self.assertLogs('absl', 'WARNING') as logs:
      for _ in range(3):  # as a comparison does, for each of its seeds
        tokenization.check_tokens(config, (), most + 1)
    self.assertLen(logs.records, 1)
    line = logs.records[0].getMessage()
    self.assertNotIn('\n', line)
    self.assertIn(f'text.context: {most + 1} is more than the {most} ', line)

  def test_beyond_learned_positions(self):
    config = self.config('opt')
    tokenization.check_tokens(config, (), 64)
    with self.assertRaisesRegex(RequestError, 'context: 65 .* 64 positions'):
      tokenization.check_tokens(config, (), 65)

  def test_ids_beyond_the_vocabulary(self):
    config = self.config()
    tokenization.check_tokens(config, np.array([0, config.vocab - 1]), 8)
    with self.assertRaisesRegex(RequestError, 'do not belong together'):
      tokenization.check_tokens(config, np.array([0, config.vocab]), 8)

  def test_plain_positions_reach_as_far_as_stated(self):
    self.assertEqual(rope.Scaling().max_context(64), 64)


if __name__ == '__main__':
  absltest.main()
