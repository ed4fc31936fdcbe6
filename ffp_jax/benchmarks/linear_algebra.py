"""Measures the Cholesky factor and the solves in blocks beside the library's.

    python -m ffp_jax.benchmarks.linear_algebra --sizes=1536,4096
    JAX_PLATFORMS=cpu \\
      python -m ffp_jax.benchmarks.linear_algebra --topology=v5e:2x2 \\
      --sizes=4096,11008,28672

Without a topology: medians of seconds on this device, in turns, and errors
against float64. With one: what compiling the blocks for that TPU takes, which
needs libtpu and no TPU.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ffp_jax.benchmarks.search_step import medians
from ffp_jax.runtime import cli, device_memory, linear_algebra, topology

_OUTPUTS = 4096  # right-hand sides, the width of a 7B model


_BLOCKED = {
  'cholesky': linear_algebra.blocked_cholesky,
  'solve': linear_algebra.blocked_cholesky_solve,
  'invert': linear_algebra.blocked_inverse,
}
# On anything but a TPU.
_LIBRARY = {
  'cholesky': linear_algebra.cholesky,
  'solve': linear_algebra.cholesky_solve,
  'invert': linear_algebra.invert_lower,
}


def measure_runs(size: int, repeats: int) -> dict:
  """Runs both at one size, on the Gram matrix of random inputs.

  Args:
    size: of the matrix.
    repeats: timed turns.

  Returns:
    For each operation: median seconds of both, their ratio, and relative errors
    against float64 of both.
  """
  source = np.random.default_rng(0)
  inputs = source.standard_normal((2 * size, size), np.float32)
  gram = inputs.T @ inputs
  right = source.standard_normal((size, _OUTPUTS), np.float32)
  lower = np.linalg.cholesky(gram.astype(np.float64))
  exact = {
    'cholesky': lower,
    'solve': np.linalg.solve(gram.astype(np.float64), right),
    'invert': np.linalg.inv(lower),
  }
  lower = lower.astype(np.float32)
  arguments = {'cholesky': (gram,), 'solve': (lower, right), 'invert': (lower,)}
  found = {}
  for name, values in arguments.items():
    values = jax.device_put(values)
    row, errors = {}, {}
    for label, functions in (('blocked', _BLOCKED), ('library', _LIBRARY)):
      run = jax.jit(functions[name])
      row[label] = lambda run=run, x=values: jax.block_until_ready(run(*x))
      missed = np.linalg.norm(row[label]() - exact[name])
      errors[f'{label}, error'] = missed / np.linalg.norm(exact[name])
    seconds = medians(row, repeats)
    ratio = seconds['blocked'] / seconds['library']
    found[name] = {**seconds, 'blocked / library': ratio, **errors}
  return found


def measure_compilation(name: str, size: int) -> dict:
  """Compiles the blocks for a TPU.

  Args:
    name: of its topology, such as v5e:2x2; one chip of it is used.
    size: of the matrix.

  Returns:
    For each operation: seconds, and MiB beside its arguments and its result.
  """
  chips = topology.find_devices(name)
  sharding = jax.sharding.SingleDeviceSharding(chips[0])

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  matrix = array(size, size)
  found = {}
  for operation, function in _BLOCKED.items():
    others = [array(size, _OUTPUTS)] if operation == 'solve' else []
    start = time.perf_counter()
    compiled = jax.jit(function).lower(matrix, *others).compile()
    found[operation] = {
      'seconds': time.perf_counter() - start,
      'MiB': device_memory.memory_of(compiled).temporary / 2**20,
    }
  return found


def main(argv: list[str]) -> None:
  """Measures the sizes that the flags name and prints figures as JSON."""
  del argv
  args = flags.FLAGS
  found = {'device': args.topology or jax.devices()[0].device_kind}
  for size in map(int, args.sizes):
    if args.topology:
      found[size] = measure_compilation(args.topology, size)
    else:
      found[size] = measure_runs(size, args.repeats)
  print(json.dumps(found, indent=2))


if __name__ == '__main__':
  flags.DEFINE_list('sizes', ['1536', '4096'], 'Rows of the matrices.')
  flags.DEFINE_string('topology', None, 'TPU to compile for, e.g. v5e:2x2.')
  flags.DEFINE_integer(
    'repeats', 5, 'Timed turns of each measurement.', lower_bound=1
  )
  app.run(main, flags_parser=cli.parse_flags)
