"""The decoder's parameters as an orbax checkpoint in a model directory."""

import pathlib

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from ffp_jax.checkpoints.stored import damaged_file_error

FOLDER = 'params'


def is_orbax(directory: pathlib.Path) -> bool:
  """Returns whether a model directory has an orbax checkpoint."""
  return (directory / FOLDER).is_dir()


def read_params(directory: pathlib.Path) -> dict:
  """Reads the parameters, a nested dict of NumPy arrays.

  Raises:
    RequestError: the checkpoint is damaged.
  """
  path = (directory / FOLDER).resolve()
  try:
    with ocp.StandardCheckpointer() as reader:
      return jax.tree.map(np.asarray, reader.restore(path))
  except Exception as error:  # the class depends on the file and the fault
    raise damaged_file_error(path, str(error)[:200]) from error


def write_params(params: dict, directory: pathlib.Path) -> None:
  """Writes parameters so that `StandardCheckpointer.restore` reads them.

  Those without numbers, of a sublayer without units, are left out.
  """
  flat = flax.traverse_util.flatten_dict(params)
  whole = {path: np.asarray(x) for path, x in flat.items() if x.size}
  with ocp.StandardCheckpointer() as writer:
    writer.save(
      (directory / FOLDER).resolve(), flax.traverse_util.unflatten_dict(whole)
    )
