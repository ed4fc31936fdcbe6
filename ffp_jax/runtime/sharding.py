"""The device mesh, and the one table from logical axes to mesh axes.

There are three mesh axes: `candidates` scores proposals side by side in the
search, and in recovery splits the rows of tokens; `fsdp` splits the weights and
the rows of tokens; `tensor` splits heads and FFN channels. An axis that a mesh
axis does not divide is replicated over it.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)

from ffp_jax.errors import RequestError

MESH_AXES = ('candidates', 'fsdp', 'tensor')

_HEARTBEAT_TIMEOUT_S = 30  # after which a silent process counts as dead

# Logical axis to mesh axis. Each mesh axis splits one axis of an array, the
# first with its rule whose size it divides: where it does not divide the number
# of groups, the query heads of a group are split, and with few rows the model
# width is.
RULES = {
  'candidates': 'candidates',
  'batch': 'fsdp',
  'embed': 'fsdp',
  'groups': 'tensor',
  'heads': 'tensor',
  'ffn': 'tensor',
  'vocab': 'tensor',
}

# Logical axes of a parameter. In a stack there is a leading axis of layers,
# which is not split. Other parameters (norms, output biases) are replicated.
_PARAMS = {
  'attention/query': ('embed', 'groups', 'heads', None),
  'attention/key': ('embed', 'groups', None),
  'attention/value': ('embed', 'groups', None),
  'attention/query_bias': ('groups', 'heads', None),
  'attention/key_bias': ('groups', None),
  'attention/value_bias': ('groups', None),
  'attention/out': ('groups', 'heads', None, 'embed'),
  'attention/refit_basis': (None, 'ffn', 'embed'),
  'attention/refit_weight': (None, 'embed', 'ffn'),
  'ffn/refit_basis': (None, 'ffn', 'embed'),
  'ffn/refit_weight': (None, 'embed', 'ffn'),
  'ffn/gate': ('embed', 'ffn'),
  'ffn/up': ('embed', 'ffn'),
  'ffn/gate_bias': ('ffn',),
  'ffn/up_bias': ('ffn',),
  'ffn/down': ('ffn', 'embed'),
  # Low-rank updates: the factors into the rank (_a) and out of it (_b).
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


def make_mesh(
  candidates: int,
  fsdp: int,
  tensor: int,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes the mesh of a run.

  Without a -1 the product of the sizes may be less than the number of devices;
  the first devices are then used.

  Args:
    candidates, fsdp, tensor: sizes of the mesh axes; one may be -1, for all
      devices that the others leave.
    devices: to use; None for those of all processes.

  Raises:
    RequestError: the sizes do not fit the number of devices.
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
  try:
    placed = place(tuple(sizes.values()), devices[:used])
  except ValueError as error:
    raise RequestError(f'{given}: {error}') from error
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def place(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Returns devices in the shape of a mesh.

  What several slices of TPUs, or hosts of GPUs, exchange goes over a network
  that is slower than their own links. So the first axes of the mesh that can
  lie across them do.

  Args:
    sizes: of the mesh axes.
    devices: as many as the mesh has.

  Raises:
    ValueError: slices of which not all devices are used.
  """
  left, between = len({getattr(x, 'slice_index', 0) for x in devices}), []
  for size in sizes:
    between.append(math.gcd(size, left))
    left //= between[-1]
  inside = [size // n for size, n in zip(sizes, between, strict=True)]
  # An axis may take parts of the rows of a slice of TPUs, such as 8 of 4 x 4,
  # which `jax.make_mesh` refuses on most.
  if math.prod(between) == 1:
    return mesh_utils.create_device_mesh(
      inside, devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_hybrid_device_mesh(
    inside, between, devices, allow_split_physical_axes=True
  )


def partition_spec(
  shape: Sequence[int], axes: Sequence[str | None], sizes: Mapping[str, int]
) -> PartitionSpec:
  """Returns the mesh axis, or None, that splits each axis of an array.

  Args:
    shape: of the array.
    axes: a logical axis or None for each axis of the array.
    sizes: of the mesh axes, by name.
  """
  spec = []
  for size, axis in zip(shape, axes, strict=True):
    mesh_axis = RULES.get(axis) if axis else None
    fits = mesh_axis not in spec and size % sizes.get(mesh_axis, 1) == 0
    spec.append(mesh_axis if fits else None)
  return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation's sharding; a no-op without a mesh.

  Args:
    x: the activation.
    *axes: a logical axis or None for each of its axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = partition_spec(x.shape, axes, mesh.shape)
  return jax.lax.with_sharding_constraint(x, spec)


def param_shardings(shapes: dict, mesh: Mesh | None = None) -> dict:
  """Returns the sharding of every parameter.

  Args:
    shapes: the parameters, or their `jax.ShapeDtypeStruct`s, nested.
    mesh: from `make_mesh`; None for the one that is set. If none is set, the
      parameters lie on this process's first device.

  Returns:
    `jax.sharding.Sharding`s, nested alike.
  """
  mesh = mesh or jax.sharding.get_mesh()

  def sharding_of(path, leaf):
    if mesh.empty:
      return SingleDeviceSharding(jax.local_devices()[0])
    axes = _axes(path, leaf)
    return NamedSharding(mesh, partition_spec(leaf.shape, axes, mesh.shape))

  return jax.tree_util.tree_map_with_path(sharding_of, shapes)


def _axes(path, leaf) -> tuple[str | None, ...]:
  """Returns the logical axes of a parameter."""
  names = [str(getattr(key, 'key', '')) for key in path[-2:]]
  axes = _PARAMS.get('/'.join(names), (None,) * leaf.ndim)
  return (None,) * (leaf.ndim - len(axes)) + axes


def constrain_params(params: Any) -> Any:
  """Constrains the sharding of parameters, or of what is nested alike.

  That is their gradient, or the state of an optimiser.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: constrain(leaf, *_axes(path, leaf)), params
  )


def map_candidates(
  f: Callable[[jax.Array], Any], xs: jax.Array, *, block: int
) -> Any:
  """Maps `f` over xs, `block` at a time per part of the mesh.

  The parts are those of the mesh axis `candidates`.

  Args:
    f: maps one x to an array or a pytree of arrays.
    xs: array [N, ...].
    block: number that each part of the mesh takes at once. The number that all
      parts together take is lowered to the next divisor of N.

  Returns:
    The results, stacked to [N, ...] each.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape['candidates']
  count = len(xs)
  at_once = max(
    n for n in range(1, count + 1) if count % n == 0 and n <= block * parts
  )
  if at_once == 1:  # which on CPU is quicker than a block of one
    return jax.lax.map(f, xs)
  axis = 'candidates' if parts > 1 and at_once % parts == 0 else None
  map_block = jax.vmap(f, spmd_axis_name=axis)
  blocks = xs.reshape(count // at_once, at_once, *xs.shape[1:])
  inner = (None,) * (xs.ndim - 1)
  results = jax.lax.map(
    lambda x: map_block(constrain(x, 'candidates', *inner)), blocks
  )
  return jax.tree.map(lambda y: y.reshape(count, *y.shape[2:]), results)


def mean_over_rows(f: Callable[[jax.Array], Any], rows_BxT: jax.Array) -> Any:
  """Returns the mean of `f` over rows, split over the mesh's `candidates`.

  Args:
    f: maps rows [b,T] to means over them, a scalar or a pytree of scalars.
    rows_BxT: the rows. They are split if B is a multiple of the mesh axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape['candidates']
  parts = parts if len(rows_BxT) % parts == 0 else 1
  shares = rows_BxT.reshape(parts, -1, rows_BxT.shape[1])
  means = map_candidates(f, shares, block=1)
  return jax.tree.map(jnp.mean, means)


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
  """Copies the whole of an array to every host; all processes must call it."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def join_processes(
  coordinator: str, processes: int | None, process: int | None
) -> None:
  """Joins the other processes of a run; call it before any computation.

  Args:
    coordinator: HOST:PORT of process 0, or 'auto' where JAX knows the cluster
      (Cloud TPU, GKE, Slurm).
    processes: number of processes; None with 'auto'.
    process: index of this one; None with 'auto'.

  Raises:
    RequestError: the other processes cannot be reached.
  """
  address = None if coordinator == 'auto' else coordinator
  # JAX's preemption service would intercept SIGTERM, which signals.py handles.
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
  """Returns whether this is the one process of a run that writes."""
  return jax.process_index() == 0


def holds_everywhere(condition: bool) -> bool:
  """Returns whether a condition holds in all processes, which must all ask."""
  return bool(np.all(multihost_utils.process_allgather(np.array(condition))))


def is_peer_failure(error: Exception) -> bool:
  """Returns whether an error may be due to the end of another process."""
  failed = isinstance(error, jax.errors.JaxRuntimeError)
  return failed and jax.process_count() > 1


@contextlib.contextmanager
def lead_process_first(
  claim: Callable, *args: Any
) -> Generator[bool, None, None]:
  """Enters `claim(*args)` in process 0, before the others enter the block.

  Args:
    claim: makes a context manager.
    *args: its arguments.

  Yields:
    `is_lead_process()`.
  """
  with claim(*args) if is_lead_process() else contextlib.nullcontext():
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('claimed')
    yield is_lead_process()
