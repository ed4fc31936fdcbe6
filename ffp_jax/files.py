"""Checkpoint files to the decoder's parameters, and back."""

import json
import pathlib

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ffp_jax import hf
from ffp_jax.config import RequestError
from ffp_jax.model import ModelConfig


def _open_all(directory: pathlib.Path) -> dict:
  """Tensor name to an open safetensors file that holds it."""
  index = directory / 'model.safetensors.index.json'
  if index.exists():
    try:
      names = set(json.loads(index.read_text())['weight_map'].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise RequestError(f'{index}: not an index ({error})') from error
  else:
    names = {'model.safetensors'}
  where = {}
  for name in sorted(names):
    path = directory / name
    try:
      file = safetensors.safe_open(path, framework='np')
    except FileNotFoundError as error:
      raise RequestError(f'{path}: missing; fetch the model again') from error
    except (safetensors.SafetensorError, OSError) as error:
      raise RequestError(
        f'{path}: truncated or not safetensors ({error}); fetch it again'
      ) from error
    where.update(dict.fromkeys(file.keys(), file))
  return where


def _check(where: dict, wanted, directory: pathlib.Path):
  for tensor, _, _, shape in wanted:
    if tensor.name not in where:
      raise RequestError(f'{directory}: tensor {tensor.name} is missing')
    found = tuple(where[tensor.name].get_slice(tensor.name).get_shape())
    expected = hf.stored_shape(tensor, shape)
    if found != expected:
      raise RequestError(
        f'{directory}: tensor {tensor.name} has shape {found}, '
        f'config.json asks for {expected}'
      )


def check_files(directory: pathlib.Path, config: ModelConfig, dtype):
  """Opens a model's weights and compares names and shapes, reading none.

  Returns:
    (tensor name to open file, what `tensors` yields).

  Raises:
    RequestError: a file or tensor is missing, truncated or of a wrong shape.
  """
  family = hf.read_json(directory)['model_type']
  where = _open_all(directory)
  wanted = list(hf.tensors(config, family, dtype))
  _check(where, wanted, directory)
  return where, wanted


def load_params(directory: pathlib.Path, config: ModelConfig, dtype) -> dict:
  """The decoder's parameters, streamed tensor by tensor.

  Args:
    directory: a model directory with safetensors.
    config: from `model_config`.
    dtype: of the parameters.

  Returns:
    The nested 'params' dict of jax arrays.

  Raises:
    RequestError: a file or tensor is missing, truncated or of a wrong shape;
      found before any tensor is read.
  """
  where, wanted = check_files(directory, config, dtype)
  flat = flax.traverse_util.flatten_dict(hf.param_shapes(config, dtype))
  arrays = {path: np.empty(x.shape, x.dtype) for path, x in flat.items()}
  for tensor, path, i, shape in wanted:
    value = where[tensor.name].get_tensor(tensor.name)
    value = (value.T if tensor.inputs else value).reshape(shape)
    arrays[path][... if i is None else i] = value
  return flax.traverse_util.unflatten_dict(
    {path: jnp.asarray(array) for path, array in arrays.items()}
  )


def save_params(params, directory: pathlib.Path, config, family: str):
  """Writes parameters as one model.safetensors under their HF names.

  Returns:
    Bytes written.
  """
  flat = flax.traverse_util.flatten_dict(params)
  dtype = next(iter(flat.values())).dtype
  out = {}
  for tensor, path, i, shape in hf.tensors(config, family, dtype):
    value = np.asarray(flat[path] if i is None else flat[path][i])
    stored = hf.stored_shape(tensor, shape)
    value = value.reshape(stored[::-1]).T if tensor.inputs else value
    out[tensor.name] = np.ascontiguousarray(value.reshape(stored))
  path = directory / 'model.safetensors'
  safetensors.numpy.save_file(out, path, metadata={'format': 'pt'})
  path.chmod(0o644)  # safetensors makes it its owner's alone
  return path.stat().st_size
