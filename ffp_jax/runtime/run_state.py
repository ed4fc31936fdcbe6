"""Checkpoints of the state of a search or a recovery, written with orbax."""

import pathlib
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization
from orbax.checkpoint import checkpoint_managers as policies

from ffp_jax.errors import RequestError

_GRACE_SECONDS = 20  # for the step in progress, when a signal ends the run


class Checkpoints:
  """Saves the states of a run; a context manager.

  The last few checkpoints and those at chosen steps are kept; the best of what
  was found is part of the state. A checkpoint is complete or does not exist.

  A small state is copied to the host at every `save`, and so can be written
  whenever a signal comes. A large one is written only when it is due, by every
  process its own part. As a step may reuse its buffers, the steps must then be
  taken through `guard`, so that a signal waits for the end of a step.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    every: int,
    keep: int,
    ends: Sequence[int],
    large: bool = False,
  ):
    """Opens the directory of the checkpoints, or makes it.

    Args:
      directory: of the checkpoints.
      every: number of steps between saves.
      keep: number of the last checkpoints to keep.
      ends: steps to save and to keep for good.
      large: whether the state is one of the size of the model.
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
    self._every, self._large = every, large
    self._newest = None  # (step, state) of the last call of `save`
    self._lock = threading.RLock()  # `flush` runs in a signal's thread
    self._flushing = threading.Event()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_):
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()

  def drop_after(self, step: int) -> None:
    """Drops checkpoints newer than `step`, from which the run does not start.

    They are damaged, or the run would start from them.
    """
    for later in self._manager.all_steps():
      if later > step:
        self._manager.delete(later)

  def begin(self, step: int, state: Any) -> None:
    """Saves the state that a run starts from, and waits for it.

    Drops newer checkpoints. One of `step` that exists is left as it is.
    """
    self.drop_after(step)
    self.save(step, state)
    self._manager.wait_until_finished()

  def guard(self, steps: Iterator) -> Iterator:
    """Yields the steps of a run; `flush` waits until one is dealt with."""
    while True:
      while self._flushing.is_set():  # locks are not fair, so give way
        time.sleep(0.1)
      with self._lock:
        self._newest = None  # the step may take its buffers
        step = next(steps, None)
        if step is None:
          return
        yield step

  def save(self, step: int, state: Any) -> None:
    """Saves the state after `step` steps if it is due, in the background."""
    with self._lock:
      self._newest = step, state if self._large else jax.device_get(state)
      self._write(force=False)

  def flush(self) -> None:
    """Saves the last state given to `save`, due or not; from any thread.

    Does nothing in a run of several processes, which may be at different steps.

    Raises:
      TimeoutError: a step that is in progress takes too long.
    """
    if jax.process_count() > 1:
      return
    self._flushing.set()
    try:
      if not self._lock.acquire(timeout=_GRACE_SECONDS):
        raise TimeoutError('a step was in progress')
      try:
        self._manager.wait_until_finished()
        if self._newest and self._newest[0] != self._manager.latest_step():
          self._write(force=True)
          self._manager.wait_until_finished()
      finally:
        self._lock.release()
    finally:
      self._flushing.clear()

  def _write(self, *, force: bool) -> None:
    """Hands the newest state to orbax, unless it is not due."""
    if self._newest is None:
      return
    step, state = self._newest
    due = self._manager.should_save(step)
    if self._large:  # orbax would also save the first that it sees
      due = step % self._every == 0
    if not (force or due):
      return
    tree = serialization.to_state_dict(state)
    saved = {'state': tree, 'digest': _digest(tree)}
    self._manager.save(step, args=ocp.args.StandardSave(saved), force=force)
    if self._large and jax.default_backend() == 'cpu':
      # Orbax writes from the device's own memory, which a step may overwrite.
      self._manager.wait_until_finished()


@jax.jit
def _digest(tree: dict) -> jax.Array:
  """Returns checksums of every array, and of names and shapes, uint32.

  Orbax notices a truncated file, but no flipped bit in an array. The sum of
  all words times odd numbers, modulo 2**32, changes with any of their bits, is
  the same in whatever order it is added up, and needs no copy of the array.
  """

  def checksum(x):
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    x = x.astype(word) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis, size in enumerate(x.shape):
      iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
      place = place * jnp.uint32(size) + iota
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)

  form = zlib.crc32(repr(_shapes(tree)).encode())
  return jnp.stack([*map(checksum, jax.tree.leaves(tree)), jnp.uint32(form)])


def newest_state(
  directory: pathlib.Path, like: dict | None = None
) -> dict | None:
  """Returns the newest undamaged state as nested dicts of arrays.

  Args:
    directory: of the checkpoints; nothing in it is changed.
    like: nested dicts of `jax.ShapeDtypeStruct` with the shardings to read
      to, None to read NumPy arrays of whatever is there.

  Returns:
    The state, or None if there is no checkpoint.

  Raises:
    RequestError: there are checkpoints, and none can be read.
  """
  steps = steps_in(directory)
  target = None
  if like is not None:
    digest = jax.eval_shape(_digest, like)
    target = {'state': like, 'digest': np.zeros(digest.shape, digest.dtype)}
  with ocp.StandardCheckpointer() as reader:
    for step in reversed(steps):
      path = directory.resolve() / str(step)
      try:
        saved = reader.restore(path / 'default', target)
        if np.array_equal(saved['digest'], _digest(saved['state'])):
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


def restore_large_state(directory: pathlib.Path, like: Any) -> Any:
  """Restores the newest undamaged state, every process its own part.

  Args:
    directory: of the checkpoints.
    like: a state of `jax.ShapeDtypeStruct`s with shardings.

  Returns:
    The state, or None if there is no checkpoint.

  Raises:
    RequestError: there are checkpoints, and none can be read.
  """
  tree = newest_state(directory, serialization.to_state_dict(like))
  if tree is None:
    return None
  return serialization.from_state_dict(like, tree)


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
      f'search.init_from: the run in {workdir} has {theirs} sublayers, this '
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
  return {str(path): (x.shape, str(x.dtype)) for path, x in leaves}
