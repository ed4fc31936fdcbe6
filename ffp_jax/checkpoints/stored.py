"""A checkpoint as a mapping: tensor name to where and how to read it."""

import importlib.util
import json
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ffp_jax.errors import RequestError

FLOATS = ('float16', 'bfloat16', 'float32', 'float64')
# Whole weight files, the first that is there is read; sharded, they have an
# index of the same name.
FORMATS = ('model.safetensors', 'pytorch_model.bin', 'flax_model.msgpack')
_POINTER = b'version https://git-lfs'
_PIECE = 1 << 20  # numbers compared at once


def formats() -> tuple[str, ...]:
  """FORMATS in the order in which they can be read here."""
  best, torch, flax = FORMATS
  installed = importlib.util.find_spec('torch') is not None
  return FORMATS if installed else (best, flax, torch)


class Stored(NamedTuple):
  """A tensor in a file, not read yet."""

  shape: tuple[int, ...]
  dtype: str  # one of FLOATS, or the file's own name of what can't be read
  # (one slice with start and stop an axis) -> that part of the tensor
  read: Callable[[tuple[slice, ...]], np.ndarray]
  outer: int = 0  # the axis that is outermost in the file


def numpy_dtype(name: str) -> np.dtype:
  """The numpy dtype of one of FLOATS."""
  return np.dtype(getattr(ml_dtypes, name, name))


def lookup(where: dict[str, Stored], name: str) -> Stored | None:
  """A tensor by the name that it has in a whole model.

  As in transformers, a checkpoint may lack the first 'model.' of names, as
  that of a bare decoder does, or have one more.
  """
  names = name, name.removeprefix('model.'), f'model.{name}'
  return next((where[x] for x in names if x in where), None)


def equal(a: Stored, b: Stored) -> bool:
  """Whether two matrices hold the same numbers, read piece by piece."""
  if a.shape != b.shape or not {a.dtype, b.dtype} <= {*FLOATS}:
    return False
  rows = max(1, _PIECE // max(1, math.prod(a.shape[1:])))
  rest = tuple(slice(0, n) for n in a.shape[1:])
  pieces = (
    (slice(at, min(at + rows, a.shape[0])), *rest)
    for at in range(0, a.shape[0], rows)
  )
  return all(
    np.array_equal(a.read(x).astype(np.float64), b.read(x).astype(np.float64))
    for x in pieces
  )


def some(names: list[str]) -> str:
  """A list of names for a message, cut where it gets long."""
  more = [f'{len(names) - 4} more'] if len(names) > 4 else []
  return ', '.join(names[:4] + more)


def mapped_reader(path: pathlib.Path, offset: int, dtype, shape):
  """A `read` of an array that lies in a file as it is, in C order.

  The file is mapped anew for every read, so that a page that was read does
  not stay in memory for as long as the model loads.
  """

  def read(index):
    return np.memmap(path, dtype, 'r', offset, shape)[index]

  return read


def damaged_file_error(path: pathlib.Path, problem) -> RequestError:
  """The error of a file that is damaged."""
  if path.is_file():
    with path.open('rb') as file:
      if file.read(len(_POINTER)) == _POINTER:
        return RequestError(f'{path}: a pointer of Git LFS; run git lfs pull')
  line = ' '.join(str(problem).split())
  return RequestError(f'{path}: truncated or damaged ({line}); fetch it again')


def reject_duplicate_keys(pairs: list[tuple]) -> dict:
  """A JSON object; refuses a key that is there twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in found if keys.count(key) > 1)
    raise ValueError(f'{twice!r} is there twice')
  return found


def weight_files(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The files of one format: `name`, else the shards that its index names.

  Raises:
    RequestError: the index is broken, or names a file outside `directory` or
      one that is missing.
  """
  if (directory / name).is_file():
    return [directory / name]
  index = directory / f'{name}.index.json'
  if not index.is_file():
    return []
  try:
    content = json.loads(
      index.read_bytes(), object_pairs_hook=reject_duplicate_keys
    )
    names = sorted(set(content['weight_map'].values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise RequestError(f'{index}: not an index ({error})') from error
  if not names:
    raise RequestError(f'{index}: names no file; fetch the model again')
  return [_shard(directory, shard, index) for shard in names]


def _shard(directory, name, index) -> pathlib.Path:
  """A shard's path; as any file here, it may link to where it will."""
  parts = pathlib.PurePath(name).parts if isinstance(name, str) else ()
  if not parts or '..' in parts or pathlib.PurePath(name).is_absolute():
    raise RequestError(
      f'{index}: names {name!r}, which is no file in the directory; '
      'do not use this checkpoint, or put the file there'
    )
  path = directory / name
  if not path.is_file():
    link = f' (a link to {path.readlink()})' if path.is_symlink() else ''
    raise RequestError(f'{path}: missing{link}; fetch the model again')
  return path
