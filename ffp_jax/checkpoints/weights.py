"""Checkpoint files to the decoder's parameters, and back."""

import collections
import itertools
import math
import pathlib

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from ffp_jax.checkpoints import directory as directories
from ffp_jax.checkpoints import model_config, orbax_tree, stored
from ffp_jax.checkpoints.stored import Stored
from ffp_jax.errors import RequestError
from ffp_jax.models import families
from ffp_jax.models.config import ModelConfig
from ffp_jax.runtime import sharding

_PIECE = 1 << 20  # numbers read at once: little memory, near the cache


def _from_orbax(directory, config, family) -> dict[str, Stored]:
  """Name to tensor of an orbax checkpoint, read whole."""
  params = orbax_tree.read_params(directory)
  try:
    return {
      name: Stored(value.shape, value.dtype.name, value.__getitem__)
      for name, value in named_tensors(params, config, family)
    }
  except (KeyError, ValueError, AttributeError) as error:
    raise RequestError(
      f'{directory}: its parameters are not those of config.json ({error})'
    ) from error


def _checked(where, wanted, tied, directory) -> dict[str, Stored]:
  """The tensors that are wanted, under the names they are wanted by."""
  found = {}
  for tensor, path, _, shape in wanted:
    name = tensor.name
    value = stored.lookup(where, name)
    if value is None and tied and path == families.EMBED:
      value = stored.lookup(where, families.HEAD_NAME)  # which is the same then
    if value is None:
      raise RequestError(
        f'{directory}: tensor {name} is missing{_advice(where, name)}'
      )
    expected = families.stored_shape(tensor, shape)
    if value.shape != expected:
      raise RequestError(
        f'{directory}: tensor {name} has shape {value.shape}, '
        f'config.json asks for {expected}'
      )
    if value.dtype not in stored.FLOATS:
      raise RequestError(
        f'{directory}: tensor {name} is stored as {value.dtype}, not as one '
        f'of {", ".join(stored.FLOATS)}; use the model it was quantised from, '
        'or save it from transformers in one of these'
      )
    found[name] = value
  return found


def _advice(where, name: str) -> str:
  """Why a tensor may be missing, and what helps, as the end of a line."""
  if any('.lora_' in x or '.base_layer.' in x for x in where):
    return '; merge the adapter into the model first (PEFT: merge_and_unload)'
  stem = name.removesuffix('weight')
  if parts := [x for x in where if x.startswith(stem) and x != f'{stem}bias']:
    return (
      f', but there is {stored.some(parts)}: the weights are quantised or '
      'compressed; use the model they were made from'
    )
  inner = name.removeprefix('model.')
  if other := next((x for x in where if x.endswith(f'.{inner}')), None):
    prefix = other.removesuffix(inner).removesuffix('model.')
    return (
      f', but there is {other}: every name starts with {prefix!r}, as a '
      'wrapper saves it (DataParallel, torch.compile, PEFT); save the model '
      'inside the wrapper, or rename the tensors'
    )
  if name == families.HEAD_NAME:
    return (
      '; use a complete checkpoint, or, if the model is one whose head is its '
      'embedding, set tie_word_embeddings to true in config.json'
    )
  return '; use a checkpoint that goes with config.json'


def check_files(directory: pathlib.Path, config: ModelConfig, dtype):
  """Opens a model's weights and compares names and shapes, reading none.

  Returns:
    (name to `Stored` of each tensor that `families.list_tensors` yields, what
    that yields).

  Raises:
    RequestError: a file or tensor is missing, damaged, twice there, of a
      wrong shape or of a type that is no float; or an index leads outside.
  """
  family = model_config.read_config_json(directory)['model_type']
  checkpoint = directories.find_checkpoint(directory)
  if checkpoint is None:
    raise directories.missing_error(directory)
  if checkpoint.kind == 'orbax':
    where = _from_orbax(directory, config, family)
  else:
    where = directories.open_tensors(checkpoint)
  wanted = list(families.list_tensors(config, family, dtype))
  return _checked(where, wanted, config.tied, directory), wanted


def main_dtype(where: dict[str, Stored], wanted) -> np.dtype:
  """The dtype of most numbers of a checkpoint; takes `check_files`' return.

  Float64 counts as float32, which is the most that JAX computes in here.
  """
  numbers = collections.Counter()
  for tensor, *_ in wanted:
    found = where[tensor.name]
    numbers[found.dtype] += math.prod(found.shape)
  name = numbers.most_common(1)[0][0]
  return stored.numpy_dtype('float32' if name == 'float64' else name)


def load_params(
  directory: pathlib.Path, config: ModelConfig, dtype, shardings=None
) -> dict:
  """The decoder's parameters, each shard read straight into place.

  Only what the devices of this process need is read, and beside it some
  megabytes of the file at a time. On CPU the arrays are the memory that was
  read into, not a copy.

  Args:
    directory: a model directory in one of the formats above, or GGUF.
    config: from `model_config`.
    dtype: of the parameters.
    shardings: pytree like the parameters of `jax.sharding.Sharding`; None
      for those of `sharding.param_shardings` on the mesh that is set.

  Returns:
    The nested 'params' dict of jax arrays.

  Raises:
    RequestError: see `check_files`, found before any tensor is read; or a
      tensor holds what is not finite, found as it is read.
  """
  where, wanted = check_files(directory, config, dtype)
  shapes = families.param_shapes(config, dtype)
  shardings = flax.traverse_util.flatten_dict(
    shardings or sharding.param_shardings(shapes)
  )
  specs = flax.traverse_util.flatten_dict(shapes)
  parts = {path: {} for path in specs}
  for tensor, path, i, shape in wanted:
    parts[path][i] = tensor, shape
  flat = {}
  for path, spec in specs.items():
    read = _reader(where, parts[path], spec, directory)
    flat[path] = jax.make_array_from_callback(
      spec.shape, shardings[path], read, dtype=spec.dtype
    )
  return flax.traverse_util.unflatten_dict(flat)


def _reader(where, parts, spec, directory):
  """Function from a shard's index to its numbers.

  Args:
    where: name to `Stored`.
    parts: layer, or None where there is only one, to (Tensor, shape).
    spec: shape and dtype of the whole parameter.
    directory: for messages.
  """
  shards = {}  # copies of a shard, on several devices, are read once

  def read(index):
    bounds = tuple(
      x.indices(n)[:2] for x, n in zip(index, spec.shape, strict=True)
    )
    if bounds in shards:
      return shards[bounds]
    out = _aligned([stop - start for start, stop in bounds], spec.dtype)
    if None in parts:
      _fill(out, where, *parts[None], bounds, directory)
    else:
      for row, layer in zip(out, range(*bounds[0]), strict=True):
        _fill(row, where, *parts[layer], bounds[1:], directory)
    shards[bounds] = out
    return out

  return read


def _aligned(shape, dtype) -> np.ndarray:
  """An empty array where XLA wants its own, so that it takes it uncopied."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 63, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def _axes(tensor: families.Tensor, ndim: int, stored_ndim: int) -> list[tuple]:
  """The axes of a parameter that make up each axis of the stored tensor."""
  if stored_ndim == 1:
    return [tuple(range(ndim))]
  if not tensor.inputs:
    return [(axis,) for axis in range(ndim)]
  split = ndim - 1 if tensor.inputs == 3 else tensor.inputs
  return [tuple(range(split, ndim)), tuple(range(split))]


def _fill(out, where, tensor, shape, bounds, directory):
  """Reads one tensor's part of a parameter into `out`, piece by piece.

  Args:
    out: view to write.
    where: name to `Stored`.
    tensor, shape: which, and its whole shape here.
    bounds: (start, stop) of the part, an axis of `shape`.
    directory: for messages.
  """
  source = where[tensor.name]
  axes = _axes(tensor, len(shape), len(source.shape))
  lead = _lead(axes[source.outer], shape)
  start, stop = bounds[lead]
  step = max(1, _PIECE * (stop - start) // max(1, out.size))
  for at in range(start, stop, step):
    end = min(at + step, stop)
    piece = (*bounds[:lead], (at, end), *bounds[lead + 1 :])
    target = (slice(None),) * lead + (slice(at - start, end - start),)
    try:
      with np.errstate(over='ignore'):
        value = _piece(source, axes, shape, piece).astype(out.dtype)
    except (OSError, ValueError) as error:  # the file changed meanwhile
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
  """The first of these axes that isn't of size 1."""
  return next((axis for axis in axes if shape[axis] > 1), axes[0])


def _piece(source, axes, shape, bounds) -> np.ndarray:
  """Part of a tensor, axes in our order, as little read as can be.

  Of several axes that are one axis in the file, the first is cut as the file
  is read and the others thereafter.
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


def named_tensors(params, config: ModelConfig, family: str):
  """The tensors of a checkpoint, under their HF names and in their shapes.

  Yields:
    (name, NumPy array, not contiguous where it is a transposed view).
  """
  flat = flax.traverse_util.flatten_dict(params)
  dtype = next(iter(flat.values())).dtype
  for tensor, path, i, shape in families.list_tensors(config, family, dtype):
    value = np.asarray(flat[path] if i is None else flat[path][i])
    stored_shape = families.stored_shape(tensor, shape)
    value = value.reshape(stored_shape[::-1]).T if tensor.inputs else value
    yield tensor.name, value.reshape(stored_shape)


def save_params(
  params, directory: pathlib.Path, config, family: str, dtype=None
) -> int:
  """Writes parameters as one model.safetensors under their HF names.

  Args:
    params: the decoder's.
    directory: where.
    config: its `ModelConfig`.
    family: `model_type` of config.json.
    dtype: to write in, None for theirs.

  Returns:
    Bytes written.
  """
  tensors = named_tensors(params, config, family)
  if dtype:
    tensors = ((name, value.astype(dtype)) for name, value in tensors)
  return save_tensors(tensors, directory)


def save_tensors(tensors, directory: pathlib.Path) -> int:
  """Writes (HF name, array) pairs as one model.safetensors.

  Returns:
    Bytes written.
  """
  out = {name: np.ascontiguousarray(value) for name, value in tensors}
  path = directory / stored.FORMATS[0]
  safetensors.numpy.save_file(out, path, metadata={'format': 'pt'})
  path.chmod(0o644)  # safetensors makes it its owner's alone
  return path.stat().st_size
