"""Export of a model as one GGUF file that unpatched llama.cpp loads.

llama.cpp's architecture 'deci' (made for DeciLM and Nemotron,
src/models/deci.cpp) has layers of different widths; otherwise its graph is
that of 'llama': biases, rotary positions and a SiLU-gated FFN. Models whose
layers have equal widths are written as 'llama', or as 'qwen3' if queries and
keys are normalised.
"""

import dataclasses
import pathlib

import gguf
from absl import logging

from ffp_jax.checkpoints import gguf_model
from ffp_jax.checkpoints.model import Model
from ffp_jax.errors import RequestError
from ffp_jax.export import gguf_tensors, gguf_vocabulary, padding
from ffp_jax.export.gguf_tensors import Kind
from ffp_jax.export.gguf_vocabulary import Vocabulary
from ffp_jax.models import rope
from ffp_jax.models.decoder import ModelConfig

_KINDS = {
  'float32': (Kind.F32, gguf.LlamaFileType.ALL_F32),
  'float16': (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
  'bfloat16': (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
  'q8_0': (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
  'q5_1': (Kind.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
  'q5_0': (Kind.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
  'q4_1': (Kind.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
  'q4_0': (Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# llama.cpp has no metadata for other values of fast, slow and whole.
_YARN_BLEND = (32.0, 1.0, True)
DTYPES = tuple(_KINDS)


def _widths(config: ModelConfig) -> list[tuple[int, int]]:
  """Returns the groups and the channels of every layer."""
  return [config.widths(i) for i in range(config.layers)]


def _alike(config: ModelConfig) -> bool:
  """Returns whether all layers have the same widths."""
  return len({*_widths(config)}) == 1


def check(
  config: ModelConfig,
  where: pathlib.Path | str,
  alike: bool | None = None,
):
  """Refuses models that llama.cpp has no graph for.

  Args:
    config: of the model.
    where: what error messages begin with.
    alike: whether all layers will have the same widths when the file is
      written; None for those that `config` has.

  Raises:
    RequestError: names what is not supported, and the layer if it is one.
  """
  instead = 'use --format=hf or hf_dense'
  alike = _alike(_with_units(config)) if alike is None else alike
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


def prepare(
  directory: pathlib.Path, config: ModelConfig, pre: str | None
) -> Vocabulary:
  """Checks that the model can be written, and reads its vocabulary.

  Args:
    directory: of the model.
    config: of the model.
    pre: llama.cpp's name of the pre-tokenizer, None to recognise it.

  Raises:
    RequestError: see `check` and `gguf_vocabulary.read`.
  """
  check(config, directory)
  return gguf_vocabulary.read(directory, config.vocab, pre)


def warn(directory: pathlib.Path, config: ModelConfig):
  """Logs one warning if the model, once pruned, could not be written.

  Args:
    directory: of the dense model.
    config: of the dense model.
  """
  try:
    check(config, directory, alike=False)
    gguf_vocabulary.read(directory, config.vocab, None)
  except RequestError as error:
    logging.warning('export --format=gguf would refuse this model: %s', error)


def write(
  model: Model, path: pathlib.Path, dtype: str, vocabulary: Vocabulary
) -> list[str]:
  """Writes a GGUF file.

  Args:
    model: dense or sliced.
    path: of the file.
    dtype: of matrices, one of DTYPES; vectors are always F32.
    vocabulary: from `prepare`.

  Returns:
    What the user should know, one line each.

  Raises:
    RequestError: a number is too large for `dtype`.
  """
  kind, file_type = _KINDS[dtype]
  # Rows of channels fill the blocks of a quantised type.
  block, _ = gguf.GGML_QUANT_SIZES[kind]
  config = padding.round_channels(_with_units(model.config), block)
  alike = _alike(config)
  arch = ('qwen3' if config.qk_norm else 'llama') if alike else 'deci'
  writer = gguf.GGUFWriter(path, arch)
  notes = list(vocabulary.notes) + _add_sizes(writer, config, alike)
  writer.add_name(model.directory.resolve().name)
  writer.add_file_type(file_type)
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  gguf_vocabulary.add(writer, vocabulary)
  if any(channels % block for _, channels in _widths(model.config)):
    notes.append(
      f'FFN channels of zeros fill each layer up to a multiple of {block}, as '
      f'{dtype} needs; prune with budget.round_ffn={block} to have none'
    )
  notes += padding.notes(model.config, config, 'llama.cpp')
  return notes + gguf_tensors.write_tensors(writer, model, config, kind)


def _with_units(config: ModelConfig) -> ModelConfig:
  """Returns a config with units where llama.cpp can't do without one.

  Where a layer has no FFN it leaves out the attention too, and where it has no
  heads the bias of their output. The first layer tells the size of a head.
  """
  config = padding.with_units(config, groups=int(config.out_bias))
  if not config.kept_groups:
    return config
  first, *others = config.kept_groups
  return dataclasses.replace(config, kept_groups=(max(1, first), *others))


def _add_sizes(
  writer: gguf.GGUFWriter, config: ModelConfig, alike: bool
) -> list[str]:
  """Adds the model's metadata; returns notes on what llama.cpp leaves out."""
  widths = _widths(config)
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


def _add_scaling(writer: gguf.GGUFWriter, scaling: rope.Scaling) -> list[str]:
  """Adds metadata of scaled rotary positions; returns notes on them.

  Those of kind 'llama3' are stored as a tensor instead.
  """
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
    implied = gguf_model.yarn_amplitude(scaling.factor)
    writer.add_rope_scaling_attn_factors(scaling.amplitude / implied)
  return []
