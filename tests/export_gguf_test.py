import itertools
import json
import pathlib
import random
import shutil
import urllib.request

import gguf
import jax
import numpy as np
import sentencepiece
import tokenizers
import transformers
import xllamacpp
from absl import logging
from absl.testing import absltest, parameterized

from ffp_jax import export, prune
from ffp_jax.checkpoints import (
  gguf_cuts,
  gguf_model,
  gguf_tokenizer,
  hub,
  model_config,
  weights,
)
from ffp_jax.checkpoints import model as model_lib
from ffp_jax.export import formats, gguf_file, gguf_vocabulary, slicing
from ffp_jax.models import families
from ffp_jax.models.decoder import Decoder
from ffp_jax.text import tokenization
from tests import testing, tiny_run

# Four groups of two heads, so that every layer can keep another number.
_GROUPED = {
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 8,
  'hidden_size': 64,
}
_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 500000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


def _yarn(**numbers):
  return {
    'max_position_embeddings': 64,
    'rope_parameters': {
      'rope_type': 'yarn',
      'rope_theta': 100.0,
      'factor': 4.0,
      'original_max_position_embeddings': 16,
      **numbers,
    },
  }


_CASES = {
  'grouped': {},
  'untied': {'tie_word_embeddings': False, 'rms_norm_eps': 1e-3},
  'biased': {'attention_bias': True, 'mlp_bias': True},
  'mistral': {'model_type': 'mistral', 'sliding_window': 40},
  # transformers adds a token to every tokenizer of a Qwen2.
  'qwen2': {'model_type': 'qwen2', 'vocab_size': tiny_run.VOCAB + 4},
  'linear': {
    'rope_parameters': {
      'rope_type': 'linear',
      'rope_theta': 500.0,
      'factor': 4.0,
    }
  },
  'llama3': {'rope_parameters': _LLAMA3, 'max_position_embeddings': 65536},
  'yarn': _yarn(),
  'yarn_amplified': _yarn(attention_factor=1.7),
}
_PROMPTS = ([5], [1, 2, 3], [*range(40, 70)], [299, 7, 7, 7, 8, 150, 9])


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


class _LlamaCpp:
  """A model as llama.cpp runs it, with caches in float32."""

  def __init__(self, path: pathlib.Path):
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = 64
    settings.n_parallel = 1
    settings.warmup = False
    # More would wait for each other where the cores are busy.
    settings.cpuparams.n_threads = 1
    settings.cpuparams_batch.n_threads = 1
    settings.verbosity = -1
    settings.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.flash_attn_type = off
    fields = gguf.GGUFReader(path).fields
    self._vocab = len(fields['tokenizer.ggml.tokens'].data)
    self._server = xllamacpp.Server(settings)

  def log_probs(self, prompt) -> np.ndarray:
    """Of every token to follow."""
    answer = self._server.handle_completions(
      {
        'prompt': list(prompt),
        'n_predict': 1,
        'temperature': 0.0,
        'n_probs': self._vocab,
        'cache_prompt': False,
        # What is chosen must be whole UTF-8, or nothing is said of it.
        'logit_bias': [[0, 1000.0]],
      }
    )
    (first,) = answer['choices'][0]['logprobs']['content']
    out = np.full(self._vocab, np.nan)
    for token in first['top_logprobs']:
      out[token['id']] = token['logprob']
    return out

  def post(self, endpoint: str, **question) -> dict:
    request = urllib.request.Request(
      f'{self._server.listening_address}/{endpoint}',
      json.dumps(question).encode(),
      {'Content-Type': 'application/json'},
    )
    with urllib.request.urlopen(request) as answer:
      return json.load(answer)

  def tokens(self, text: str) -> list[int]:
    return self.post('tokenize', content=text, add_special=True)['tokens']


def _log_probs(directory: pathlib.Path) -> np.ndarray:
  """Ours, of what follows each of _PROMPTS."""
  config = model_config.read_model_config(directory)
  params = weights.load_params(directory, config, np.float32)
  # Of one length, to compile once: what comes later changes nothing.
  longest = max(map(len, _PROMPTS))
  tokens = np.array([x + [0] * (longest - len(x)) for x in _PROMPTS])
  logits = jax.jit(Decoder(config).apply)({'params': params}, tokens)
  last = [len(prompt) - 1 for prompt in _PROMPTS]
  return np.asarray(
    jax.nn.log_softmax(logits[np.arange(len(_PROMPTS)), np.array(last)])
  )


class _TestCase(testing.CheckpointTestCase):
  def setUp(self):
    super().setUp()
    home = self.folder()
    self.enterContext(
      absltest.mock.patch.object(pathlib.Path, 'home', return_value=home)
    )

  def pruned(
    self, *, groups=(3, 2, 1), ffn=(47, 33, 18), **changes
  ) -> pathlib.Path:
    """A pruned model directory; by default no two layers are alike."""
    folder = self.folder()
    tiny_run.write_model(folder / 'dense', **_GROUPED | changes)
    return testing.write_pruned(folder / 'dense', groups, ffn)

  def exported(self, model: pathlib.Path, dtype=None, pre=None):
    path = self.folder() / 'model.gguf'
    self.notes = formats.export(str(model), 'gguf', path, dtype=dtype, pre=pre)
    return path

  def theirs(self, path) -> np.ndarray:
    runtime = _LlamaCpp(path)
    return np.stack([runtime.log_probs(prompt) for prompt in _PROMPTS])


class RuntimeTest(_TestCase):
  """What llama.cpp computes is what the JAX model computes."""

  @parameterized.parameters(*_CASES)
  def test_pruned(self, name):
    model = self.pruned(**_CASES[name])
    path = self.exported(model)
    reader = gguf.GGUFReader(path)
    self.assertEqual(gguf_model.field(reader, 'general.architecture'), 'deci')
    heads = gguf_model.field(reader, 'deci.attention.head_count')
    self.assertEqual(heads, [6, 4, 2])
    ours = _log_probs(model)
    self.assertGreater(ours.std(), 0.3)  # nothing like uniform
    np.testing.assert_allclose(self.theirs(path), ours, atol=2e-4)
    np.testing.assert_allclose(
      _log_probs(hub.resolve_model(str(path))), ours, atol=5e-5
    )

  @parameterized.product(
    name=['grouped', 'biased', 'qwen2', 'llama3'],
    groups=[(2, 0, 1), (0, 2, 0)],
    ffn=[(47, 33, 18), (47, 0, 0), (0, 0, 18)],
  )
  def test_layers_without_a_sublayer(self, name, groups, ffn):
    model = self.pruned(groups=groups, ffn=ffn, **_CASES[name])
    path = self.exported(model)
    without_ffn, first = 0 in ffn, not groups[0]
    self.assertEqual(
      any('one of zeros' in note for note in self.notes),
      without_ffn or first or name == 'biased',
    )
    ours = _log_probs(model)
    np.testing.assert_allclose(self.theirs(path), ours, atol=2e-4)
    np.testing.assert_allclose(
      _log_probs(hub.resolve_model(str(path))), ours, atol=5e-5
    )

  @parameterized.product(pruned=(True, False), family=('llama', 'qwen3'))
  def test_layers_that_are_alike(self, pruned, family):
    changes = {'model_type': family}
    model = self.pruned(groups=(3,) * 3, ffn=(32,) * 3, **changes)
    model = model if pruned else model.with_name('dense')
    path = self.exported(model)
    reader = gguf.GGUFReader(path)
    self.assertEqual(gguf_model.field(reader, 'general.architecture'), family)
    ours = _log_probs(model)
    np.testing.assert_allclose(self.theirs(path), ours, atol=2e-4)
    again = hub.resolve_model(str(path))
    self.assertFalse(model_config.read_model_config(again).sliced)
    np.testing.assert_allclose(_log_probs(again), ours, atol=5e-5)

  @parameterized.parameters(
    ('float16', 0.01),
    ('bfloat16', 0.08),
    ('q8_0', 0.15),
    ('q5_1', 0.6),
    ('q4_0', 1.2),
  )
  def test_smaller_types(self, dtype, bound):
    model = self.pruned(ffn=(47, 32, 18))
    path = self.exported(model, dtype)
    ours, theirs = _log_probs(model), self.theirs(path)
    again = _log_probs(hub.resolve_model(str(path)))
    self.assertBetween(np.abs(theirs - ours).mean(), 1e-5, bound)
    # llama.cpp rounds what enters a matrix too.
    self.assertLess(np.abs(theirs - again).mean(), min(bound, 0.15))

  @parameterized.parameters('biased', 'dense')
  def test_channels_of_zeros_change_nothing(self, name):
    model = self.pruned(**_CASES['biased' if name == 'biased' else 'grouped'])
    model = model if name == 'biased' else model.with_name('dense')
    again = hub.resolve_model(str(self.exported(model, 'q8_0')))
    config = model_config.read_model_config(again)
    wider = config.kept_ffn or (config.ffn,)
    self.assertTrue(all(channels % 32 == 0 for channels in wider))
    difference = np.abs(_log_probs(again) - _log_probs(model)).mean()
    self.assertBetween(difference, 1e-4, 0.15)

  def test_sliding_window_is_the_longest_context(self):
    model = self.pruned(**_CASES['mistral'])
    path = self.exported(model)
    reader = gguf.GGUFReader(path)
    self.assertEqual(gguf_model.field(reader, 'deci.context_length'), 40)
    self.assertIn('sliding window', self.notes[0])


class SizeTest(_TestCase):
  @parameterized.parameters(('float32', 4), ('float16', 2), ('bfloat16', 2))
  def test_parameters_times_dtype(self, dtype, size):
    model = self.pruned()
    config = model_config.read_model_config(model)
    path = self.exported(model, dtype)
    reader = gguf.GGUFReader(path)
    data = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    vectors = (2 * config.layers + 1) * config.width  # norms, in float32
    wanted = families.param_count(config) * size + vectors * (4 - size)
    self.assertEqual(data, wanted)
    self.assertBetween(path.stat().st_size - data, 0, 25_000)  # the tokenizer

  @parameterized.parameters('q8_0', 'q5_1', 'q5_0', 'q4_1', 'q4_0')
  def test_quantised_where_rows_allow_it(self, dtype):
    model = self.pruned(ffn=(47, 32, 18))
    reader = gguf.GGUFReader(self.exported(model, dtype))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    quantised = dtype.upper()
    for i in range(3):
      self.assertEqual(kinds[f'blk.{i}.ffn_down.weight'], quantised)
    self.assertEqual(kinds['blk.1.attn_output.weight'], quantised)
    self.assertEqual(kinds['blk.2.attn_output.weight'], 'F16')  # 16 a row
    self.assertEqual(kinds['blk.0.attn_norm.weight'], 'F32')
    self.assertEqual(kinds['token_embd.weight'], 'Q8_0')
    self.assertIn('2 tensors are F16', self.notes[-1])

  def test_head_of_its_own_is_finer_than_the_embedding(self):
    model = self.pruned(tie_word_embeddings=False)
    reader = gguf.GGUFReader(self.exported(model, 'q4_0'))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    self.assertEqual(kinds['token_embd.weight'], 'Q4_0')
    self.assertEqual(kinds['output.weight'], 'Q8_0')

  def test_channels_of_zeros_fill_blocks(self):
    model = self.pruned(ffn=(47, 32, 18))
    path = self.exported(model, 'q8_0')
    reader = gguf.GGUFReader(path)
    channels = gguf_model.field(reader, 'deci.feed_forward_length')
    self.assertEqual(channels, [64, 32, 32])
    self.assertIn('multiple of 32', self.notes[-2])
    again = hub.resolve_model(str(path))
    config = model_config.read_model_config(again)
    self.assertEqual(config.kept_ffn, (64, 32, 32))
    layer = weights.load_params(again, config, np.float32)['layer_0']
    np.testing.assert_array_equal(layer['ffn']['up'][:, 47:], 0)
    np.testing.assert_array_equal(layer['ffn']['down'][47:], 0)
    self.assertGreater(np.abs(layer['ffn']['up'][:, :47]).min(axis=0).max(), 0)

  def test_channels_are_as_they_are_where_they_fill_blocks(self):
    self.exported(self.pruned(ffn=(32, 32, 32)), 'q8_0')
    self.assertNotIn('zeros', ''.join(self.notes))
    self.exported(self.pruned(), 'float16')
    self.assertEqual(self.notes, [])


_TEXTS = (
  'The with statement is used to wrap the execution of a block.',
  "it's  3.14 + 1234,\n\n  x_1 = 'a'\t# no",
  ' Käse, 日本語 and 🙂 … done ',
)


_SPACED = ('the thing', '  the\n', *(' ' * n + 'in' for n in range(3, 30)))
# What pre-tokenizers cut apart, or don't.
_MIXED = [' ', ' ', '\n', '\t', 'a', 'B', "'s", "'LL", '1', '12', '.', '!', '_']
_MIXED += [
  '+',
  '=',
  'é',
  'e\u0301',
  '日本',
  '한',
  '½',
  '٣',
  '€',
  '\u212a',
  'ß',
  '。',
]


class TokenizerTest(_TestCase):
  def check(self, model):
    runtime = _LlamaCpp(self.exported(model))
    for text in _TEXTS:
      ids = tokenization.tokenize(model, text).ids.tolist()
      self.assertEqual(runtime.tokens(text), ids, text)

  def edit_tokenizer(self, model, change):
    self.edit(model / 'tokenizer.json', change)

  @parameterized.parameters(
    ('gpt-2', False),
    ('smollm', False),
    ('llama-bpe', True),
    ('smaug-bpe', False),
    ('tekken', True),
    ('qwen2', False),
    ('qwen35', False),
    ('deepseek-llm', False),
    ('deepseek-coder', False),
  )
  def test_byte_level(self, pre, whole):
    made = self._pairs()
    made.pre_tokenizer = gguf_cuts.sequence(gguf_cuts.NAMES[pre])
    content = json.loads(made.to_str())
    content['model']['ignore_merges'] = whole
    content['added_tokens'] = []
    model = self.pruned(vocab_size=len(content['model']['vocab']))
    (model / 'tokenizer.json').write_text(json.dumps(content))
    path = self.exported(model)
    reader = gguf.GGUFReader(path)
    self.assertEqual(gguf_model.field(reader, 'tokenizer.ggml.pre'), pre)
    runtime, again = _LlamaCpp(path), hub.resolve_model(str(path))
    source = random.Random(0)
    texts = [''.join(source.choices(_MIXED, k=12)) for _ in range(60)]
    for text in (*_TEXTS, *texts):
      ids = tokenization.tokenize(again, text).ids.tolist()
      self.assertEqual(runtime.tokens(text), ids, text)
      ids = tokenization.tokenize(model, text).ids.tolist()
      self.assertEqual(runtime.tokens(text), ids, text)

  def _pairs(self):
    """Bytes and most pairs of them: no cut goes unseen."""
    spell = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    tokens = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    text = ''.join(_MIXED).replace('12', '')  # digits are joined in no merge
    ((letters, _),) = spell.pre_tokenize_str(text)
    letters = sorted(set(letters))
    pairs = [
      (x, y)
      for x, y in itertools.product(letters, letters)
      if not (x + y).isdigit()
    ]
    vocab = {x: i for i, x in enumerate([*tokens, *map(''.join, pairs)])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    made.decoder = tokenizers.decoders.ByteLevel()
    return made

  @parameterized.parameters(('tekken', True), ('deepseek-llm', False))
  def test_cut_of_the_original(self, pre, whole):
    made = self._pairs()
    made.pre_tokenizer = gguf_cuts.sequence(gguf_cuts._ALSO[pre])
    made.normalizer = tokenizers.normalizers.Sequence([])
    model = self.pruned(vocab_size=made.get_vocab_size())
    made.save(str(model / 'tokenizer.json'))
    self.edit_tokenizer(model, lambda x: x['model'].update(ignore_merges=whole))
    reader = gguf.GGUFReader(self.exported(model))
    self.assertEqual(gguf_model.field(reader, 'tokenizer.ggml.pre'), pre)
    self.check(model)

  def test_sentencepiece(self):
    model = self.pruned()
    self._write_sentencepiece(model)
    reader = gguf.GGUFReader(self.exported(model))
    self.assertEqual(gguf_model.field(reader, 'tokenizer.ggml.model'), 'llama')
    self.check(model)

  def _write_sentencepiece(self, model, extra=()):
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
    tokens += ['▁', *'aehinst', 'th', 'in', '▁th', 'the', '▁the', 'is', '▁a']
    merges = [('t', 'h'), ('i', 'n'), ('▁', 'th'), ('▁t', 'h')][:3]
    merges += [('th', 'e'), ('▁th', 'e'), ('▁', 'the')]
    merges += [('i', 's'), ('▁', 'a'), *extra]
    made = tokenizers.Tokenizer(
      tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token='<unk>',
        fuse_unk=True,
        byte_fallback=True,
      )
    )
    made.normalizer = tokenizers.normalizers.Sequence(
      [
        tokenizers.normalizers.Prepend('▁'),
        tokenizers.normalizers.Replace(' ', '▁'),
      ]
    )
    made.add_special_tokens(tokens[:3])
    made.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 1)]
    )
    made.save(str(model / 'tokenizer.json'))
    (model / 'tokenizer_config.json').write_text(
      json.dumps(
        {
          'tokenizer_class': 'PreTrainedTokenizerFast',
          'bos_token': '<s>',
          'eos_token': '</s>',
          'unk_token': '<unk>',
        }
      )
    )

  def test_merges_unlike_sentencepiece(self):
    model = self.pruned()
    self._write_sentencepiece(model)
    self.edit_tokenizer(model, lambda x: x['model']['merges'].pop())
    self.assert_refused(lambda: self.exported(model), 'SentencePiece')

  def test_scores_that_are_shared(self):
    source = self._gguf_of_shared_scores()
    dense = hub.resolve_model(str(source))
    config = model_config.read_model_config(dense)
    params = weights.load_params(dense, config, np.float32)
    small = export.slice_params(
      params, config, testing.masks_of(config, (3, 2, 1), (9, 8, 7))
    )
    model = self.folder() / 'pruned'
    export.save(*small, dense, model)
    theirs = _LlamaCpp(source)
    want = {text: theirs.tokens(text) for text in _SPACED}
    source.unlink()  # the pruned model needs nothing else
    for scores in (True, False):
      path = self.exported(model)
      again = _LlamaCpp(path)
      for text, ids in want.items():
        self.assertEqual(tokenization.tokenize(model, text).ids.tolist(), ids)
        self.assertEqual(again.tokens(text), ids, text)
      if scores:  # and without them, from the merges alone
        found = gguf_model.field(gguf.GGUFReader(path), 'tokenizer.ggml.scores')
        self.assertEqual(found, self._shared_scores()[1])
        (model / gguf_tokenizer.SCORES).unlink()

  def _shared_scores(self):
    """As LLaMA 2: runs of spaces, all of one score, after words."""
    words = ['th', 'he', 'the', '▁the', '▁t', '▁th', 'in', '▁in', 'ing']
    runs = ['▁' * n for n in (2, 4, 8, 5, 6, 3, 7)]
    specials = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
    tokens = [*specials, *runs, *words, *'▁theings']
    scores = [0.0] * 259 + [-1e9] * len(runs)
    scores += [-float(i) for i in range(len(words) + 8)]
    return tokens, scores

  def _gguf_of_shared_scores(self) -> pathlib.Path:
    """A dense model with such a vocabulary, as its converter writes it."""
    tokens, scores = self._shared_scores()
    folder = self.folder() / 'hf'
    tiny_run.write_model(folder, **_GROUPED | {'vocab_size': len(tokens)})
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2
    types += [gguf.TokenType.BYTE] * 256
    types += [gguf.TokenType.NORMAL] * (len(tokens) - 259)
    vocabulary = gguf_vocabulary.Vocabulary(
      kind='llama',
      pre='default',
      tokens=tokens,
      types=types,
      merges=None,
      scores=scores,
      prefix=True,
      roles={'bos': 1, 'eos': 2, 'unk': 0},
      adds={'bos': True, 'eos': False},
      template=None,
      notes=[],
    )
    path = self.folder() / 'dense.gguf'
    model = model_lib.load_model(str(folder), 'float32')
    gguf_file.write(model, path, 'float32', vocabulary)
    return path

  def test_scores_of_sentencepiece(self):
    trained = self.folder() / 'spm'
    text = self.folder() / 'text.txt'
    text.write_text(tiny_run.text(2))
    sentencepiece.SentencePieceTrainer.train(
      input=str(text),
      model_prefix=str(trained),
      vocab_size=300 + 60,
      model_type='bpe',
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      minloglevel=2,
    )
    model = self.pruned(vocab_size=360)
    for path in model.glob('tokenizer*'):
      path.unlink()
    shutil.copy(trained.with_suffix('.model'), model / 'tokenizer.model')
    (model / 'tokenizer_config.json').write_text(
      json.dumps({'tokenizer_class': 'LlamaTokenizer', 'legacy': False})
    )
    path = self.exported(model)
    theirs = sentencepiece.SentencePieceProcessor(
      model_file=str(model / 'tokenizer.model')
    )
    self.assertEqual(
      gguf_model.field(gguf.GGUFReader(path), 'tokenizer.ggml.scores'),
      [theirs.get_score(i) for i in range(360)],
    )
    runtime = _LlamaCpp(path)
    for text in _TEXTS[:2]:
      plain = theirs.encode(text)
      self.assertEqual(runtime.tokens(text)[-len(plain) :], plain, text)

  def test_added_tokens_beyond_the_embedding(self):
    model = self.pruned()

    def change(content):
      pad = dict.fromkeys(('single_word', 'lstrip', 'rstrip'), False)
      pad |= {'id': tiny_run.VOCAB, 'content': '<pad>', 'special': True}
      content['added_tokens'].append(pad | {'normalized': False})

    self.edit_tokenizer(model, change)
    self.edit(
      model / 'tokenizer_config.json', lambda x: x.update(pad_token='<pad>')
    )
    path = self.exported(model)
    (note,) = self.notes
    self.assertIn('<pad>', note)
    reader = gguf.GGUFReader(path)
    tokens = gguf_model.field(reader, 'tokenizer.ggml.tokens')
    self.assertLen(tokens, tiny_run.VOCAB)
    self.assertIsNone(
      gguf_model.field(reader, 'tokenizer.ggml.padding_token_id')
    )
    self.check(model)

  @parameterized.parameters('list', 'folder')
  def test_named_chat_templates(self, kind):
    model = self.pruned()
    if kind == 'list':
      named = {'default': 'plain', 'rag': 'r', 'tool_use': 't'}
      templates = [{'name': k, 'template': v} for k, v in named.items()]
      self.edit(
        model / 'tokenizer_config.json',
        lambda x: x.update(chat_template=templates),
      )
    else:
      more = model / 'additional_chat_templates'
      more.mkdir()
      (more / 'rag.jinja').write_text('r')
      (more / 'tool_use.jinja').write_text('t')
      (model / 'chat_template.jinja').write_text('plain')
      copy = self.folder()
      slicing.copy_companions(model, copy)
      names = {x.name for x in (copy / more.name).iterdir()}
      self.assertEqual(names, {'rag.jinja', 'tool_use.jinja'})
    path = self.exported(model)
    reader = gguf.GGUFReader(path)
    template = gguf_model.field(reader, 'tokenizer.chat_template')
    self.assertEqual(template, 'plain')
    (note,) = self.notes
    self.assertIn('rag, tool_use', note)

  def test_chat(self):
    """llama.cpp's chat endpoints say what transformers' template says."""
    model = self.pruned()
    template = (
      "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
      '{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}'
    )
    (model / 'chat_template.jinja').write_text(template)
    messages = [
      {'role': 'system', 'content': 'Be brief.'},
      {'role': 'user', 'content': 'What is a tuple?'},
    ]
    runtime = _LlamaCpp(self.exported(model))
    prompt = runtime.post('apply-template', messages=messages)['prompt']
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    self.assertEqual(
      prompt,
      tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
      ),
    )
    answer = runtime.post(
      'v1/chat/completions', messages=messages, max_tokens=4
    )
    self.assertEqual(
      answer['usage']['prompt_tokens'], len(tokenizer(prompt).input_ids)
    )

  def test_unknown_cut_can_be_named(self):
    model = self.pruned()

    def change(content):
      content['pre_tokenizer']['use_regex'] = False

    self.edit_tokenizer(model, change)
    self.assert_refused(lambda: self.exported(model), '--pre')
    reader = gguf.GGUFReader(self.exported(model, pre='bloom'))
    self.assertEqual(gguf_model.field(reader, 'tokenizer.ggml.pre'), 'bloom')

  def test_more_ids_than_rows(self):
    model = self.pruned(vocab_size=200)
    self.assert_refused(lambda: self.exported(model), '200 rows')

  def test_more_rows_than_ids(self):
    model = self.pruned(vocab_size=310)
    path = self.exported(model)
    tokens = gguf_model.field(gguf.GGUFReader(path), 'tokenizer.ggml.tokens')
    self.assertLen(tokens, 310)
    np.testing.assert_allclose(self.theirs(path), _log_probs(model), atol=2e-4)


class RefusedTest(_TestCase):
  def test_opt(self):
    model = self.folder() / 'opt'
    tiny_run.write_model(
      model, model_type='opt', ffn_dim=8, num_attention_heads=2
    )
    self.assert_refused(lambda: self.exported(model), str(model), 'OPT')

  def test_qwen3(self):
    model = self.pruned(model_type='qwen3')
    self.assert_refused(lambda: self.exported(model), 'Qwen3', '--format=hf')

  @parameterized.parameters(
    ({}, None),
    ({'model_type': 'qwen3'}, 'Qwen3'),
    ({'model_type': 'opt', 'ffn_dim': 8, 'num_attention_heads': 2}, 'OPT'),
    ({'vocab_size': 200}, '200 rows'),
  )
  def test_said_before_the_search(self, changes, word):
    model = self.folder() / 'dense'
    tiny_run.write_model(model, **changes)
    with self.assertLogs(level='WARNING') as logs:
      logging.warning('first')
      gguf_file.warn(model, model_config.read_model_config(model))
    self.assertLen(logs.output, 1 + bool(word))
    if word:
      self.assertIn(word, logs.output[1])
      self.assertNotIn('\n', logs.output[1])

  def test_main_says_so_before_it_loads(self):
    config = tiny_run.config(
      **tiny_run.inputs(self.folder(), model_type='qwen3')
    )
    stop = InterruptedError()
    with (
      absltest.mock.patch.object(weights, 'load_params', side_effect=stop),
      self.assertRaises(InterruptedError),
      self.assertLogs(level='WARNING') as logs,
    ):
      prune.prune_workdir(config, self.folder() / 'run', command='')
    (line,) = [x for x in logs.output if 'gguf' in x]
    self.assertIn('Qwen3', line)

  @parameterized.parameters({'truncate': False}, {'beta_fast': 16.0})
  def test_yarn_of_another_blend(self, **numbers):
    model = self.pruned(**_yarn(**numbers))
    self.assert_refused(lambda: self.exported(model), 'truncate')

  def test_more_than_float16_holds(self):
    model = self.pruned()

    def change(tensors):
      tensors['model.layers.0.mlp.up_proj.weight'][0, 0] = 1e6

    self.edit_tensors(model, change)
    self.assert_refused(
      lambda: self.exported(model, 'float16'), 'ffn_up', 'bfloat16'
    )


if __name__ == '__main__':
  absltest.main()
