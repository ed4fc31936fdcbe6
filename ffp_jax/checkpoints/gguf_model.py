"""A llama.cpp GGUF file of a LLaMA or Qwen: its config and its tensors.

Mistral models are of GGUF's architecture 'llama' too. Models whose layers
differ in width are of its architecture 'deci', the same with lists in place
of three numbers.
"""

import functools
import math
import pathlib

import gguf
import numpy as np

from ffp_jax.checkpoints.stored import Stored, damaged_file_error
from ffp_jax.errors import RequestError

# Hugging Face's names of what we know, without '.weight' and '.bias'.
_STEMS = ('model.embed_tokens', 'model.norm', 'lm_head')
_LAYER_STEMS = (
  'input_layernorm',
  'self_attn.q_proj',
  'self_attn.k_proj',
  'self_attn.v_proj',
  'self_attn.q_norm',
  'self_attn.k_norm',
  'self_attn.o_proj',
  'post_attention_layernorm',
  'mlp.gate_proj',
  'mlp.up_proj',
  'mlp.down_proj',
)
ROPE_FACTORS = 'rope_freqs.weight'
# Tensors that may come with a bias.
_BIASED = ('attn_q', 'attn_k', 'attn_v', 'attn_output')
_BIASED += ('ffn_gate', 'ffn_up', 'ffn_down')
_IGNORED = ('rope_freqs', 'attn_rot_embd')  # read as metadata, or implied
_PERMUTED = ('llama', 'deci')  # queries and keys are in llama.cpp's own order
_ARCHITECTURES = (*_PERMUTED, 'qwen2', 'qwen3')
# What llama.cpp takes for special tokens that a file does not name.
_SPECIAL = {'llama': {'bos': 1, 'eos': 2, 'unknown': 0}}
# Metadata under which they are other models than ours, where above 1.
_FOREIGN = ('{arch}.expert_count', 'split.count')


def open_file(path: pathlib.Path) -> gguf.GGUFReader:
  """The file's metadata and where its tensors lie.

  Raises:
    RequestError: damaged, or not a whole LLaMA or Qwen.
  """
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError, TypeError, OSError) as error:
    raise damaged_file_error(path, f'not a whole GGUF: {error}') from error
  kind = field(reader, 'general.architecture')
  if kind not in _ARCHITECTURES or reader.byte_order == 'S':
    raise RequestError(
      f'{path}: GGUF of architecture {kind!r} is not supported; '
      f'use one of {", ".join(_ARCHITECTURES)}, little-endian'
    )
  for key in _FOREIGN:
    if (field(reader, key) or 0) > 1:
      raise RequestError(
        f'{path}: {key} is {field(reader, key)}; use a model in one file '
        'without experts'
      )
  return reader


def field(reader: gguf.GGUFReader, key: str):
  """A metadata value, None where there is none.

  Args:
    reader: of the file.
    key: '{arch}' in it stands for the architecture.
  """
  key = _full(reader, key)
  return reader.fields[key].contents() if key in reader.fields else None


def special_id(reader: gguf.GGUFReader, role: str) -> int | None:
  """Id of a special token: 'bos', 'eos', 'unknown' or 'padding'."""
  found = field(reader, f'tokenizer.ggml.{role}_token_id')
  usual = _SPECIAL.get(field(reader, 'tokenizer.ggml.model'), {})
  return usual.get(role) if found is None else found


def _full(reader, key: str) -> str:
  if '{arch}' not in key:
    return key
  return key.format(arch=field(reader, 'general.architecture'))


def _needed(reader, key: str):
  value = field(reader, key)
  if value is None:
    raise RequestError(
      f'{reader.data.filename}: GGUF without {_full(reader, key)}'
    )
  return value


def hf_config(reader: gguf.GGUFReader) -> dict:
  """config.json of the model.

  Raises:
    RequestError: the metadata lacks a size, or scales rotary positions in a
      way that has no name.
  """
  names = {tensor.name for tensor in reader.tensors}
  epsilon = _needed(reader, '{arch}.attention.layer_norm_rms_epsilon')
  theta = _theta(reader)
  width = _needed(reader, '{arch}.embedding_length')
  heads, groups, ffn, kept = _widths(reader)
  window = field(reader, '{arch}.attention.sliding_window')
  biased = 'blk.0.attn_q.bias' in names
  family = _family(reader, names)
  config = {
    'architectures': [f'{family.title()}ForCausalLM'],
    'model_type': family,
    'vocab_size': _vocab(reader),
    'hidden_size': width,
    'intermediate_size': ffn,
    'num_hidden_layers': _needed(reader, '{arch}.block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': groups,
    'head_dim': _head_size(reader, width // heads),
    'sliding_window': window,
    'hidden_act': 'silu',
    'max_position_embeddings': _needed(reader, '{arch}.context_length'),
    # GGUF stores float32; its shortest decimal form is the one meant (1e-5).
    'rms_norm_eps': float(str(np.float32(epsilon))),
    'rope_parameters': _rope(reader) | {'rope_theta': theta},
    'rope_theta': theta,  # where readers before transformers 5 look
    'attention_bias': biased,
    'mlp_bias': 'blk.0.ffn_up.bias' in names,
    'tie_word_embeddings': 'output.weight' not in names,
    'bos_token_id': special_id(reader, 'bos'),
    'eos_token_id': special_id(reader, 'eos'),
    'pad_token_id': special_id(reader, 'padding'),
    'dtype': 'float16',
    'ffp_jax': kept,
  }
  return {key: value for key, value in config.items() if value is not None}


def _family(reader, names: set[str]) -> str:
  """`model_type` of the model with this arithmetic."""
  if field(reader, 'general.architecture') == 'qwen3':
    return 'qwen3'
  # Biases of queries, keys and values alone are Qwen2's.
  biased = [x for x in _BIASED if f'blk.0.{x}.bias' in names]
  if biased == ['attn_q', 'attn_k', 'attn_v']:
    return 'qwen2'
  windowed = field(reader, '{arch}.attention.sliding_window')
  return 'mistral' if windowed else 'llama'


def _widths(reader) -> tuple[int, int, int, dict | None]:
  """Query heads, groups and FFN channels, and each layer's where they differ.

  Returns:
    (heads, groups, ffn, `ffp_jax` of config.json or None); of layers that
    differ the most of each.
  """
  heads, groups, ffn = (
    _by_layer(reader, key)
    for key in ('attention.head_count', 'attention.head_count_kv')
    + ('feed_forward_length',)
  )
  where = reader.data.filename
  for i, (n, k, f) in enumerate(zip(heads, groups, ffn, strict=True)):
    if not min(n, k, f):
      raise RequestError(
        f'{where}: layer {i} has no attention or no FFN, which is not supported'
      )
    if n * groups[0] != heads[0] * k:
      raise RequestError(
        f'{where}: layers of different numbers of heads a group are not '
        'supported'
      )
  alike = len({*zip(groups, ffn, strict=True)}) == 1
  kept = None if alike else {'kept_groups': groups, 'kept_ffn': ffn}
  return max(heads), max(groups), max(ffn), kept


def _by_layer(reader, key: str) -> list[int]:
  """A width of every layer; one number stands for all of them."""
  layers = _needed(reader, '{arch}.block_count')
  value = field(reader, f'{{arch}}.{key}')
  if value is None and key == 'attention.head_count_kv':
    return _by_layer(reader, 'attention.head_count')
  value = _needed(reader, f'{{arch}}.{key}') if value is None else value
  value = value if isinstance(value, list) else [value] * layers
  if len(value) != layers:
    raise RequestError(
      f'{reader.data.filename}: {key} of {len(value)} layers, not {layers}'
    )
  return value


def _theta(reader) -> float:
  return field(reader, '{arch}.rope.freq_base') or 10000.0


def _vocab(reader) -> int:
  """Rows of the embedding, which older files have no key for."""
  for tensor in reader.tensors:
    if tensor.name == 'token_embd.weight':
      return int(tensor.shape[-1])
  raise RequestError(f'{reader.data.filename}: no tensor token_embd.weight')


def _head_size(reader, default: int) -> int:
  rotary = field(reader, '{arch}.rope.dimension_count')
  size = field(reader, '{arch}.attention.key_length') or rotary or default
  if rotary not in (None, size):
    raise RequestError(
      f'{reader.data.filename}: positions rotate {rotary} of {size} '
      'numbers of a head, which is not supported'
    )
  return size


def _rope(reader) -> dict:
  """How rotary positions are scaled, in Hugging Face's words."""
  # Without a type, llama.cpp scales linearly, as the oldest files mean it.
  kind = field(reader, '{arch}.rope.scaling.type') or 'linear'
  factor = (
    field(reader, '{arch}.rope.scaling.factor')
    or field(reader, '{arch}.rope.scale_linear')
    or 1.0
  )
  if kind == 'linear' and factor == 1.0:
    kind = 'none'
  rope = {'rope_type': 'default'}
  if kind != 'none':
    length = field(reader, '{arch}.rope.scaling.original_context_length')
    rope = {'rope_type': kind, 'factor': factor}
    if length is not None:
      rope['original_max_position_embeddings'] = length
    sharper = field(reader, '{arch}.rope.scaling.attn_factor')
    if kind == 'yarn' and sharper is not None:
      rope['attention_factor'] = sharper * yarn_amplitude(factor)
  factors = [t for t in reader.tensors if t.name == ROPE_FACTORS]
  return _llama3(reader, factors[0].data) if factors else rope


def yarn_amplitude(factor: float) -> float:
  """Of sine and cosine, which llama.cpp multiplies by the file's own."""
  return 1.0 + 0.1 * math.log(factor)


def _llama3(reader, factors) -> dict:
  """LLaMA 3.1's scaling, if it is what a file's factors come from.

  Args:
    reader: of the file.
    factors: what each frequency is divided by, [H / 2].
  """
  if np.all(factors == 1):
    return {'rope_type': 'default'}
  largest = round(float(factors.max()), 3)
  rope = {
    'rope_type': 'llama3',
    'factor': largest,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  frequency = _theta(reader) ** (-np.arange(len(factors)) / len(factors))
  turns = 8192 * frequency / (2 * np.pi)  # in the original context
  smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
  expected = 1 / ((1 - smooth) / largest + smooth)
  if not np.allclose(factors, expected, rtol=1e-3):
    raise RequestError(
      f'{reader.data.filename}: {ROPE_FACTORS} scales rotary positions '
      'unlike LLaMA 3.1; use the original checkpoint'
    )
  return rope


def open_tensors(path: pathlib.Path) -> dict[str, Stored]:
  """Hugging Face name to tensor; read, all are float32.

  Raises:
    RequestError: see `open_file`.
  """
  return _open_tensors(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a big vocabulary takes seconds to walk
def _open_tensors(path, _):
  reader = open_file(path)
  config = hf_config(reader)
  layers = config['num_hidden_layers']
  names = {theirs: ours for ours, theirs in gguf_names(layers).items()}
  permuted = field(reader, 'general.architecture') in _PERMUTED
  found = {}
  for tensor in reader.tensors:
    stem, _, leaf = tensor.name.rpartition('.')
    part = stem.rpartition('.')[2]
    if part in _IGNORED:
      continue
    leaves = ('weight', 'bias') if part in _BIASED else ('weight',)
    if stem not in names or leaf not in leaves:
      raise RequestError(
        f'{path}: tensor {tensor.name} is not known; use the original '
        'checkpoint'
      )
    turned = permuted and part in ('attn_q', 'attn_k')
    head_size = config['head_dim'] if turned else None
    found[f'{names[stem]}.{leaf}'] = _stored(path, tensor, head_size)
  return found


def _stored(path, tensor, head_size) -> Stored:
  shape = tuple(int(n) for n in reversed(tensor.shape))
  kind, rows = tensor.tensor_type, shape[0] if len(shape) > 1 else 1
  block, size = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.dequantize(np.zeros((1, size), np.uint8), kind)
  except (NotImplementedError, ValueError):
    # A type that gguf can't read keeps its name, by which it is refused.
    return Stored(shape, kind.name, None)
  place = tensor.data_offset, (rows, tensor.n_bytes // rows)
  read = functools.partial(_read, path, place, kind, shape)
  if head_size:
    read = functools.partial(_unpermuted, read, head_size)
  # float16 holds what a quantised type does, and float32 twice the bytes.
  dtype = {'F32': 'float32', 'BF16': 'bfloat16'}.get(kind.name, 'float16')
  return Stored(shape, dtype, read)


def _read(path, place, kind, shape, index) -> np.ndarray:
  """Rows of a tensor, dequantised; a vector is one row."""
  data = np.memmap(path, np.uint8, 'r', *place)
  rows = data[index[0]] if len(shape) > 1 else data
  return gguf.dequantize(np.array(rows), kind)[
    (slice(None), *index[1:]) if len(shape) > 1 else (0, *index)
  ]


def _unpermuted(read, size: int, index) -> np.ndarray:
  """Rows of a query or key projection in Hugging Face's order.

  llama.cpp rotates neighbouring rows of a head (2i, 2i + 1), Hugging Face
  rows half a head apart (i, i + H/2); the GGUF is stored for the former.

  Args:
    read: of the stored order.
    size: rows of a head, H.
    index: of the tensor.
  """
  rows, *rest = index
  first, last = rows.start // size * size, -(-rows.stop // size) * size
  value = read((slice(first, last), *rest))
  pairs = value.reshape(-1, size // 2, 2, *value.shape[1:])
  value = pairs.swapaxes(1, 2).reshape(value.shape)
  return value[rows.start - first : rows.stop - first]


def gguf_names(layers: int) -> dict[str, str]:
  """Hugging Face's to llama.cpp's names, without '.weight' and '.bias'."""
  # Of the architectures here the one that has all the tensors.
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers)
  stems = [
    f'model.layers.{i}.{stem}' for i in range(layers) for stem in _LAYER_STEMS
  ]
  return {stem: names[stem] for stem in (*_STEMS, *stems)}
