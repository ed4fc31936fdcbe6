"""A llama.cpp GGUF file of a LLaMA or Qwen: its config and its tensors.

Mistral models have GGUF's architecture 'llama' too. Models whose layers differ
in width have its architecture 'deci', which is the same with lists in place of
three numbers.
"""

import functools
import pathlib

import gguf
import numpy as np

from ffp_jax.checkpoints import gguf_rope
from ffp_jax.checkpoints.gguf_metadata import (
  field,
  open_file,
  required_field,
  special_id,
)
from ffp_jax.checkpoints.gguf_rope import yarn_amplitude as yarn_amplitude
from ffp_jax.checkpoints.stored import Stored, refuse_to_read
from ffp_jax.errors import RequestError

# Hugging Face's names of the supported tensors, without '.weight' and '.bias'.
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
ROPE_FACTORS = gguf_rope.FACTORS
# llama.cpp's names of the tensors that may have a bias.
_BIASED = ('attn_q', 'attn_k', 'attn_v', 'attn_output')
_BIASED += ('ffn_gate', 'ffn_up', 'ffn_down')
_IGNORED = ('rope_freqs', 'attn_rot_embd')  # read as metadata, or implied
_PERMUTED = ('llama', 'deci')  # have queries and keys in llama.cpp's order


def hf_config(reader: gguf.GGUFReader) -> dict:
  """Returns the config.json of the model.

  Raises:
    RequestError: a size is missing, or rotary positions are scaled in a way
      that config.json has no name for.
  """
  names = {tensor.name for tensor in reader.tensors}
  epsilon = required_field(reader, '{arch}.attention.layer_norm_rms_epsilon')
  theta = gguf_rope.theta(reader)
  width = required_field(reader, '{arch}.embedding_length')
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
    'num_hidden_layers': required_field(reader, '{arch}.block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': groups,
    'head_dim': _head_size(reader, width // heads),
    'sliding_window': window,
    'hidden_act': 'silu',
    'max_position_embeddings': required_field(reader, '{arch}.context_length'),
    # GGUF stores float32; its shortest decimal is the original (1e-5).
    'rms_norm_eps': float(str(np.float32(epsilon))),
    'rope_parameters': gguf_rope.rope_parameters(reader)
    | {'rope_theta': theta},
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
  """Returns the `model_type` that computes the same."""
  if field(reader, 'general.architecture') == 'qwen3':
    return 'qwen3'
  # Qwen2 has biases of queries, keys and values alone.
  biased = [x for x in _BIASED if f'blk.0.{x}.bias' in names]
  if biased == ['attn_q', 'attn_k', 'attn_v']:
    return 'qwen2'
  windowed = field(reader, '{arch}.attention.sliding_window')
  return 'mistral' if windowed else 'llama'


def _widths(reader) -> tuple[int, int, int, dict | None]:
  """Reads the query heads, groups and FFN channels.

  Returns:
    (heads, groups, ffn, `ffp_jax` of config.json). If layers differ, the
    first three are the maxima over layers; else the last is None.
  """
  heads, groups, ffn = (
    _per_layer(reader, key)
    for key in ('attention.head_count', 'attention.head_count_kv')
    + ('feed_forward_length',)
  )
  where = reader.data.filename
  for i, (n, k, f) in enumerate(zip(heads, groups, ffn, strict=True)):
    if not f or (n and not k) or not any(heads):
      raise RequestError(
        f'{where}: layer {i} has no FFN, or attention of another kind, which '
        'is not supported'
      )
    if n * max(groups) != max(heads) * k:
      raise RequestError(
        f'{where}: layers of different numbers of heads a group are not '
        'supported'
      )
  alike = len({*zip(groups, ffn, strict=True)}) == 1
  kept = None if alike else {'kept_groups': groups, 'kept_ffn': ffn}
  return max(heads), max(groups), max(ffn), kept


def _per_layer(reader, key: str) -> list[int]:
  """Returns a width of every layer; the file may state one for all."""
  layers = required_field(reader, '{arch}.block_count')
  value = field(reader, f'{{arch}}.{key}')
  if value is None and key == 'attention.head_count_kv':
    return _per_layer(reader, 'attention.head_count')
  value = required_field(reader, f'{{arch}}.{key}') if value is None else value
  value = value if isinstance(value, list) else [value] * layers
  if len(value) != layers:
    raise RequestError(
      f'{reader.data.filename}: {key} of {len(value)} layers, not {layers}'
    )
  return value


def _vocab(reader) -> int:
  """Returns the rows of the embedding, for which older files have no key."""
  for tensor in reader.tensors:
    if tensor.name == 'token_embd.weight':
      return int(tensor.shape[-1])
  raise RequestError(f'{reader.data.filename}: no tensor token_embd.weight')


def _head_size(reader, default: int) -> int:
  """Returns H, and refuses heads that are rotated only in part."""
  rotary = field(reader, '{arch}.rope.dimension_count')
  size = field(reader, '{arch}.attention.key_length') or rotary or default
  if rotary not in (None, size):
    raise RequestError(
      f'{reader.data.filename}: positions rotate {rotary} of {size} '
      'numbers of a head, which is not supported'
    )
  return size


def open_tensors(path: pathlib.Path) -> dict[str, Stored]:
  """Returns the tensors by Hugging Face name; when read, all are float32.

  Raises:
    RequestError: see `open_file`.
  """
  return _open_tensors(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # parsing a big vocabulary takes seconds
def _open_tensors(path, _):
  """Opens the tensors; cached by path and time of change."""
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
    rotated = permuted and part in ('attn_q', 'attn_k')
    head_size = config['head_dim'] if rotated else None
    found[f'{names[stem]}.{leaf}'] = _stored(path, tensor, head_size)
  kept = config.get('ffp_jax', {}).get('kept_groups', ())
  for i, groups in enumerate(kept):
    if not groups:  # where llama.cpp has no norm before attention
      name = f'{names[f"blk.{i}.attn_norm"]}.weight'
      found[name] = Stored((config['hidden_size'],), 'float32', _read_ones)
  return found


def _read_ones(index) -> np.ndarray:
  """Reads a norm before attention without heads, which changes nothing."""
  return np.ones([part.stop - part.start for part in index], np.float32)


def _stored(path, tensor, head_size) -> Stored:
  """Describes a tensor; `head_size` is H if its rows are permuted, or None."""
  shape = tuple(int(n) for n in reversed(tensor.shape))
  kind, rows = tensor.tensor_type, shape[0] if len(shape) > 1 else 1
  block, size = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.dequantize(np.zeros((1, size), np.uint8), kind)
  except (NotImplementedError, ValueError):
    # The name of a type that gguf can't read is no float, so it is refused.
    return Stored(shape, kind.name, refuse_to_read)
  place = tensor.data_offset, (rows, tensor.n_bytes // rows)
  read = functools.partial(_read, path, place, kind, shape)
  if head_size:
    read = functools.partial(_unpermuted, read, head_size)
  # float16 is exact enough for quantised types; float32 is twice the bytes.
  dtype = {'F32': 'float32', 'BF16': 'bfloat16'}.get(kind.name, 'float16')
  return Stored(shape, dtype, read)


def _read(path, place, kind, shape, index) -> np.ndarray:
  """Reads rows of a tensor and dequantises them; a vector is one row."""
  data = np.memmap(path, np.uint8, 'r', *place)
  rows = data[index[0]] if len(shape) > 1 else data
  return gguf.dequantize(np.array(rows), kind)[
    (slice(None), *index[1:]) if len(shape) > 1 else (0, *index)
  ]


def _unpermuted(read, size: int, index) -> np.ndarray:
  """Reads rows of a query or key projection in Hugging Face's order.

  llama.cpp rotates neighbouring rows of a head (2i, 2i + 1), Hugging Face
  rows half a head apart (i, i + H/2); the file is stored for the former.

  Args:
    read: reads rows in the file's order.
    size: rows of a head, H.
    index: of the tensor in Hugging Face's order.
  """
  rows, *rest = index
  first, last = rows.start // size * size, -(-rows.stop // size) * size
  value = read((slice(first, last), *rest))
  pairs = value.reshape(-1, size // 2, 2, *value.shape[1:])
  value = pairs.swapaxes(1, 2).reshape(value.shape)
  return value[rows.start - first : rows.stop - first]


def gguf_names(layers: int) -> dict[str, str]:
  """Maps Hugging Face's names to llama.cpp's.

  Args:
    layers: of the model.

  Returns:
    The names without '.weight' and '.bias'.
  """
  # Qwen3 has the tensors of all supported architectures.
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers)
  stems = [
    f'model.layers.{i}.{stem}' for i in range(layers) for stem in _LAYER_STEMS
  ]
  return {stem: names[stem] for stem in (*_STEMS, *stems)}
