"""A checkpoint as a mapping from names to tensors that are read on demand."""

import importlib.util
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ffp_jax.errors import RequestError
from ffp_jax.runtime.storage import LFS_POINTER

FLOATS = ('float16', 'bfloat16', 'float32', 'float64')
# Names of whole weight files in order of preference; the index of shards has
# the same name with '.index.json' after it.
FORMATS = ('model.safetensors', 'pytorch_model.bin', 'flax_model.msgpack')
_PIECE = 1 << 20  # numbers compared at once


def formats() -> tuple[str, ...]:
  """Returns FORMATS, those that need a missing library last."""
  best, torch, flax = FORMATS
  installed = importlib.util.find_spec('torch') is not None
  return FORMATS if installed else (best, flax, torch)


class Stored(NamedTuple):
  """Describes a tensor in a file, and how to read it."""

  shape: tuple[int, ...]
  dtype: str  # one of FLOATS, or the file's name of a type that is not read
  # Returns a part of the tensor, given one slice per axis with start and stop.
  read: Callable[[tuple[slice, ...]], np.ndarray]
  outer_axis: int = 0  # the axis that varies slowest in the file


def refuse_to_read(index: tuple[slice, ...]) -> np.ndarray:
  """Stands in for `Stored.read` of a tensor whose dtype is not in FLOATS."""
  raise TypeError(f'a tensor that is no float has no part {index}')


def numpy_dtype(name: str) -> np.dtype:
  """Returns the NumPy dtype of one of FLOATS."""
  return np.dtype(getattr(ml_dtypes, name, name))


def lookup(tensors: Mapping[str, Stored], name: str) -> Stored | None:
  """Finds a tensor by the name that it has in a whole model.

  As in transformers, names in a checkpoint may lack their first 'model.', as
  those of a bare decoder do, or have one more.

  Args:
    tensors: of the checkpoint, by name.
    name: Hugging Face name.
  """
  names = name, name.removeprefix('model.'), f'model.{name}'
  return next((tensors[x] for x in names if x in tensors), None)


def equal(a: Stored, b: Stored) -> bool:
  """Returns whether two matrices hold the same numbers, reading in pieces."""
  if a.shape != b.shape or not {a.dtype, b.dtype} <= {*FLOATS}:
    return False
  rows = max(1, _PIECE // max(1, math.prod(a.shape[1:])))
  rest = tuple(slice(0, n) for n in a.shape[1:])
  pieces = (
    (slice(start, min(start + rows, a.shape[0])), *rest)
    for start in range(0, a.shape[0], rows)
  )
  return all(
    np.array_equal(a.read(x).astype(np.float64), b.read(x).astype(np.float64))
    for x in pieces
  )


def some(names: list[str]) -> str:
  """Returns names with commas between them, the fifth and later as a count."""
  more = [f'{len(names) - 4} more'] if len(names) > 4 else []
  return ', '.join(names[:4] + more)


def mapped_reader(
  path: pathlib.Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]
) -> Callable[[tuple[slice, ...]], np.ndarray]:
  """Returns the `Stored.read` of an array that is stored in C order.

  The file is mapped anew for every read, so that pages that were read do not
  stay in memory while the rest of the model is loaded.

  Args:
    path: of the file.
    offset: of the array in bytes.
    dtype: of the array.
    shape: of the array.
  """

  def read(index):
    return np.memmap(path, dtype, 'r', offset, shape)[index]

  return read


def damaged_file_error(
  path: pathlib.Path, problem: str | Exception
) -> RequestError:
  """Returns the error for a file that is damaged, or a pointer of Git LFS."""
  if path.is_file():
    with path.open('rb') as file:
      if file.read(len(LFS_POINTER)) == LFS_POINTER:
        return RequestError(f'{path}: a pointer of Git LFS; run git lfs pull')
  line = ' '.join(str(problem).split())
  return RequestError(f'{path}: truncated or damaged ({line}); fetch it again')


def reject_duplicate_keys(pairs: list[tuple]) -> dict:
  """Returns a JSON object, for `object_pairs_hook` of `json.loads`.

  Raises:
    ValueError: a key occurs twice.
  """
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in found if keys.count(key) > 1)
    raise ValueError(f'{twice!r} is there twice')
  return found


def weight_files(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Returns the files of one format: `name`, or the shards of its index.

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
  """Returns a shard's path, which may be a link, but must be in `directory`."""
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
