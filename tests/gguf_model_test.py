import pathlib
import string
import sys
from unittest import mock

import gguf
import jax
import numpy as np
import torch
import transformers
from absl.testing import absltest, parameterized

from ffp_jax.checkpoints import gguf_model, hub, model_config, shards, weights
from ffp_jax.models import families
from ffp_jax.text import tokenization
from tests.testing import CheckpointTestCase

_T = gguf.GGMLQuantizationType
_HF = {
  'vocab_size': 70,
  'hidden_size': 256,
  'intermediate_size': 512,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 32,
  'max_position_embeddings': 77,
  'rms_norm_eps': 1e-5,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 12345.0},
}
_NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'self_attn.o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}


def _model(kind=transformers.LlamaConfig, **changes):
  torch.manual_seed(0)
  config = kind(**_HF | changes)
  model = transformers.AutoModelForCausalLM.from_config(config)
  for key, value in model.named_parameters():
    if key.endswith(('bias', 'norm.weight')):
      value.data.normal_()
  return model.requires_grad_(False)


def _name(key: str) -> str:
  """Returns llama.cpp's name of a Hugging Face tensor."""
  stem, _, leaf = key.rpartition('.')
  if stem.startswith('model.layers.'):
    _, _, layer, part = stem.split('.', 3)
    return f'blk.{layer}.{_NAMES[part]}.{leaf}'
  return f'{_NAMES[stem]}.{leaf}'


def _permuted(value, heads):
  """Permutes query and key projections as llama.cpp's converter does."""
  halves = value.reshape(heads, 2, value.shape[0] // heads // 2, -1)
  return halves.swapaxes(1, 2).reshape(value.shape)


def _tokens():
  """Returns a byte-level vocabulary of 70 tokens with two merges."""
  letters = string.digits + string.ascii_letters + "!'.Ċ"
  return [*letters, 'Ġ', 'ab', 'abc', '<s>'], ['a b', 'ab c']


class _TestCase(CheckpointTestCase):
  def setUp(self):
    super().setUp()
    self.home = self.folder()
    self.enterContext(
      mock.patch.object(pathlib.Path, 'home', return_value=self.home)
    )

  def written(
    self,
    model=None,
    kinds=None,
    *,
    arch='llama',
    metadata=None,
    extra=None,
    vocabulary=None,
  ) -> pathlib.Path:
    """Writes a GGUF file of a model as llama.cpp's converter would.

    Args:
      model: of transformers.
      kinds: end of a tensor's name to its type; the rest are F32.
      arch: architecture.
      metadata: more of it, name to (type, value).
      extra: more tensors.
      vocabulary: function that adds the tokenizer to a writer.
    """
    model = model or _model()
    path = self.folder() / 'tiny.gguf'
    writer = gguf.GGUFWriter(path, arch)
    c = model.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters['rope_theta'])
    writer.add_rope_dimension_count(c.head_dim)
    (vocabulary or self.byte_level)(writer)
    for key, (kind, value) in (metadata or {}).items():
      getattr(writer, f'add_{kind}')(key, value)
    heads = {'q_proj': c.num_attention_heads, 'k_proj': c.num_key_value_heads}
    for key, value in model.state_dict().items():
      value = value.numpy()
      if key == 'lm_head.weight' and c.tie_word_embeddings:
        continue
      count = heads.get(key.split('.')[-2])
      if count and arch not in ('qwen2', 'qwen3'):
        value = _permuted(value, count)
      ends = [end for end in kinds or {} if key.endswith(end)]
      if ends:
        kind = kinds[ends[0]]
        writer.add_tensor(
          _name(key), gguf.quantize(value, kind), raw_dtype=kind
        )
      else:
        writer.add_tensor(_name(key), value)
    for key, value in (extra or {}).items():
      writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

  def byte_level(self, writer, pre='gpt-2'):
    tokens, merges = _tokens()
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    types = [gguf.TokenType.NORMAL] * 69 + [gguf.TokenType.CONTROL]
    writer.add_token_types(types)
    writer.add_bos_token_id(69)

  def reference(self, model):
    """Returns config and parameters of the same model as safetensors."""
    folder = self.folder()
    model.save_pretrained(folder)
    return model_config.read_model_config(folder), self.load(folder)


class WeightsTest(_TestCase):
  @parameterized.parameters(
    {},
    {'num_key_value_heads': 4, 'head_dim': 64},
    {'tie_word_embeddings': True},
    {'num_key_value_heads': 1},
  )
  def test_float32_is_what_was_written(self, **changes):
    model = _model(**changes)
    config, params = self.reference(model)
    for piece in (1 << 20, 100):
      with mock.patch.object(shards, '_PIECE', piece):
        folder = hub.resolve_model(str(self.written(model)))
        self.assertEqual(model_config.read_model_config(folder), config)
        self.assert_trees_equal(self.load(folder), params)

  def test_biases_are_permuted_too(self):
    model = _model(attention_bias=True, mlp_bias=True)
    config, params = self.reference(model)
    folder = hub.resolve_model(str(self.written(model)))
    self.assertEqual(model_config.read_model_config(folder), config)
    self.assert_trees_equal(self.load(folder), params)

  @parameterized.parameters(
    (transformers.Qwen2Config, {}),
    (transformers.Qwen2Config, {'tie_word_embeddings': True}),
    (transformers.Qwen3Config, {}),
    (transformers.Qwen3Config, {'num_key_value_heads': 4, 'head_dim': 16}),
  )
  def test_qwen_is_not_permuted(self, kind, changes):
    model = _model(kind, **changes)
    config, params = self.reference(model)
    folder = hub.resolve_model(
      str(
        self.written(
          model,
          arch=kind.model_type,
          metadata={
            f'{kind.model_type}.attention.key_length': (
              'uint32',
              model.config.head_dim,
            )
          },
        )
      )
    )
    self.assertEqual(model_config.read_model_config(folder), config)
    self.assert_trees_equal(self.load(folder), params)

  @parameterized.parameters(
    ('llama', 'output.bias'),
    ('qwen2', 'output.bias'),
    ('llama', 'blk.0.attn_q.scale'),
    ('llama', 'blk.1.ffn_gate_inp.weight'),
  )
  def test_a_tensor_that_would_be_ignored(self, arch, name):
    kind = {
      'llama': transformers.LlamaConfig,
      'qwen2': transformers.Qwen2Config,
    }
    path = self.written(
      _model(kind[arch]), arch=arch, extra={name: np.ones(4, np.float32)}
    )
    folder = hub.resolve_model(str(path))
    self.assert_refused(lambda: self.load(folder), name)

  def test_a_norm_that_is_missing(self):
    # Only attention without heads has none.
    model = _model()
    del model.model.layers[1].input_layernorm
    folder = hub.resolve_model(str(self.written(model)))
    self.assert_refused(
      lambda: self.load(folder), 'model.layers.1.input_layernorm.weight'
    )

  @parameterized.parameters(
    (_T.F16, 2**-11),
    (_T.BF16, 2**-8),
    (_T.Q8_0, 0.01),
    (_T.Q5_0, 0.07),
    (_T.Q4_1, 0.1),
    (_T.Q4_0, 0.15),
  )
  def test_quantised(self, kind, bound):
    model = _model()
    _, want = self.reference(model)
    path = self.written(model, {'proj.weight': kind, 'tokens.weight': kind})
    got = self.load(hub.resolve_model(str(path)))

    def close(a, b):
      error = np.abs(np.asarray(a) - np.asarray(b)).max()
      self.assertLessEqual(error, bound * np.abs(b).max())

    jax.tree.map(close, got, want)
    self.assertFalse(
      np.array_equal(got['embed']['table'], want['embed']['table'])
    )

  def test_q4_k_in_slices(self):
    source = np.random.default_rng(0)
    data = source.integers(0, 256, (256, 2, 144), np.uint8)
    data[..., :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    path = self.folder() / 'x.gguf'
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_tensor(
      'blk.0.ffn_down.weight', data.reshape(256, -1), raw_dtype=_T.Q4_K
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.GGUFReader(path).tensors[0]
    stored = gguf_model._stored(path, tensor, None)
    self.assertEqual(stored.shape, (256, 512))
    whole = gguf.dequantize(tensor.data, _T.Q4_K)
    index = slice(3, 50), slice(7, 300)
    np.testing.assert_array_equal(stored.read(index), whole[index])

  def test_on_eight_devices(self):
    model = _model()
    config, want = self.reference(model)
    folder = hub.resolve_model(str(self.written(model)))
    mesh = jax.make_mesh((2, 4), ('a', 'b'))

    def sharding(x):
      last = 'b' if x.shape[-1] % 4 == 0 else None
      spec = [None] * (len(x.shape) - 1) + [last]
      if len(spec) > 2:
        spec[2] = 'a'  # query and key: groups
      return jax.sharding.NamedSharding(mesh, jax.P(*spec[: len(x.shape)]))

    shapes = families.param_shapes(config, np.float32)
    shardings = jax.tree.map(sharding, shapes)
    got = weights.load_params(folder, config, np.float32, shardings)
    self.assert_trees_equal(got, want)

  def test_unreadable_type(self):
    model = _model()
    state = dict(model.state_dict())
    key = 'model.layers.0.input_layernorm.weight'
    state[key] = state[key].to(torch.int8)
    with mock.patch.object(model, 'state_dict', return_value=state):
      path = self.written(model)
    folder = hub.resolve_model(str(path))
    self.assert_refused(lambda: self.load(folder), key, 'I8')


class ConfigTest(_TestCase):
  def read(self, **kwargs) -> dict:
    return gguf_model.hf_config(gguf_model.open_file(self.written(**kwargs)))

  def test_fields(self):
    config = self.read()
    self.assertEqual({key: config[key] for key in _HF}, _HF)
    self.assertEqual(config['model_type'], 'llama')
    self.assertFalse(config['tie_word_embeddings'])

  def test_sliding_window_makes_it_mistral(self):
    config = self.read(
      metadata={'llama.attention.sliding_window': ('uint32', 5)}
    )
    self.assertEqual(config['model_type'], 'mistral')
    self.assertEqual(config['sliding_window'], 5)

  def test_linear_scaling(self):
    config = self.read(
      metadata={
        'llama.rope.scaling.type': ('string', 'linear'),
        'llama.rope.scaling.factor': ('float32', 4.0),
      }
    )
    self.assertEqual(
      config['rope_parameters'],
      {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 12345.0},
    )

  @parameterized.parameters('rope.scaling.factor', 'rope.scale_linear')
  def test_a_factor_without_a_type_is_linear(self, key):
    config = self.read(metadata={f'llama.{key}': ('float32', 4.0)})
    self.assertEqual(config['rope_parameters']['rope_type'], 'linear')
    self.assertEqual(config['rope_parameters']['factor'], 4.0)

  @parameterized.parameters(8.0, 32.0)
  def test_llama3_scaling_is_found_in_its_factors(self, factor):
    rope = {
      'rope_type': 'llama3',
      'factor': factor,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
      'rope_theta': 500000.0,
    }
    model = _model(rope_parameters=rope, max_position_embeddings=65536)
    plain = 500000.0 ** (-np.arange(16) / 16)
    scaled = model.model.rotary_emb.inv_freq.numpy()
    factors = (plain / scaled).astype(np.float32)
    self.assertGreater(len(np.unique(factors.round(3))), 2)
    config = self.read(model=model, extra={'rope_freqs.weight': factors})
    self.assertEqual(config['rope_parameters'], rope)

  def test_factors_of_another_scaling(self):
    factors = np.linspace(1, 3, 16, dtype=np.float32)
    path = self.written(extra={'rope_freqs.weight': factors})
    self.assert_refused(
      lambda: hub.resolve_model(str(path)), str(path), 'rope_freqs'
    )

  def test_factors_of_one(self):
    config = self.read(extra={'rope_freqs.weight': np.ones(16, np.float32)})
    self.assertEqual(config['rope_parameters']['rope_type'], 'default')

  @parameterized.parameters(
    ({'arch': 'qwen3moe'}, 'qwen3moe'),
    ({'metadata': {'llama.expert_count': ('uint32', 8)}}, 'expert_count'),
    ({'metadata': {'split.count': ('uint16', 3)}}, 'split.count'),
    (
      {'metadata': {'llama.attention.key_length': ('uint32', 64)}},
      'rotate 32 of 64',
    ),
  )
  def test_refused(self, kwargs, word):
    path = self.written(**kwargs)
    self.assert_refused(lambda: hub.resolve_model(str(path)), str(path), word)
    self.assertEmpty(list(self.home.glob('.cache/ffp_jax/gguf/*')))

  @parameterized.parameters(
    {'intermediate_size': [48, 0]},
    {'num_key_value_heads': [2, 0]},
    {'num_attention_heads': [0, 0], 'num_key_value_heads': [0, 0]},
  )
  def test_layers_that_no_model_here_has(self, **widths):
    model = _model()
    vars(model.config).update(widths)  # which transformers would refuse
    path = self.written(model, arch='qwen2')  # whose heads are not permuted
    self.assert_refused(lambda: hub.resolve_model(str(path)), 'has no FFN')

  @parameterized.parameters(0, 3, 30, 0.1, 0.5, -1)
  def test_truncated(self, size):
    path = self.written()
    content = path.read_bytes()
    size = int(size * len(content)) if isinstance(size, float) else size
    path.write_bytes(content[:size])
    self.assert_refused(lambda: hub.resolve_model(str(path)), str(path))


class PlaceTest(_TestCase):
  def test_one_file_in_a_directory(self):
    path = self.written()
    folder = hub.resolve_model(str(path.parent))
    self.assertEqual(folder, hub.resolve_model(str(path)))
    self.assertNotEqual(folder, path.parent)
    self.assertEqual((folder / 'model.gguf').resolve(), path.resolve())
    self.assertEqual(hub.resolve_model(str(folder)), folder)
    self.assertEqual([x.name for x in path.parent.iterdir()], [path.name])

  def test_made_once_and_again_when_the_file_changes(self):
    path = self.written()
    folder = hub.resolve_model(str(path))
    with mock.patch.object(hub, '_describe', side_effect=AssertionError):
      self.assertEqual(hub.resolve_model(str(path)), folder)
    path.write_bytes(self.written(_model(rms_norm_eps=1e-3)).read_bytes())
    other = hub.resolve_model(str(path))
    self.assertNotEqual(other, folder)
    self.assertEqual(model_config.read_model_config(other).norm_eps, 1e-3)

  def test_two_files_in_a_directory(self):
    path = self.written()
    (path.parent / 'b.gguf').write_bytes(path.read_bytes())
    self.assert_refused(lambda: hub.resolve_model(str(path.parent)), '2 .gguf')

  def test_missing(self):
    self.assert_refused(
      lambda: hub.resolve_model('no/such.gguf'), 'no/such.gguf'
    )

  def test_nothing_needs_torch(self):
    path = self.written()
    with mock.patch.dict(sys.modules, torch=None):
      self.load(hub.resolve_model(str(path)))


class TokenizerTest(_TestCase):
  """Compares ids with those of transformers for the same file."""

  def both(self, vocabulary):
    path = self.written(vocabulary=vocabulary)
    load = transformers.AutoTokenizer.from_pretrained
    return load(hub.resolve_model(str(path))), load(
      path.parent, gguf_file=path.name
    )

  @parameterized.parameters('gpt-2', 'llama-bpe', 'tekken')
  def test_byte_level(self, pre):
    def vocabulary(writer):
      self.byte_level(writer, pre)
      writer.add_add_bos_token(False)

    ours, theirs = self.both(vocabulary)
    for text in ('abcab abc', '<s>ab  c', "AB'S 0123 a1", '\n '):
      ids = ours(text)['input_ids']
      self.assertEqual(ids, theirs(text)['input_ids'], text)
    self.assertEqual(ours.bos_token_id, 69)
    self.assertEqual(ours('abc')['input_ids'], [68])
    self.assertEqual(ours.decode(ours('abcab abc')['input_ids']), 'abcab abc')

  @parameterized.parameters(
    ('llama-bpe', None, True),
    ('gpt-2', None, False),
    ('gpt-2', True, True),
    ('llama-bpe', False, False),
  )
  def test_bos(self, pre, said, expected):
    def vocabulary(writer):
      self.byte_level(writer, pre)
      if said is not None:
        writer.add_add_bos_token(said)

    path = self.written(vocabulary=vocabulary)
    ours = transformers.AutoTokenizer.from_pretrained(
      hub.resolve_model(str(path))
    )
    self.assertEqual(ours('abc')['input_ids'], [69] * expected + [68])

  def test_qwen2_with_another_cut(self):
    def vocabulary(writer):
      tokens, _ = _tokens()
      writer.add_tokenizer_model('gpt2')
      writer.add_tokenizer_pre('gpt-2')
      writer.add_token_list([*tokens[:-3], '11', 'x1', '<s>'])
      writer.add_token_merges(['1 1'])

    model = _model(transformers.Qwen2Config)
    path = self.written(model, arch='qwen2', vocabulary=vocabulary)
    ours = tokenization.load_tokenizer(hub.resolve_model(str(path)))
    self.assertEqual(ours('11')['input_ids'], [67])  # Qwen2's cuts digits
    self.assertEqual(len(ours), 70)  # and adds a token of its own

  def test_eos(self):
    def vocabulary(writer):
      self.byte_level(writer)
      writer.add_eos_token_id(68)
      writer.add_add_eos_token(True)

    path = self.written(vocabulary=vocabulary)
    ours = tokenization.load_tokenizer(hub.resolve_model(str(path)))
    self.assertEqual(ours('ab!')['input_ids'][-1], 68)

  def test_templates(self):
    def vocabulary(writer):
      self.byte_level(writer)
      writer.add_chat_template(
        [
          {'name': 'default', 'template': 'plain'},
          {'name': 'tool_use', 'template': 'tools'},
        ]
      )

    with self.assertLogs(level='WARNING') as logs:
      folder = hub.resolve_model(str(self.written(vocabulary=vocabulary)))
    self.assertIn('tool_use', logs.output[0])
    self.assertEqual(tokenization.load_tokenizer(folder).chat_template, 'plain')

  def test_sentencepiece_without_ids_of_special_tokens(self):
    def vocabulary(writer):
      self.sentencepiece(writer, ids=False)

    ours = tokenization.load_tokenizer(
      hub.resolve_model(str(self.written(vocabulary=vocabulary)))
    )
    self.assertEqual(ours('a')['input_ids'][0], 1)
    self.assertEqual([ours.eos_token_id, ours.unk_token_id], [2, 0])

  def test_digits_one_by_one(self):
    def vocabulary(writer):
      tokens, merges = _tokens()
      writer.add_tokenizer_model('gpt2')
      writer.add_tokenizer_pre('smollm')
      writer.add_token_list([*tokens[:-3], '12', 'x1', '<s>'])
      writer.add_token_merges(['1 2', 'x 1'])

    path = self.written(vocabulary=vocabulary)
    ours = transformers.AutoTokenizer.from_pretrained(
      hub.resolve_model(str(path))
    )
    self.assertLen(ours('112')['input_ids'], 3)

  def sentencepiece(self, writer, ids=True):
    specials = ['<unk>', '<s>', '</s>']
    pieces = ['▁', *'abcdefgh', '▁a', 'ab', '▁ab', 'abc', 'bc', 'gh', 'fgh']
    plain = [f'<0x{i:02X}>' for i in range(256)] + ['x', 'y']
    tokens = specials + pieces + plain
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2
    types += [gguf.TokenType.NORMAL] * len(pieces)
    types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * 2
    writer.add_tokenizer_model('llama')
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(types)
    if not ids:
      return
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

  def test_sentencepiece(self):
    ours, theirs = self.both(self.sentencepiece)
    for text in ('abc', 'ab abc  fgh', 'bcabcc', 'x\ny', 'é', 'a</s>'):
      ids = ours(text)['input_ids']
      self.assertEqual(ids, theirs(text)['input_ids'], text)
      self.assertEqual(ids[0], 1)
    plain = ours('ab abc  fgh', add_special_tokens=False)['input_ids']
    self.assertEqual(ours.decode(plain), 'ab abc  fgh')

  @parameterized.parameters(
    ('gpt2', 'falcon', 'falcon'),
    ('gpt2', 'default', 'default'),
    ('bert', 'gpt-2', 'bert'),
  )
  def test_unknown(self, kind, pre, word):
    def vocabulary(writer):
      writer.add_tokenizer_model(kind)
      writer.add_tokenizer_pre(pre)
      writer.add_token_list(_tokens()[0])
      writer.add_token_merges(_tokens()[1])

    path = self.written(vocabulary=vocabulary)
    self.assert_refused(
      lambda: hub.resolve_model(str(path)), str(path), repr(word)
    )

  def test_damaged(self):
    def vocabulary(writer):
      writer.add_tokenizer_model('gpt2')
      writer.add_tokenizer_pre('gpt-2')
      writer.add_token_list(_tokens()[0])
      writer.add_token_merges(['no such'])

    path = self.written(vocabulary=vocabulary)
    self.assert_refused(
      lambda: hub.resolve_model(str(path)), str(path), 'tokenizer'
    )


if __name__ == '__main__':
  absltest.main()
