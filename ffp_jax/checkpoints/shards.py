"""Reading of the shards of a parameter from the tensors of a checkpoint."""

import itertools
import math
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from ffp_jax.checkpoints import stored
from ffp_jax.checkpoints.stored import Stored
from ffp_jax.errors import RequestError
from ffp_jax.models.tensor_names import Tensor

_PIECE = 1 << 20  # numbers read at once: fits the cache, needs little memory


def shard_reader(
  tensors: Mapping[str, Stored],
  parts: Mapping[int | None, tuple[Tensor, tuple[int, ...]]],
  spec: jax.ShapeDtypeStruct,
  directory: pathlib.Path,
) -> Callable[..., np.ndarray]:
  """Returns a function that reads a shard, given its index in the parameter.

  Args:
    tensors: by name.
    parts: by layer of the stack, or None if the parameter is not stacked: the
      tensor, and the shape that it has in the decoder. Empty for a parameter
      without numbers.
    spec: shape and dtype of the whole parameter.
    directory: for messages.

  Returns:
    The function, for `jax.make_array_from_callback`. It raises RequestError
    if a file has changed or a value is not finite.
  """
  shards = {}  # so that replicas on several devices are read once

  def read(index):
    bounds = tuple(
      x.indices(n)[:2] for x, n in zip(index, spec.shape, strict=True)
    )
    if bounds in shards:
      return shards[bounds]
    out = _aligned([stop - start for start, stop in bounds], spec.dtype)
    if not parts:  # of a parameter without numbers
      return out
    if None in parts:
      _fill(out, tensors, *parts[None], bounds, directory)
    else:
      for row, layer in zip(out, range(*bounds[0]), strict=True):
        _fill(row, tensors, *parts[layer], bounds[1:], directory)
    shards[bounds] = out
    return out

  return read


def _aligned(shape, dtype) -> np.ndarray:
  """Returns an empty array at 64 bytes, which XLA takes without a copy."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 63, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def _axes(tensor: Tensor, ndim: int, stored_ndim: int) -> list[tuple]:
  """Returns the axes of a parameter that form each axis of the tensor."""
  if stored_ndim == 1:
    return [tuple(range(ndim))]
  if not tensor.inputs:
    return [(axis,) for axis in range(ndim)]
  split = ndim - 1 if tensor.inputs == 3 else tensor.inputs
  return [tuple(range(split, ndim)), tuple(range(split))]


def _fill(out, tensors, tensor, shape, bounds, directory):
  """Reads a part of a tensor into `out`, piece by piece.

  Args:
    out: view to write to.
    tensors: by name.
    tensor: to read.
    shape: of the tensor in the decoder.
    bounds: (start, stop) of the part for each axis of `shape`.
    directory: for messages.
  """
  source = tensors[tensor.name]
  axes = _axes(tensor, len(shape), len(source.shape))
  lead = _lead(axes[source.outer_axis], shape)
  start, stop = bounds[lead]
  step = max(1, _PIECE * (stop - start) // max(1, out.size))
  for first in range(start, stop, step):
    last = min(first + step, stop)
    piece = (*bounds[:lead], (first, last), *bounds[lead + 1 :])
    target = (slice(None),) * lead + (slice(first - start, last - start),)
    try:
      with np.errstate(over='ignore'):
        value = _read_piece(source, axes, shape, piece).astype(out.dtype)
    except (OSError, ValueError) as error:  # the file has changed
      raise stored.damaged_file_error(
        directory, f'{tensor.name}: {error}'
      ) from error
    if not np.isfinite(value).all():
      raise RequestError(
        f'{directory}: tensor {tensor.name} holds NaN, or more than '
        f'{out.dtype.name} can hold; use another checkpoint or dtype'
      )
    out[target] = value


def _lead(axes, shape) -> int:
  """Returns the first of these axes whose size is not 1."""
  return next((axis for axis in axes if shape[axis] > 1), axes[0])


def _read_piece(source, axes, shape, bounds) -> np.ndarray:
  """Reads a part of a tensor, with the axes of the decoder.

  Of several axes that are one axis in the file, only the first is sliced in
  the file, and the others after reading.
  """
  index, sizes, inner = [], [], []
  for group in axes:
    lead = _lead(group, shape)
    row = math.prod(shape[lead + 1 : group[-1] + 1])
    index.append(slice(bounds[lead][0] * row, bounds[lead][1] * row))
    for axis in group:
      first, last = bounds[axis]
      sizes.append(last - first if axis == lead else shape[axis])
      inner.append(slice(None) if axis == lead else slice(first, last))
  value = source.read(tuple(index)).reshape(sizes)[tuple(inner)]
  return value.transpose(np.argsort(list(itertools.chain(*axes))))
