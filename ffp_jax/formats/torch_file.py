"""The tensors of a pytorch_model.bin, where PyTorch is installed."""

import functools
import pathlib
import pickle

import numpy as np

from ffp_jax.config import RequestError
from ffp_jax.formats.stored import Stored, fresh, numpy_dtype


def open_tensors(path: pathlib.Path) -> dict[str, Stored]:
  """Name to tensor, nothing read; never runs code that is in the file.

  Raises:
    RequestError: there is no PyTorch, or the file is damaged or holds more
      than tensors.
  """
  try:
    import torch
  except ImportError as error:
    raise RequestError(
      f'{path}: needs PyTorch to be read; pip install torch, or save the '
      'model elsewhere with transformers (save_pretrained) as safetensors'
    ) from error
  # A map that is opened anew for every read lets go of the pages read.
  load = functools.partial(
    torch.load, path, map_location='cpu', weights_only=True, mmap=True
  )
  try:
    state = load()
  except pickle.UnpicklingError as error:
    raise RequestError(
      f'{path}: holds more than tensors and is not opened; '
      'use a checkpoint in safetensors'
    ) from error
  except (RuntimeError, ValueError, EOFError, OSError) as error:
    raise fresh(path, str(error).partition('\n')[0]) from error
  if not isinstance(state, dict):
    raise fresh(path, 'not a mapping from names to tensors')
  return {
    name: Stored(
      tuple(tensor.shape),
      str(tensor.dtype).removeprefix('torch.'),
      functools.partial(_read, load, name),
    )
    for name, tensor in state.items()
    if isinstance(tensor, torch.Tensor)
  }


def _read(load, name, index) -> np.ndarray:
  import torch

  part = load()[name][index]
  dtype = numpy_dtype(str(part.dtype).removeprefix('torch.'))
  # As bits, because PyTorch hands numpy no bfloat16.
  bits = part.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
  return bits.numpy().view(dtype)
