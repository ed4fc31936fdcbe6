"""The search's state on disk, by orbax."""

import pathlib

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """Keeps the last few states of a run; a context manager."""

  def __init__(self, directory: pathlib.Path, *, every: int, keep: int):
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, save_interval_steps=every
    )
    self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.wait_until_finished()
    self._manager.close()

  def save(self, step: int, state, *, force: bool = False):
    """Saves a state if `step` is due, in the background."""
    saved = self._manager.latest_step()
    if not (force and saved == step):
      self._manager.save(step, args=ocp.args.StandardSave(state), force=force)

  def restore(self, state):
    """The newest state saved, or `state` itself if there is none."""
    step = self._manager.latest_step()
    if step is None:
      return state
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
