"""The mesh, and the one table from logical axes to mesh axes.

Three mesh axes: `candidates` scores proposals side by side, and in recovery
trains on different rows of tokens; `fsdp` splits the weights and the rows of
tokens, `tensor` splits heads and FFN channels.
Whatever a mesh axis doesn't divide is replicated over it.
"""

import contextlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)

from ffp_jax.errors import RequestError

MESH_AXES = ('candidates', 'fsdp', 'tensor')

_HEARTBEAT_TIMEOUT_S = (
  30  # seconds after which a process that says nothing is dead
)

# Logical axis to mesh axis. An array takes each mesh axis once, for the first
# of its axes that the mesh axis divides: with odd groups the query heads of a
# group are split, with few rows the model width is.
RULES = {
  'candidates': 'candidates',
  'batch': 'fsdp',
  'embed': 'fsdp',
  'groups': 'tensor',
  'heads': 'tensor',
  'ffn': 'tensor',
  'vocab': 'tensor',
}

# Logical axes of a parameter; a stack has a leading axis of layers, which
# stays whole. What isn't here (norms and the biases of outputs) is small and
# replicated.
_PARAMS = {
  'attention/query': ('embed', 'groups', 'heads', None),
  'attention/key': ('embed', 'groups', None),
  'attention/value': ('embed', 'groups', None),
  'attention/query_bias': ('groups', 'heads', None),
  'attention/key_bias': ('groups', None),
  'attention/value_bias': ('groups', None),
  'attention/out': ('groups', 'heads', None, 'embed'),
  'attention/refit': ('embed', 'ffn'),
  'ffn/refit': ('embed', 'ffn'),
  'ffn/gate': ('embed', 'ffn'),
  'ffn/up': ('embed', 'ffn'),
  'ffn/gate_bias': ('ffn',),
  'ffn/up_bias': ('ffn',),
  'ffn/down': ('ffn', 'embed'),
  # Low-rank updates, on their way into and out of the rank.
  'attention/query_a': ('embed', None),
  'attention/query_b': (None, 'groups', 'heads', None),
  'attention/key_a': ('embed', None),
  'attention/key_b': (None, 'groups', None),
  'attention/value_a': ('embed', None),
  'attention/value_b': (None, 'groups', None),
  'attention/out_a': ('groups', 'heads', None, None),
  'attention/out_b': (None, 'embed'),
  'ffn/gate_a': ('embed', None),
  'ffn/gate_b': (None, 'ffn'),
  'ffn/up_a': ('embed', None),
  'ffn/up_b': (None, 'ffn'),
  'ffn/down_a': ('ffn', None),
  'ffn/down_b': (None, 'embed'),
  'embed/table': ('vocab', 'embed'),
  'position/table': (None, 'embed'),
  'embed_in/kernel': (None, 'embed'),
  'embed_out/kernel': ('embed', None),
  'head/kernel': ('embed', 'vocab'),
}


def make_mesh(candidates: int, fsdp: int, tensor: int, devices=None) -> Mesh:
  """The mesh of a run over all devices.

  Args:
    candidates, fsdp, tensor: sizes; one may be -1, for what is left.
    devices: to use; None for all of all processes.

  Raises:
    RequestError: the sizes don't multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {'candidates': candidates, 'fsdp': fsdp, 'tensor': tensor}
  known = int(np.prod([n for n in sizes.values() if n != -1]))
  free = [name for name, n in sizes.items() if n == -1]
  given = ', '.join(f'mesh.{name}={n}' for name, n in sizes.items())
  if len(free) > 1 or known < 1 or min(sizes.values()) < -1:
    raise RequestError(f'{given}: each must be positive, at most one -1')
  sizes |= dict.fromkeys(free, len(devices) // known)
  used = int(np.prod(list(sizes.values())))
  if used > len(devices) or (free and used < len(devices)):
    raise RequestError(
      f'{given}: cannot be made of the {len(devices)} device(s) here'
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    devices=devices[:used],
  )


def partition_spec(shape, axes, sizes) -> PartitionSpec:
  """Which mesh axis splits which axis of an array.

  Args:
    shape: of the array.
    axes: a logical axis or None for each.
    sizes: of the mesh axes, by name.
  """
  out = []
  for size, axis in zip(shape, axes, strict=True):
    mesh_axis = RULES.get(axis)
    fits = mesh_axis not in out and size % sizes.get(mesh_axis, 1) == 0
    out.append(mesh_axis if fits else None)
  return PartitionSpec(*out)


def constrain(x, *axes):
  """Tells the compiler how an activation lies; nothing without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  layout = partition_spec(x.shape, axes, mesh.shape)
  return jax.lax.with_sharding_constraint(x, layout)


def param_shardings(shapes, mesh: Mesh | None = None):
  """The sharding of every parameter.

  Args:
    shapes: the parameters, or their `jax.ShapeDtypeStruct`s, nested.
    mesh: from `make_mesh`; None for the one that is set, or, if none is,
      the default device.

  Returns:
    `jax.sharding.Sharding`s, nested alike.
  """
  mesh = mesh or jax.sharding.get_mesh()

  def one(path, leaf):
    if mesh.empty:
      return SingleDeviceSharding(jax.local_devices()[0])
    axes = _axes(path, leaf)
    return NamedSharding(mesh, partition_spec(leaf.shape, axes, mesh.shape))

  return jax.tree_util.tree_map_with_path(one, shapes)


def _axes(path, leaf):
  """The logical axes of a parameter."""
  *_, module, name = (key.key for key in path)
  axes = _PARAMS.get(f'{module}/{name}', (None,) * leaf.ndim)
  return (None,) * (leaf.ndim - len(axes)) + axes


def constrain_params(params):
  """Tells the compiler how parameters lie, or what has their form."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: constrain(leaf, *_axes(path, leaf)), params
  )


def map_candidates(f, xs, *, block: int):
  """`f` of every x, so many at once, split over the mesh's candidates.

  Args:
    f: of one x.
    xs: array [N, ...].
    block: how many each part of the mesh takes at once; the next smaller
      divisor of N if N isn't a multiple.

  Returns:
    Results stacked, [N, ...] each.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape['candidates']
  count = len(xs)
  once = max(
    n for n in range(1, count + 1) if count % n == 0 and n <= block * parts
  )
  axis = 'candidates' if parts > 1 and once % parts == 0 else None
  at_once = jax.vmap(f, spmd_axis_name=axis)
  blocks = xs.reshape(count // once, once, *xs.shape[1:])
  inner = (None,) * (xs.ndim - 1)
  out = jax.lax.map(
    lambda x: at_once(constrain(x, 'candidates', *inner)), blocks
  )
  return jax.tree.map(lambda y: y.reshape(count, *y.shape[2:]), out)


def mean_over_rows(f, rows_BxT):
  """The mean of `f` over rows that are split over the mesh's candidates.

  Args:
    f: rows [b,T] -> scalar mean over them.
    rows_BxT: as many rows as the mesh has candidates, or a multiple; any other
      number is not split.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape['candidates']
  parts = parts if len(rows_BxT) % parts == 0 else 1
  shares = rows_BxT.reshape(parts, -1, rows_BxT.shape[1])
  return map_candidates(f, shares, block=1).mean()


def to_host(x) -> np.ndarray:
  """The whole of an array, on every host; all processes must call it."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def join_processes(
  coordinator: str, processes: int | None, process: int | None
):
  """Makes this one process of a run by several; before any computation.

  Args:
    coordinator: HOST:PORT of process 0, or 'auto' where JAX knows the cluster
      (Cloud TPU, GKE, Slurm).
    processes, process: how many, and which this is; None for 'auto'.

  Raises:
    RequestError: the others can't be found.
  """
  address = None if coordinator == 'auto' else coordinator
  # It would take SIGTERM for itself; signals.py ends the process.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      address,
      processes,
      process,
      heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
      shutdown_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
    )
  except (RuntimeError, ValueError) as error:
    raise RequestError(
      f'--coordinator: cannot join the other processes ({error})'
    ) from error


def is_lead_process() -> bool:
  """Whether this is the one process of a run that writes."""
  return jax.process_index() == 0


def is_peer_failure(error: Exception) -> bool:
  """Whether an error may come of the end of another process."""
  failed = isinstance(error, jax.errors.JaxRuntimeError)
  return failed and jax.process_count() > 1


@contextlib.contextmanager
def lead_process_first(claim, *args):
  """Has process 0 enter `claim(*args)`, and then the others go on.

  Yields:
    `leads()`.
  """
  with claim(*args) if is_lead_process() else contextlib.nullcontext():
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('claimed')
    yield is_lead_process()
