"""A checkpoint as a mapping: tensor name to where and how to read it."""

import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ffp_jax.config import RequestError

FLOATS = ('float16', 'bfloat16', 'float32')
# Weight files, or what the names of their shards start with, the best first.
FORMATS = ('model.safetensors', 'flax_model.msgpack', 'pytorch_model.bin')


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


def region(path: pathlib.Path, offset: int, dtype, shape):
  """A `read` of an array that lies in a file as it is, in C order.

  The file is mapped anew for every read, so that a page that was read does
  not stay in memory for as long as the model loads.
  """

  def read(index):
    return np.memmap(path, dtype, 'r', offset, shape)[index]

  return read


def fresh(path: pathlib.Path, problem) -> RequestError:
  """The error of a file that is damaged."""
  line = ' '.join(str(problem).split())
  return RequestError(f'{path}: truncated or damaged ({line}); fetch it again')


def unique(pairs: list[tuple]) -> dict:
  """A JSON object; refuses a key that is there twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in found if keys.count(key) > 1)
    raise ValueError(f'{twice!r} is there twice')
  return found


def weight_files(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The files of one format: `name`, or the shards that its index names.

  Raises:
    RequestError: the index is broken, or names a file outside `directory`.
  """
  index = directory / f'{name}.index.json'
  if not index.exists():
    return [directory / name] if (directory / name).exists() else []
  try:
    content = json.loads(index.read_bytes(), object_pairs_hook=unique)
    names = sorted(set(content['weight_map'].values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise RequestError(f'{index}: not an index ({error})') from error
  return [_inside(directory, shard, index) for shard in names]


def _inside(directory, name, index) -> pathlib.Path:
  """A shard's path, nowhere but in the directory or the hub's own cache."""
  home = directory.resolve()
  roots = [home]
  if home.parent.name == 'snapshots':
    roots.append(home.parents[1] / 'blobs')  # what a snapshot links to
  path = directory / str(name)
  plain = isinstance(name, str) and pathlib.PurePath(name).name == name
  if not plain or path.resolve().parent not in roots:
    raise RequestError(
      f'{index}: names {name!r}, which is outside the directory; '
      'do not use this checkpoint, or put the file there'
    )
  if not path.exists():
    raise RequestError(f'{path}: missing; fetch the model again')
  return path
