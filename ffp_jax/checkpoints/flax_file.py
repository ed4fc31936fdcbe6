"""The tensors of a flax_model.msgpack, found without reading them.

The file is nested maps down to arrays. flax.serialization would read all of
it at once; here its headers are walked, to know where every array lies.
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
# The last part of a name here and in a PyTorch checkpoint.
_LEAVES = {'kernel': 'weight', 'embedding': 'weight', 'scale': 'weight'}


def open_tensors(path: pathlib.Path) -> dict[str, Stored]:
  """Hugging Face name to tensor; kernels [in, out] appear as [out, in].

  Raises:
    RequestError: the file is truncated or damaged.
  """
  try:
    with path.open('rb') as file:
      tree, end = _value(file, 0, path)
    if not isinstance(tree, dict) or end > path.stat().st_size:
      raise ValueError('ends too early')
    return dict(_named(tree.get('params', tree), ()))
  except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
    raise damaged_file_error(path, error or type(error).__name__) from error
  except (msgpack.UnpackException, RecursionError, OSError) as error:
    raise damaged_file_error(path, error or 'ends too early') from error


def _decoder(head: bytes) -> msgpack.Unpacker:
  decoder = msgpack.Unpacker()
  decoder.feed(head)
  return decoder


def _value(file, at: int, path):
  """(dict, Stored or scalar at this offset, offset of what follows)."""
  file.seek(at)
  head = file.read(_HEAD)
  decoder, kind = _decoder(head), head[0]
  if kind >> 4 == 0x8 or kind in (0xDE, 0xDF):
    count, tree = decoder.read_map_header(), {}
    at += decoder.tell()
    for _ in range(count):
      key, at = _value(file, at, path)
      if key in tree:
        raise ValueError(f'{key!r} is there twice')
      tree[key], at = _value(file, at, path)
    return tree, at
  if kind in (0xC7, 0xC8, 0xC9):  # an extension; length of 1, 2 or 4 bytes
    width = 1 << (kind - 0xC7)
    start = 2 + width
    end = at + start + int.from_bytes(head[1 : 1 + width])
    if head[1 + width] != _NDARRAY:
      raise ValueError(f'extension type {head[1 + width]}')
    return _array(head[start:], at + start, end, path), end
  return decoder.unpack(), at + decoder.tell()


def _array(head, at, end, path) -> Stored:
  """An array that is packed as (shape, dtype name, bytes)."""
  decoder = _decoder(head)
  decoder.read_array_header()
  shape, dtype = tuple(decoder.unpack()), decoder.unpack()
  kind = head[decoder.tell()]  # of bytes; length of 1, 2 or 4 bytes
  at += decoder.tell() + 1 + (1 << (kind - 0xC4))
  size = numpy_dtype(dtype).itemsize * math.prod(shape)
  if at + size != end:
    raise ValueError(f'{end - at} bytes for an array of {size}')
  return Stored(
    shape, dtype, mapped_reader(path, at, numpy_dtype(dtype), shape)
  )


def _named(tree, path):
  """Pairs of Hugging Face name and tensor."""
  for key, value in tree.items():
    if isinstance(value, dict) and _CHUNKED in value:
      value = _joined(value)
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
    outer=len(stored.shape) - 1,
  )


def _joined(tree) -> Stored:
  """An array whose flat pieces lie one after another."""
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
