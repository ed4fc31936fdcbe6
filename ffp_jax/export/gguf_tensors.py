"""The tensors of a GGUF file: names, order of rows, types."""

from collections.abc import Iterator

import gguf
import numpy as np

from ffp_jax.checkpoints import gguf_model
from ffp_jax.checkpoints.model import Model
from ffp_jax.errors import RequestError
from ffp_jax.models import rope

Kind = gguf.GGMLQuantizationType
_FLOAT32 = np.dtype(np.float32)


def write_tensors(
  writer: gguf.GGUFWriter, model: Model, kind: Kind
) -> list[str]:
  """Writes header, metadata and tensors, and closes the file.

  Only one tensor at a time is converted, so memory holds the model once.

  Args:
    writer: with all metadata added.
    model: dense or sliced.
    kind: of matrices; vectors are always F32.

  Returns:
    What the user should know, one line each.

  Raises:
    RequestError: a number is too large for `kind`.
  """
  changed = 0  # matrices of another type
  for name, value in _tensors(model):
    stored = _kind_of(value.shape, kind)
    changed += value.ndim > 1 and stored != kind
    block, size = gguf.GGML_QUANT_SIZES[stored]
    writer.add_tensor_info(
      name, value.shape, _FLOAT32, value.size // block * size, stored
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for name, value in _tensors(model):
    writer.write_tensor_data(_encoded(name, value, _kind_of(value.shape, kind)))
  writer.close()
  if not changed:
    return []
  return [
    f'{changed} tensors are F16, as their rows are no multiple of '
    f'{gguf.GGML_QUANT_SIZES[kind][0]}; prune with budget.round_ffn=32 to '
    'avoid it, or 256 for K-quants'
  ]


def _tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (GGUF name, array) of every tensor."""
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
