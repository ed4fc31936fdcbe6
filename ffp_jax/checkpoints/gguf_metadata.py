"""The metadata of a llama.cpp GGUF file."""

import pathlib
from typing import Any

import gguf

from ffp_jax.checkpoints.stored import damaged_file_error
from ffp_jax.errors import RequestError

_ARCHITECTURES = ('llama', 'deci', 'qwen2', 'qwen3')
# llama.cpp's defaults for special tokens that a file does not name.
_SPECIAL = {'llama': {'bos': 1, 'eos': 2, 'unknown': 0}}
# Metadata that must not be above 1.
_UNSUPPORTED = ('{arch}.expert_count', 'split.count')


def open_file(path: pathlib.Path) -> gguf.GGUFReader:
  """Opens a file, which reads its metadata and the offsets of its tensors.

  Raises:
    RequestError: it is damaged, or not a whole LLaMA or Qwen.
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
  for key in _UNSUPPORTED:
    if (field(reader, key) or 0) > 1:
      raise RequestError(
        f'{path}: {key} is {field(reader, key)}; use a model in one file '
        'without experts'
      )
  return reader


def field(reader: gguf.GGUFReader, key: str) -> Any:
  """Returns a metadata value, None if it is missing.

  Args:
    reader: of the file.
    key: may contain '{arch}', which stands for the architecture.
  """
  key = _full_key(reader, key)
  return reader.fields[key].contents() if key in reader.fields else None


def special_id(reader: gguf.GGUFReader, role: str) -> int | None:
  """Returns the id of a special token, None if there is none.

  Args:
    reader: of the file.
    role: 'bos', 'eos', 'unknown' or 'padding'.
  """
  stated = field(reader, f'tokenizer.ggml.{role}_token_id')
  defaults = _SPECIAL.get(field(reader, 'tokenizer.ggml.model'), {})
  return defaults.get(role) if stated is None else stated


def _full_key(reader, key: str) -> str:
  if '{arch}' not in key:
    return key
  return key.format(arch=field(reader, 'general.architecture'))


def required_field(reader: gguf.GGUFReader, key: str) -> Any:
  """Returns a metadata value, as `field` does.

  Raises:
    RequestError: it is missing.
  """
  value = field(reader, key)
  if value is None:
    raise RequestError(
      f'{reader.data.filename}: GGUF without {_full_key(reader, key)}'
    )
  return value
