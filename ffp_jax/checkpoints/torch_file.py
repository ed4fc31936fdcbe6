"""Lazy access to the tensors of a pytorch_model.bin, which needs PyTorch."""

import functools
import pathlib
import pickle
import tarfile

import numpy as np

from ffp_jax.checkpoints.stored import Stored, damaged_file_error, numpy_dtype
from ffp_jax.errors import RequestError


def open_tensors(path: pathlib.Path) -> dict[str, Stored]:
  """Returns the tensors by name; never runs code that is in the file.

  Raises:
    RequestError: PyTorch is not installed, or the file is damaged or holds
      more than tensors.
  """
  try:
    import torch
  except ImportError as error:
    raise RequestError(
      f'{path}: needs PyTorch to be read; pip install torch, or save the '
      'model elsewhere with transformers (save_pretrained) as safetensors'
    ) from error
  load = functools.partial(
    torch.load, path, map_location='cpu', weights_only=True
  )
  try:
    if _zipped(path):
      # Mapping the file anew for every read frees the pages that were read.
      load = functools.partial(load, mmap=True)
    else:  # before PyTorch 1.6; can only be read whole
      load = functools.cache(load)
    state = load()
  except (pickle.UnpicklingError, RuntimeError) as error:
    if 'weights_only' in str(error):
      raise _unsafe(path, str(error)) from error
    raise damaged_file_error(path, str(error).partition('\n')[0]) from error
  except (ValueError, EOFError, OSError) as error:
    raise damaged_file_error(
      path, str(error).partition('\n')[0] or 'ends early'
    ) from error
  _check(path, state, torch.Tensor)
  return {
    name: Stored(
      tuple(tensor.shape), _dtype(tensor), functools.partial(_read, load, name)
    )
    for name, tensor in state.items()
    if isinstance(tensor, torch.Tensor)
  }


def _zipped(path) -> bool:
  """Returns whether a file is of PyTorch's zip format, not of an older one.

  Raises:
    ValueError: it is of neither.
  """
  with path.open('rb') as file:
    head = file.read(64)
  if head.startswith(b'PK'):
    return True
  magic = (0x1950A86A20F9469CFC6C).to_bytes(10, 'little')  # of torch.save
  if magic not in head and not (head and tarfile.is_tarfile(path)):
    raise ValueError('not a file of torch.save')
  return False


def _unsafe(path, problem: str) -> RequestError:
  """Returns the error for a file that can only be read by running its code."""
  if '.tar' in problem:
    kind = "is of PyTorch's oldest format (tar)"
  elif 'TorchScript' in problem:
    kind = 'is a TorchScript program, more than tensors'
  else:
    kind = 'holds more than tensors, such as a whole pickled model'
  return RequestError(
    f'{path}: {kind}, and reading that would run code that is in it; if you '
    'trust it, load it with torch.load(..., weights_only=False) where it was '
    'made, and write the model with save_pretrained'
  )


def _check(path, state, kind):
  """Refuses everything but a mapping from names to tensors."""
  if not isinstance(state, dict):
    raise RequestError(
      f'{path}: holds a {type(state).__name__}, not a mapping from names to '
      'tensors; save model.state_dict() instead'
    )
  for key, value in state.items():
    inner = value.values() if isinstance(value, dict) else ()
    if any(isinstance(x, kind) for x in inner):
      raise RequestError(
        f'{path}: holds a training state, with the tensors under {key!r}; '
        f'save those alone: torch.save(torch.load(PATH)[{key!r}], PATH)'
      )


def _dtype(tensor) -> str:
  layout, dtype = str(tensor.layout), str(tensor.dtype)
  plain = layout == 'torch.strided'
  return dtype.removeprefix('torch.') if plain else layout


def _read(load, name, index) -> np.ndarray:
  import torch

  part = load()[name][index]
  dtype = numpy_dtype(str(part.dtype).removeprefix('torch.'))
  # Passes the bits as integers, because PyTorch converts no bfloat16 to NumPy.
  bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
  return part.view(bits).numpy().view(dtype)
