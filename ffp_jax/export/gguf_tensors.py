"""The tensors of a GGUF file: names, order of rows, types."""

from collections.abc import Iterator

import gguf
import numpy as np

from ffp_jax.checkpoints import gguf_model
from ffp_jax.checkpoints.model import Model
from ffp_jax.errors import RequestError
from ffp_jax.export import padding
from ffp_jax.models import rope
from ffp_jax.models.decoder import ModelConfig

Kind = gguf.GGMLQuantizationType
_FLOAT32 = np.dtype(np.float32)
# Of the matrix that makes the logits, which needs more bits than the others;
# llama.cpp's own tool does so too.
_HEAD_KINDS = dict.fromkeys(
  (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1), Kind.Q8_0
)


def write_tensors(
  writer: gguf.GGUFWriter, model: Model, config: ModelConfig, kind: Kind
) -> list[str]:
  """Writes header, metadata and tensors, and closes the file.

  Only one tensor at a time is converted, so memory holds the model once.

  Args:
    writer: with all metadata added.
    model: dense or sliced.
    config: of the model, or wider, see `padding.padded_tensors`.
    kind: of matrices, but see `_kind_of`.

  Returns:
    What the user should know, one line each.

  Raises:
    RequestError: a number is too large for `kind`.
  """
  changed = 0  # matrices whose rows don't fill blocks
  head = 'token_embd.weight' if config.tied else 'output.weight'

  def kind_of(name, value):
    wanted = _HEAD_KINDS.get(kind, kind) if name == head else kind
    return _kind_of(value.shape, wanted)

  for name, value in _tensors(model, config):
    stored = kind_of(name, value)
    changed += stored == Kind.F16 != kind
    block, size = gguf.GGML_QUANT_SIZES[stored]
    writer.add_tensor_info(
      name, value.shape, _FLOAT32, value.size // block * size, stored
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for name, value in _tensors(model, config):
    writer.write_tensor_data(_encoded(name, value, kind_of(name, value)))
  writer.close()
  if not changed:
    return []
  return [
    f'{changed} tensors are F16, as their rows are no multiple of '
    f'{gguf.GGML_QUANT_SIZES[kind][0]}'
  ]


def _tensors(
  model: Model, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (GGUF name, array) of every tensor."""
  if config.rope_scaling.kind == 'llama3':
    plain = rope.frequencies(
      rope.Scaling(), config.rope_theta, config.head_size, 1
    )
    scaled = rope.frequencies(
      config.rope_scaling, config.rope_theta, config.head_size, 1
    )
    yield gguf_model.ROPE_FACTORS, plain / scaled
  names = gguf_model.gguf_names(config.layers)
  # llama.cpp knows no norm before attention without heads.
  no_heads = [i for i in range(config.layers) if not config.widths(i)[0]]
  unknown = {f'blk.{i}.attn_norm' for i in no_heads}
  for name, value in padding.padded_tensors(model, config):
    stem, _, leaf = name.rpartition('.')
    if names[stem] in unknown:
      continue
    if stem.endswith(('q_proj', 'k_proj')) and not config.qk_norm:
      value = _permuted(value, config.head_size)
    yield f'{names[stem]}.{leaf}', value


def _permuted(value: np.ndarray, head_size: int) -> np.ndarray:
  """Returns a query or key projection with its rows in llama.cpp's order.

  For architectures 'llama' and 'deci' llama.cpp rotates rows 2i and 2i + 1 of
  a head together, Hugging Face rows i and i + H/2.
  """
  halves = value.reshape(-1, 2, head_size // 2, *value.shape[1:])
  return halves.swapaxes(1, 2).reshape(value.shape)


def _kind_of(shape: tuple[int, ...], kind: Kind) -> Kind:
  """Returns the type that a tensor is stored in.

  It is F32 for vectors, F16 for rows that are no multiple of the type's block
  size, else `kind`.
  """
  if len(shape) == 1:
    return Kind.F32
  return Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _encoded(name: str, value: np.ndarray, kind: Kind) -> np.ndarray:
  """Returns the bytes or numbers of a tensor; refuses an overflow."""
  with np.errstate(over='ignore'):
    out = gguf.quantize(np.ascontiguousarray(value, np.float32), kind)
  if kind == Kind.F16 and not np.isfinite(out).all():
    raise RequestError(
      f'{name}: holds more than float16 can; use --dtype=bfloat16'
    )
  return out
