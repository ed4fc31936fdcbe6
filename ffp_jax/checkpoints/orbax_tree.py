"""The decoder's parameters as an orbax checkpoint in a model directory."""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from ffp_jax.checkpoints.stored import damaged_file_error

FOLDER = 'params'


def is_orbax(directory: pathlib.Path) -> bool:
  return (directory / FOLDER).is_dir()


def read_params(directory: pathlib.Path) -> dict:
  """The nested dict of NumPy arrays, whole in memory.

  Raises:
    RequestError: damaged.
  """
  path = (directory / FOLDER).resolve()
  try:
    with ocp.StandardCheckpointer() as reader:
      return jax.tree.map(np.asarray, reader.restore(path))
  except Exception as error:  # of many kinds, one a file and a fault
    raise damaged_file_error(path, str(error)[:200]) from error


def write_params(params, directory: pathlib.Path):
  """Saves a nested dict of arrays; for `StandardCheckpointer.restore`."""
  with ocp.StandardCheckpointer() as writer:
    writer.save(
      (directory / FOLDER).resolve(), jax.tree.map(np.asarray, params)
    )
