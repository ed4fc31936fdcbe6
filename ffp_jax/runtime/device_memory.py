"""What a compiled function takes, and how to go on when it is too much."""

from typing import NamedTuple

import jax
from absl import logging


class Memory(NamedTuple):
  """Bytes on one device while a compiled function runs."""

  arguments: int
  temporary: int
  output: int

  @property
  def total(self) -> int:
    return sum(self)


def memory_needed(function, *args, **kwargs) -> Memory:
  """What a jitted function takes; it is compiled, not run.

  Args:
    function: jitted.
    *args, **kwargs: arrays, or `jax.ShapeDtypeStruct`s with shardings.
  """
  stats = function.lower(*args, **kwargs).compile().memory_analysis()
  return Memory(
    stats.argument_size_in_bytes,
    stats.temp_size_in_bytes,
    stats.output_size_in_bytes - stats.alias_size_in_bytes,
  )


def free_bytes() -> int | None:
  """Bytes left on this process's first device; None if it doesn't tell."""
  stats = jax.local_devices()[0].memory_stats()
  return stats and stats['bytes_limit'] - stats['bytes_in_use']


def largest_block(step, most: int, *args) -> int:
  """How many candidates a step can score at once.

  Args:
    step: jitted, scoring one at a time.
    most: no more than so many.
    *args: of the step.
  """
  left = free_bytes()
  if left is None or most == 1:
    return 1
  each = max(1, memory_needed(step, *args).temporary)
  block = min(most, max(1, int(0.9 * left) // each))
  logging.info(
    'a candidate takes %.1f GiB of the %.1f GiB free: %d at once',
    each / 2**30,
    left / 2**30,
    block,
  )
  return block


def halve_on_oom(make, block: int):
  """A function that halves its block, once, if memory runs out.

  Args:
    make: block -> jitted function.
    block: to begin with.

  Returns:
    (the function, the list of what `make` has made so far).
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
