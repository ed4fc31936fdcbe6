"""Device memory of a compiled function, and a fallback when it runs out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import logging


class Memory(NamedTuple):
  """Bytes on one device while a compiled function runs."""

  arguments: int
  temporary: int
  output: int  # besides outputs that reuse the buffers of arguments

  @property
  def total(self) -> int:
    """Bytes of all three together."""
    return sum(self)


def memory_needed(function: Any, *args: Any, **kwargs: Any) -> Memory:
  """Compiles a function without running it, and returns its memory.

  Args:
    function: jitted.
    *args, **kwargs: its arguments: arrays, or `jax.ShapeDtypeStruct`s with
      shardings.
  """
  return memory_of(function.lower(*args, **kwargs).compile())


def memory_of(compiled: Any) -> Memory:
  """Returns the memory of a compiled function."""
  stats = compiled.memory_analysis()
  return Memory(
    stats.argument_size_in_bytes,
    stats.temp_size_in_bytes,
    stats.output_size_in_bytes - stats.alias_size_in_bytes,
  )


def free_bytes() -> int | None:
  """Returns the bytes free on this process's first device, None if unknown."""
  stats = jax.local_devices()[0].memory_stats()
  return stats and stats['bytes_limit'] - stats['bytes_in_use']


def largest_block(step: Any, most: int, *args: Any) -> int:
  """Returns the number of candidates that a step can score at once.

  It is 1 where the device does not report its free memory.

  Args:
    step: jitted step that scores one candidate at a time.
    most: upper bound of the result.
    *args: arguments of the step.
  """
  free = free_bytes()
  if free is None or most == 1:
    return 1
  per_candidate = max(1, memory_needed(step, *args).temporary)
  block = min(most, max(1, int(0.9 * free) // per_candidate))
  logging.info(
    'a candidate takes %.1f GiB of the %.1f GiB free: %d at once',
    per_candidate / 2**30,
    free / 2**30,
    block,
  )
  return block


def halve_on_oom(
  make: Callable[[int], Callable], block: int
) -> tuple[Callable, list]:
  """Returns a function that halves its block, once, if memory runs out.

  The function waits for its results. If memory runs out with half the block
  too, it raises the `JaxRuntimeError`.

  Args:
    make: block -> jitted function.
    block: the first block.

  Returns:
    (the function, the list of the jitted functions that were made so far).
  """
  made = [make(block)]

  def call(*args):
    try:
      return jax.block_until_ready(made[-1](*args))
    except jax.errors.JaxRuntimeError as error:
      if len(made) > 1 or block == 1 or 'RESOURCE_EXHAUSTED' not in str(error):
        raise
    logging.warning(
      'out of memory with search.block=%d; going on with %d', block, block // 2
    )
    made.append(make(block // 2))
    return jax.block_until_ready(made[-1](*args))

  return call, made
