"""Lazy access to the tensors of a flax_model.msgpack.

The file consists of nested maps of arrays. flax.serialization reads all of it
at once; this module parses only its headers, to find the offset of each array.
"""

import math
import pathlib

import msgpack
import numpy as np

from ffp_jax.checkpoints.stored import (
  Stored,
  damaged_file_error,
  mapped_reader,
  numpy_dtype,
)

_NDARRAY = 1  # extension type of flax.serialization
_CHUNKED = '__msgpack_chunked_array__'  # how it stores more than 1 GiB
_HEAD = 4096  # longer than any header
# The last part of a name in Flax, and in a PyTorch checkpoint.
_LEAVES = {'kernel': 'weight', 'embedding': 'weight', 'scale': 'weight'}


def open_tensors(path: pathlib.Path) -> dict[str, Stored]:
  """Returns tensors by Hugging Face name, without reading them.

  Kernels [in, out] are transposed to [out, in].

  Raises:
    RequestError: the file is truncated or damaged.
  """
  try:
    with path.open('rb') as file:
      tree, end = _parse(file, 0, path)
    if not isinstance(tree, dict) or end > path.stat().st_size:
      raise ValueError('ends too early')
    return dict(_named(tree.get('params', tree), ()))
  except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
    raise damaged_file_error(path, error or type(error).__name__) from error
  except (msgpack.UnpackException, RecursionError, OSError) as error:
    raise damaged_file_error(path, error or 'ends too early') from error


def _unpacker(head: bytes) -> msgpack.Unpacker:
  unpacker = msgpack.Unpacker()
  unpacker.feed(head)
  return unpacker


def _parse(file, offset: int, path):
  """Parses the value at an offset, without reading arrays.

  Returns:
    (dict, Stored or scalar; offset of the next value).
  """
  file.seek(offset)
  head = file.read(_HEAD)
  unpacker, kind = _unpacker(head), head[0]
  if kind >> 4 == 0x8 or kind in (0xDE, 0xDF):
    count, tree = unpacker.read_map_header(), {}
    offset += unpacker.tell()
    for _ in range(count):
      key, offset = _parse(file, offset, path)
      if key in tree:
        raise ValueError(f'{key!r} is there twice')
      tree[key], offset = _parse(file, offset, path)
    return tree, offset
  if kind in (0xC7, 0xC8, 0xC9):  # an extension; length of 1, 2 or 4 bytes
    width = 1 << (kind - 0xC7)
    start = 2 + width
    end = offset + start + int.from_bytes(head[1 : 1 + width])
    if head[1 + width] != _NDARRAY:
      raise ValueError(f'extension type {head[1 + width]}')
    return _parse_array(head[start:], offset + start, end, path), end
  return unpacker.unpack(), offset + unpacker.tell()


def _parse_array(head, offset, end, path) -> Stored:
  """Parses an array, which is packed as (shape, dtype name, bytes)."""
  unpacker = _unpacker(head)
  unpacker.read_array_header()
  shape, dtype = tuple(unpacker.unpack()), unpacker.unpack()
  kind = head[unpacker.tell()]  # of bytes; length of 1, 2 or 4 bytes
  offset += unpacker.tell() + 1 + (1 << (kind - 0xC4))
  size = numpy_dtype(dtype).itemsize * math.prod(shape)
  if offset + size != end:
    raise ValueError(f'{end - offset} bytes for an array of {size}')
  return Stored(
    shape, dtype, mapped_reader(path, offset, numpy_dtype(dtype), shape)
  )


def _named(tree, path):
  """Yields pairs of Hugging Face name and tensor."""
  for key, value in tree.items():
    if isinstance(value, dict) and _CHUNKED in value:
      value = _join_chunks(value)
    if isinstance(value, dict):
      yield from _named(value, (*path, key))
    elif isinstance(value, Stored):
      name = '.'.join((*path, _LEAVES.get(key, key)))
      yield name, _transposed(value) if key == 'kernel' else value


def _transposed(stored: Stored) -> Stored:
  return Stored(
    stored.shape[::-1],
    stored.dtype,
    lambda index: stored.read(index[::-1]).T,
    outer_axis=len(stored.shape) - 1,
  )


def _join_chunks(tree) -> Stored:
  """Returns the array that is stored as flat chunks."""
  shape = tuple(tree['shape'][str(i)] for i in range(len(tree['shape'])))
  parts = [tree['chunks'][str(i)] for i in range(len(tree['chunks']))]
  ends = np.cumsum([part.shape[0] for part in parts]).tolist()
  if ends[-1] != math.prod(shape):
    raise ValueError(f'{ends[-1]} numbers in an array of shape {shape}')
  row = math.prod(shape[1:])

  def read(index):
    first, last = index[0].start * row, index[0].stop * row
    pieces = [
      part.read((slice(max(first - start, 0), min(last, end) - start),))
      for part, start, end in zip(parts, [0, *ends], ends, strict=False)
      if start < last and end > first
    ]
    rows = np.concatenate(pieces).reshape(-1, *shape[1:])
    return rows[(slice(None), *index[1:])]

  return Stored(shape, parts[0].dtype, read)
