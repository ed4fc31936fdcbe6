"""Checkpoints of a search's state, written and read with orbax."""

import hashlib
import json
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization
from orbax.checkpoint import checkpoint_managers as policies

from ffp_jax.errors import RequestError


class Checkpoints:
  """Saves the states of a search; a context manager.

  The last few checkpoints and those at the end of each stage are kept. There is
  no best one, because the reward of every step is on other text; the state
  carries the best candidates itself. A checkpoint is complete or does not
  exist.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    every: int,
    keep: int,
    ends: Sequence[int],
  ):
    """Opens the directory of the checkpoints, or makes it.

    Args:
      directory: of the checkpoints.
      every: number of steps between saves.
      keep: number of the last checkpoints to keep.
      ends: steps to save and to keep for good.
    """
    options = ocp.CheckpointManagerOptions(
      save_interval_steps=every,
      save_on_steps=ends,
      preservation_policy=policies.AnyPreservationPolicy(
        [policies.LatestN(keep), policies.CustomSteps(ends)]
      ),
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(directory.resolve(), options=options)
    self._newest = None  # (step, packed state) of the last call of `save`
    self._lock = threading.Lock()  # `flush` runs in a signal's thread

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_):
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()

  def begin(self, step: int, state: Any) -> None:
    """Saves the state that a search starts from, and waits for it.

    Drops checkpoints newer than `step`: they are damaged, or the search would
    start from them. A checkpoint of `step` that exists is left as it is.
    """
    for later in self._manager.all_steps():
      if later > step:
        self._manager.delete(later)
    self.save(step, state)
    self._manager.wait_until_finished()

  def save(self, step: int, state: Any) -> None:
    """Saves the state after `step` steps if it is due, in the background."""
    with self._lock:
      self._newest = step, _pack(state)
      self._write(force=False)

  def flush(self) -> None:
    """Saves the last state given to `save`, due or not; from any thread.

    Does nothing in a run of several processes, which may be at different steps.
    """
    if jax.process_count() > 1:
      return
    with self._lock:
      self._manager.wait_until_finished()
      if self._newest and self._newest[0] != self._manager.latest_step():
        self._write(force=True)
        self._manager.wait_until_finished()

  def _write(self, *, force: bool) -> None:
    """Hands the newest state to orbax, which skips one that is not due."""
    if self._newest is None:
      return
    step, packed = self._newest
    self._manager.save(step, args=ocp.args.StandardSave(packed), force=force)


def _pack(state) -> dict:
  """Returns a state as nested dicts of NumPy arrays, with their digest."""
  tree = serialization.to_state_dict(jax.device_get(state))
  tree = jax.tree.map(np.asarray, tree)
  return {'state': tree, 'sha256': _digest(tree)}


def _digest(tree) -> np.ndarray:
  """Returns the SHA-256 of names, types, shapes and values, uint8 [32].

  Orbax notices a truncated file, but no flipped bit in an array or a name.
  """
  form = jax.tree.map(lambda x: f'{x.dtype}{x.shape}', tree)
  sha = hashlib.sha256(json.dumps(form, sort_keys=True).encode())
  for leaf in jax.tree.leaves(tree):
    sha.update(leaf.tobytes())
  return np.frombuffer(sha.digest(), np.uint8)


def newest_state(directory: pathlib.Path) -> dict | None:
  """Returns the newest undamaged state as nested dicts of NumPy arrays.

  Args:
    directory: of the checkpoints; nothing in it is changed.

  Returns:
    The state, or None if there is no checkpoint.

  Raises:
    RequestError: there are checkpoints, and all are damaged.
  """
  steps = steps_in(directory)
  with ocp.StandardCheckpointer() as reader:
    for step in reversed(steps):
      path = directory.resolve() / str(step)
      try:
        saved = reader.restore(path / 'default')
        if np.array_equal(saved['sha256'], _digest(saved['state'])):
          return saved['state']
      except Exception as error:  # orbax raises many types for damaged files
        logging.debug('%s', error)
      logging.warning('%s: damaged, looking for the one before it', path)
  if not steps:
    return None
  raise RequestError(
    f'workdir: no checkpoint in {directory} can be read; put back a copy of '
    'them, or use another --workdir'
  )


def steps_in(directory: pathlib.Path) -> list[int]:
  """Returns the steps of all finished checkpoints, in ascending order."""
  if not directory.is_dir():
    return []
  names = (path.name for path in directory.iterdir())
  return sorted(int(name) for name in names if name.isdigit())


def restore_state(directory: pathlib.Path, like: Any) -> Any:
  """Restores the newest undamaged state.

  Args:
    directory: of the checkpoints.
    like: a state with the same structure, shapes and types; its shardings are
      those of the result.

  Returns:
    The state, or None if there is no checkpoint.

  Raises:
    RequestError: there are checkpoints, and none can be used.
  """
  tree = newest_state(directory)
  if tree is None:
    return None
  if _shapes(tree) != _shapes(serialization.to_state_dict(like)):
    raise RequestError(
      f'workdir: {directory} is of another version of ffp_jax; go on with '
      'that one, or use another --workdir'
    )
  return jax.tree.map(
    lambda x, like: jax.device_put(x, like.sharding),
    serialization.from_state_dict(like, tree),
    like,
  )


def inherit_policy(workdir: pathlib.Path, like: dict) -> dict:
  """Returns the parameters of the policy that another run has trained.

  Args:
    workdir: of that run.
    like: parameters of a new policy, whose shapes the result must have.

  Raises:
    RequestError: that run has no checkpoint, or a policy of other shapes.
  """
  tree = newest_state(workdir / 'checkpoints')
  if tree is None:
    raise RequestError(
      f'search.init_from: {workdir} has no checkpoint; give the workdir of a '
      'run that has begun its search'
    )
  params = tree['params']
  theirs, ours = (len(p['mean']) for p in (params, like))
  if theirs != ours:
    raise RequestError(
      f'search.init_from: the run in {workdir} has {theirs} modules, this '
      f'one {ours}; give a run of the same model'
    )
  if _shapes(params) != _shapes(like):
    raise RequestError(
      f'search.init_from: the run in {workdir} has another policy.hidden'
    )
  return jax.tree.map(jax.numpy.asarray, params)


def _shapes(tree) -> dict[str, tuple]:
  """Returns the shape and type of every array by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {str(path): (x.shape, x.dtype) for path, x in leaves}
