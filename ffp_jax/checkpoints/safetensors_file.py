"""Lazy access to the tensors of a .safetensors file."""

import json
import math
import pathlib

import safetensors

from ffp_jax.checkpoints.stored import (
  Stored,
  damaged_file_error,
  mapped_reader,
  numpy_dtype,
  refuse_to_read,
  reject_duplicate_keys,
)

_DTYPES = {
  'F16': 'float16',
  'BF16': 'bfloat16',
  'F32': 'float32',
  'F64': 'float64',
}


def open_tensors(path: pathlib.Path) -> dict[str, Stored]:
  """Returns the tensors by name, without reading them.

  Raises:
    RequestError: the file is truncated or damaged.
  """
  try:
    with safetensors.safe_open(path, framework='np'):
      pass  # the library checks the header against the file
    with path.open('rb') as file:
      size = int.from_bytes(file.read(8), 'little')
      header = json.loads(
        file.read(size), object_pairs_hook=reject_duplicate_keys
      )
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise damaged_file_error(path, error) from error
  header.pop('__metadata__', None)
  return {
    name: _tensor(path, 8 + size, entry) for name, entry in header.items()
  }


def _tensor(path, start, entry) -> Stored:
  """Describes the tensor of a header's entry; its data begin at `start`."""
  shape, dtype = tuple(entry['shape']), entry['dtype']
  if dtype not in _DTYPES or not math.prod(shape):
    return Stored(shape, dtype, refuse_to_read)
  dtype = _DTYPES[dtype]
  offset = start + entry['data_offsets'][0]
  return Stored(
    shape, dtype, mapped_reader(path, offset, numpy_dtype(dtype), shape)
  )
