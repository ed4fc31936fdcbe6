"""Conversion of checkpoint files to the decoder's parameters, and back."""

import collections
import math
import pathlib
from collections.abc import Iterable, Iterator

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from ffp_jax.checkpoints import directory as directories
from ffp_jax.checkpoints import model_config, orbax_tree, shards, stored
from ffp_jax.checkpoints.stored import Stored
from ffp_jax.errors import RequestError
from ffp_jax.models import families
from ffp_jax.models.config import ModelConfig
from ffp_jax.runtime import sharding


def _from_orbax(directory, config, family) -> dict[str, Stored]:
  """Returns the tensors of an orbax checkpoint by name; reads all of them."""
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


def _checked(tensors, wanted, tied, directory) -> dict[str, Stored]:
  """Returns the tensors that the decoder needs, and checks shape and dtype.

  Args:
    tensors: of the checkpoint, by the names that they have in it.
    wanted: as `families.list_tensors` yields them.
    tied: whether the head is the embedding, so that either will do.
    directory: for messages.
  """
  found = {}
  for tensor, path, _, shape in wanted:
    name = tensor.name
    value = stored.lookup(tensors, name)
    if value is None and tied and path == families.EMBED:
      value = stored.lookup(tensors, families.HEAD_NAME)
    if value is None:
      raise RequestError(
        f'{directory}: tensor {name} is missing{_missing_advice(tensors, name)}'
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


def _missing_advice(tensors, name: str) -> str:
  """Returns why a tensor may be missing and what helps, to end a message."""
  if any('.lora_' in x or '.base_layer.' in x for x in tensors):
    return '; merge the adapter into the model first (PEFT: merge_and_unload)'
  stem = name.removesuffix('weight')
  if parts := [x for x in tensors if x.startswith(stem) and x != f'{stem}bias']:
    return (
      f', but there is {stored.some(parts)}: the weights are quantised or '
      'compressed; use the model they were made from'
    )
  inner = name.removeprefix('model.')
  if other := next((x for x in tensors if x.endswith(f'.{inner}')), None):
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


def check_files(
  directory: pathlib.Path, config: ModelConfig, dtype: np.dtype
) -> tuple[dict[str, Stored], list[tuple]]:
  """Opens a model's weights and checks names and shapes, without reading them.

  Args:
    directory: of the model.
    config: of its decoder.
    dtype: any; it changes nothing here.

  Returns:
    (tensors by Hugging Face name, what `families.list_tensors` yields).

  Raises:
    RequestError: a file or tensor is missing, damaged, duplicate, of a wrong
      shape or not of a float type; or an index names a file outside.
  """
  family = model_config.read_config_json(directory)['model_type']
  checkpoint = directories.find_checkpoint(directory)
  if checkpoint is None:
    raise directories.missing_error(directory)
  if checkpoint.kind == 'orbax':
    tensors = _from_orbax(directory, config, family)
  else:
    tensors = directories.open_tensors(checkpoint)
  wanted = list(families.list_tensors(config, family, dtype))
  return _checked(tensors, wanted, config.tied, directory), wanted


def main_dtype(tensors: dict[str, Stored], wanted: Iterable[tuple]) -> np.dtype:
  """Returns the dtype that most numbers of a checkpoint have.

  float64 is returned as float32, the widest type that JAX computes in here.

  Args:
    tensors, wanted: from `check_files`.
  """
  numbers = collections.Counter()
  for tensor, *_ in wanted:
    found = tensors[tensor.name]
    numbers[found.dtype] += math.prod(found.shape)
  name = numbers.most_common(1)[0][0]
  return stored.numpy_dtype('float32' if name == 'float64' else name)


def load_params(
  directory: pathlib.Path,
  config: ModelConfig,
  dtype: np.dtype,
  shardings: dict | None = None,
) -> dict:
  """Reads the decoder's parameters, each shard straight into place.

  Reads only what the devices of this process need, and needs only some
  megabytes of memory beside the parameters. On CPU the arrays own the memory
  that was read into, without a copy.

  Args:
    directory: of the model, in any format.
    config: from `model_config.read_model_config`.
    dtype: of the parameters.
    shardings: pytree like the parameters of `jax.sharding.Sharding`; None
      for those of `sharding.param_shardings` on the mesh that is set.

  Returns:
    The nested 'params' dict of jax arrays.

  Raises:
    RequestError: see `check_files`, before any tensor is read; or a tensor
      has a value that is not finite, as it is read.
  """
  tensors, wanted = check_files(directory, config, dtype)
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
    read = shards.shard_reader(tensors, parts[path], spec, directory)
    flat[path] = jax.make_array_from_callback(
      spec.shape, shardings[path], read, dtype=spec.dtype
    )
  return flax.traverse_util.unflatten_dict(flat)


def named_tensors(
  params: dict, config: ModelConfig, family: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Converts parameters to the tensors of a Hugging Face checkpoint.

  Args:
    params: of the decoder.
    config: of the decoder.
    family: `model_type` of config.json.

  Yields:
    (Hugging Face name, array, not contiguous if it is a transposed view).
  """
  flat = flax.traverse_util.flatten_dict(params)
  dtype = next(iter(flat.values())).dtype
  for tensor, path, i, shape in families.list_tensors(config, family, dtype):
    value = np.asarray(flat[path] if i is None else flat[path][i])
    stored_shape = families.stored_shape(tensor, shape)
    value = value.reshape(stored_shape[::-1]).T if tensor.inputs else value
    yield tensor.name, value.reshape(stored_shape)


def save_params(
  params: dict,
  directory: pathlib.Path,
  config: ModelConfig,
  family: str,
  dtype: np.dtype | None = None,
) -> int:
  """Writes parameters as one model.safetensors with Hugging Face names.

  Args:
    params: of the decoder.
    directory: to write to.
    config: of the decoder.
    family: `model_type` of config.json.
    dtype: to write; None for that of the parameters.

  Returns:
    The bytes written.
  """
  tensors = named_tensors(params, config, family)
  if dtype:
    tensors = ((name, value.astype(dtype)) for name, value in tensors)
  return save_tensors(tensors, directory)


def save_tensors(
  tensors: Iterable[tuple[str, np.ndarray]], directory: pathlib.Path
) -> int:
  """Writes pairs of Hugging Face name and array as one model.safetensors.

  Returns:
    The bytes written.
  """
  out = {name: np.ascontiguousarray(value) for name, value in tensors}
  path = directory / stored.FORMATS[0]
  safetensors.numpy.save_file(out, path, metadata={'format': 'pt'})
  path.chmod(0o644)  # safetensors makes it readable by its owner only
  return path.stat().st_size
