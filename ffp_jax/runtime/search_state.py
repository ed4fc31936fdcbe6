"""The search's state on disk, by orbax, and back."""

import hashlib
import json
import pathlib
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization
from orbax.checkpoint import checkpoint_managers as policies

from ffp_jax.errors import RequestError


class Checkpoints:
  """Saves the states of a search; a context manager.

  There is no best one to keep: every step's reward is of other text, so the
  best candidates travel in the state's memory instead. Kept are the last few
  and the end of each stage. A state is on disk whole or not at all.
  """

  def __init__(self, directory: pathlib.Path, *, every: int, keep: int, ends):
    """Opens or makes the directory.

    Args:
      directory: of the checkpoints.
      every: steps between saves.
      keep: how many of the last ones to keep.
      ends: steps to save and keep for good.
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
    self._newest = None  # (step, what to save) of the last call
    self._lock = threading.Lock()  # a signal's thread saves too

  def __enter__(self):
    return self

  def __exit__(self, *_):
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()

  def begin(self, step: int, state):
    """Saves where a search begins, unless it is there, and waits for it.

    What lies beyond `step` is damaged, or the search would begin there.
    """
    for later in self._manager.all_steps():
      if later > step:
        self._manager.delete(later)
    self.save(step, state)
    self._manager.wait_until_finished()

  def save(self, step: int, state):
    """Saves a state if `step` is due, in the background."""
    with self._lock:
      self._newest = step, _pack(state)
      self._write(force=False)

  def flush(self):
    """Saves the last state `save` was given, due or not; from any thread."""
    if jax.process_count() > 1:
      return  # they may be at different steps; the last one due must do
    with self._lock:
      self._manager.wait_until_finished()
      if self._newest and self._newest[0] != self._manager.latest_step():
        self._write(force=True)
        self._manager.wait_until_finished()

  def _write(self, force):
    step, packed = self._newest
    self._manager.save(step, args=ocp.args.StandardSave(packed), force=force)


def _pack(state) -> dict:
  """Nested dicts of NumPy arrays, bound to no device, and their digest."""
  tree = serialization.to_state_dict(jax.device_get(state))
  tree = jax.tree.map(np.asarray, tree)
  return {'state': tree, 'sha256': _digest(tree)}


def _digest(tree) -> np.ndarray:
  # Orbax notices a torn file, but no flipped bit in an array or a name.
  form = jax.tree.map(lambda x: f'{x.dtype}{x.shape}', tree)
  sha = hashlib.sha256(json.dumps(form, sort_keys=True).encode())
  for leaf in jax.tree.leaves(tree):
    sha.update(leaf.tobytes())
  return np.frombuffer(sha.digest(), np.uint8)


def newest_state(directory: pathlib.Path) -> dict | None:
  """The newest state that is whole, as nested dicts of NumPy arrays.

  Args:
    directory: of the checkpoints; nothing in it is changed.

  Returns:
    None if there is no checkpoint.

  Raises:
    RequestError: there are some, and none is whole.
  """
  steps = steps_in(directory)
  with ocp.StandardCheckpointer() as reader:
    for step in reversed(steps):
      path = directory.resolve() / str(step)
      try:
        saved = reader.restore(path / 'default')
        if np.array_equal(saved['sha256'], _digest(saved['state'])):
          return saved['state']
      except Exception as error:  # of many kinds, one a file and a fault
        logging.debug('%s', error)
      logging.warning('%s: damaged, looking for the one before it', path)
  if not steps:
    return None
  raise RequestError(
    f'workdir: no checkpoint in {directory} can be read; put back a copy of '
    'them, or use another --workdir'
  )


def steps_in(directory: pathlib.Path) -> list[int]:
  """Steps of the checkpoints that were finished, damaged since or not."""
  if not directory.is_dir():
    return []
  names = (path.name for path in directory.iterdir())
  return sorted(int(name) for name in names if name.isdigit())


def restore_state(directory: pathlib.Path, like):
  """The newest state that is whole, in the form and place of `like`.

  Returns:
    None if there is no checkpoint.

  Raises:
    RequestError: there are some, and none can be used.
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
  """The policy's parameters that another run has found.

  Args:
    workdir: of that run.
    like: parameters of a new policy.

  Raises:
    RequestError: there are none, or they are of another shape.
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


def _shapes(tree) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {str(path): (x.shape, x.dtype) for path, x in leaves}
