"""A model as one GGUF file, for llama.cpp as it is.

llama.cpp reads layers of different widths for its architecture 'deci' (made
for DeciLM and Nemotron, src/models/deci.cpp), whose graph is otherwise that
of 'llama': biases, rotary positions and a SiLU-gated FFN. Models whose layers
are alike are written as 'llama', or 'qwen3' if queries and keys are normalised.
"""

import pathlib

import gguf
import numpy as np
from absl import logging

from ffp_jax.checkpoints import gguf_model
from ffp_jax.checkpoints.model import Model
from ffp_jax.errors import RequestError
from ffp_jax.export import gguf_vocabulary
from ffp_jax.export.gguf_vocabulary import Vocabulary
from ffp_jax.models import rope
from ffp_jax.models.decoder import ModelConfig

_Kind = gguf.GGMLQuantizationType
_KINDS = {
  'float32': (_Kind.F32, gguf.LlamaFileType.ALL_F32),
  'float16': (_Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
  'bfloat16': (_Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
  'q8_0': (_Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_YARN_BLEND = (32.0, 1.0, True)  # for others llama.cpp has flags, no metadata
DTYPES = tuple(_KINDS)


def _alike(config: ModelConfig) -> bool:
  """Whether all layers are of the same widths."""
  return len({config.widths(i) for i in range(config.layers)}) == 1


def check(config: ModelConfig, where, alike: bool | None = None):
  """Refuses what llama.cpp's graph can't express.

  Args:
    config: of the model.
    where: for messages.
    alike: whether all layers will be of the same widths; None if they stay
      as they are.

  Raises:
    RequestError: naming what, and for an allocation the layer.
  """
  instead = 'use --format=hf or hf_dense'
  alike = _alike(config) if alike is None else alike
  if config.positions != 'rope':
    raise RequestError(
      f'{where}: llama.cpp has no architecture for OPT; {instead}'
    )
  if config.qk_norm and not alike:
    raise RequestError(
      f"{where}: llama.cpp's architecture of layers that differ, deci, has no "
      f'normalised queries and keys (Qwen3); {instead}'
    )
  if config.qk_norm and config.out_bias:
    raise RequestError(
      f"{where}: llama.cpp's architecture qwen3 has no bias of the attention's "
      f'output; {instead}'
    )
  if config.activation != 'silu':
    raise RequestError(
      f"{where}: llama.cpp's FFN of a LLaMA is gated by silu, not "
      f'{config.activation}; {instead}'
    )
  scaling = config.rope_scaling
  blend = scaling.fast, scaling.slow, scaling.whole
  if scaling.kind == 'yarn' and blend != _YARN_BLEND:
    raise RequestError(
      f'{where}: llama.cpp has yarn with beta_fast 32, beta_slow 1 and '
      f'truncate true only; {instead}'
    )
  for i in range(config.layers):
    groups, channels = config.widths(i)
    if not groups or not channels:
      raise RequestError(
        f'{where}: layer {i} keeps no {"group" if not groups else "channel"}; '
        'llama.cpp needs one of each in every layer, or leaves out the '
        "layer's other half too"
      )


def prepare(
  directory: pathlib.Path, config: ModelConfig, pre: str | None
) -> Vocabulary:
  """Refuses what can't be expressed, and reads the vocabulary.

  Raises:
    RequestError: see `check` and `gguf_vocabulary.read`.
  """
  check(config, directory)
  return gguf_vocabulary.read(directory, config.vocab, pre)


def warn(directory: pathlib.Path, config: ModelConfig):
  """Says early, in one line, if a pruned model could not be written.

  Args:
    directory: of the dense model.
    config: of the dense model.
  """
  try:
    check(config, directory, alike=False)
    gguf_vocabulary.read(directory, config.vocab, None)
  except RequestError as error:
    logging.warning('export --format=gguf would refuse this model: %s', error)


def write(model: Model, path: pathlib.Path, dtype: str, vocabulary: Vocabulary):
  """Writes the file.

  Args:
    model: to write.
    path: of the file.
    dtype: one of DTYPES; vectors are always F32.
    vocabulary: from `prepare`.

  Returns:
    What the user should know, a line each.

  Raises:
    RequestError: a number is more than the type can hold.
  """
  config = model.config
  alike = _alike(config)
  arch = ('qwen3' if config.qk_norm else 'llama') if alike else 'deci'
  writer = gguf.GGUFWriter(path, arch)
  notes = list(vocabulary.notes) + _add_sizes(writer, config, alike)
  writer.add_name(model.directory.resolve().name)
  writer.add_file_type(_KINDS[dtype][1])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  gguf_vocabulary.add(writer, vocabulary)
  notes += _write_tensors(writer, model, _KINDS[dtype][0])
  return notes


def _add_sizes(writer, config: ModelConfig, alike: bool) -> list[str]:
  """Everything but the vocabulary; notes on what llama.cpp leaves out."""
  widths = [config.widths(i) for i in range(config.layers)]
  groups = [k for k, _ in widths]
  heads = [k * config.heads_per_group for k in groups]
  channels = [f for _, f in widths]
  lists = heads, groups, channels
  heads, groups, channels = (x[0] for x in lists) if alike else lists
  notes, positions = [], config.max_positions
  if config.window and config.window < positions:
    positions = config.window
    notes.append(
      f'llama.cpp attends to everything: context_length is {positions}, the '
      'sliding window, up to which it is the same'
    )
  writer.add_block_count(config.layers)
  writer.add_context_length(positions)
  writer.add_embedding_length(config.width)
  writer.add_vocab_size(config.vocab)
  writer.add_head_count(heads)
  writer.add_head_count_kv(groups)
  writer.add_feed_forward_length(channels)
  writer.add_key_length(config.head_size)
  writer.add_value_length(config.head_size)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_dimension_count(config.head_size)
  writer.add_rope_freq_base(config.rope_theta)
  return notes + _add_scaling(writer, config.rope_scaling)


def _add_scaling(writer, scaling: rope.Scaling) -> list[str]:
  """Rotary positions that are stretched; llama3's are a tensor instead."""
  if scaling.kind == 'dynamic':
    return [
      'llama.cpp does not stretch positions dynamically: beyond '
      f'{scaling.trained} tokens it differs'
    ]
  if scaling.kind in ('linear', 'yarn'):
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
  if scaling.kind == 'yarn':
    writer.add_rope_scaling_orig_ctx_len(scaling.trained)
    own = gguf_model.yarn_amplitude(scaling.factor)
    writer.add_rope_scaling_attn_factors(scaling.amplitude / own)
  return []


def _tensors(model: Model):
  """(GGUF name, array) of every tensor."""
  config = model.config
  if config.rope_scaling.kind == 'llama3':
    plain = rope.frequencies(
      rope.Scaling(), config.rope_theta, config.head_size, 1
    )
    scaled = rope.frequencies(
      config.rope_scaling, config.rope_theta, config.head_size, 1
    )
    yield gguf_model.ROPE_FACTORS, plain / scaled
  names = gguf_model.gguf_names(config.layers)
  for name, value in model.tensors():
    stem, _, leaf = name.rpartition('.')
    turned = stem.endswith(('q_proj', 'k_proj')) and not config.qk_norm
    value = _permuted(value, config.head_size) if turned else value
    yield f'{names[stem]}.{leaf}', value


def _permuted(value, size: int):
  """Rows of a query or key projection in llama.cpp's order.

  It rotates neighbouring rows of a head (2i, 2i + 1), Hugging Face rows half
  a head apart (i, i + H/2).
  """
  halves = value.reshape(-1, 2, size // 2, *value.shape[1:])
  return halves.swapaxes(1, 2).reshape(value.shape)


def _kind_of(shape, kind: _Kind) -> _Kind:
  """What a tensor is stored as: vectors F32, rows that don't divide F16."""
  if len(shape) == 1:
    return _Kind.F32
  return _Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _write_tensors(writer, model, kind: _Kind) -> list[str]:
  """Writes the header, then one tensor after the other."""
  odd = 0
  for name, value in _tensors(model):
    its = _kind_of(value.shape, kind)
    odd += value.ndim > 1 and its != kind
    block, size = gguf.GGML_QUANT_SIZES[its]
    writer.add_tensor_info(
      name, value.shape, np.float32, value.size // block * size, its
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for name, value in _tensors(model):
    writer.write_tensor_data(_encoded(name, value, _kind_of(value.shape, kind)))
  writer.close()
  if not odd:
    return []
  return [
    f'{odd} tensors are F16, as their rows are no multiple of '
    f'{gguf.GGML_QUANT_SIZES[kind][0]}; prune with budget.round_ffn=32 to '
    'avoid it, or 256 for K-quants'
  ]


def _encoded(name, value, kind: _Kind) -> np.ndarray:
  with np.errstate(over='ignore'):
    out = gguf.quantize(np.ascontiguousarray(value, np.float32), kind)
  if kind == _Kind.F16 and not np.isfinite(out).all():
    raise RequestError(
      f'{name}: holds more than float16 can; use --dtype=bfloat16'
    )
  return out
