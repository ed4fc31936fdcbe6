"""What a compiler says of the programs of a run, before there are devices."""

import time
from typing import NamedTuple

import jax
import ml_collections

from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import abstract
from ffp_jax.pruning.programs import Program
from ffp_jax.runtime import collectives, device_memory, topology

# A product of float32 matrices at full precision is six of bfloat16 ones on a
# TPU: docs.jax.dev/en/latest/jax.lax.html, Precision.HIGHEST.
_FULL_PRECISION_PASSES = 6


class Compiled(NamedTuple):
  """What a compiler says of a program, for each device."""

  program: Program
  seconds: float  # of tracing and compiling it
  arguments: int  # bytes
  temporary: int  # bytes
  total: int  # bytes, with results and with what lies beside; see `Program`
  collectives: list[collectives.Collective]

  @property
  def received(self) -> float:
    """Bytes that the device receives from others of its slice."""
    return sum(
      x.size * x.times
      for x in self.collectives
      if x.kind != collectives.BETWEEN_SLICES
    )

  @property
  def received_between_slices(self) -> float:
    """Bytes that the device receives from other slices."""
    return sum(x.size * x.times for x in self.collectives) - self.received


class TooLarge(NamedTuple):
  """A program that the compiler refuses because it can't fit."""

  program: Program
  message: str


def compile_for_topology(
  program: Program, mesh: jax.sharding.Mesh
) -> Compiled | TooLarge:
  """Compiles a program by the TPU's own compiler.

  Args:
    program: of a run with the weights' own type.
    mesh: of devices from `topology.find_devices`.
  """
  start = time.perf_counter()
  try:
    compiled = _compile(program, mesh)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return TooLarge(program, str(error).splitlines()[0])
  seconds = time.perf_counter() - start
  memory = device_memory.memory_of(compiled)
  return Compiled(
    program,
    seconds,
    memory.arguments,
    memory.temporary,
    memory.total + program.beside,
    collectives.find_collectives(compiled.as_text(), program.taken),
  )


def compile_for_cpu(
  program: Program, widened: Program, mesh: jax.sharding.Mesh
) -> Compiled:
  """Compiles a program by the CPU's compiler, an upper bound of its memory.

  As that compiler widens bfloat16, temporaries and results are those in
  float32. Arguments are counted in the weights' own type.

  Args:
    program: of a run with the weights' own type.
    widened: the same program in float32.
    mesh: of virtual devices.
  """
  start = time.perf_counter()
  memory = device_memory.memory_of(_compile(widened, mesh))
  seconds = time.perf_counter() - start
  arguments = abstract.local_bytes(program.arguments)
  total = arguments + memory.temporary + memory.output + program.beside
  return Compiled(program, seconds, arguments, memory.temporary, total, [])


def _compile(program, mesh):
  with jax.set_mesh(mesh):
    lowered = program.function.lower(*program.arguments, **program.keywords)
    return lowered.compile()


def bounds(compiled: Compiled, chip: topology.Chip) -> dict[str, float]:
  """Returns the seconds that a program takes at least, by what limits it.

  FLOPs at the peak of bfloat16; the weights read from memory once in each pass,
  and nothing else; what a chip receives on all its links together, and over the
  network from other slices.
  """
  program = compiled.program
  total, full = program.flops
  operations = total + (_FULL_PRECISION_PASSES - 1) * full
  found = {
    'FLOPs': operations / program.parts / (chip.tflops * 1e12),
    'memory': program.reads / (chip.hbm_gb * 1e9),
    'links': compiled.received / (chip.ici_gb * 1e9),
  }
  if chip.dcn_gb:
    between = compiled.received_between_slices
    found['network'] = between / (chip.dcn_gb * 1e9)
  return found


def longest_bound(compiled: Compiled, chip: topology.Chip) -> tuple[str, float]:
  """Returns the longest of `bounds`: what limits a program, and its seconds."""
  return max(bounds(compiled, chip).items(), key=lambda item: item[1])


def list_meshes(
  config: ml_collections.ConfigDict, model: ModelConfig, devices: int
) -> list[tuple[int, int, int]]:
  """Returns the meshes of all devices whose every axis splits something.

  `candidates` must divide the candidates of a step, `fsdp` the model width, and
  `tensor` the channels and the groups or else the query heads of a group.

  Args:
    config: of the run.
    model: of the dense decoder.
    devices: number of them.

  Returns:
    Sizes of candidates, fsdp and tensor.
  """
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]
  return [
    (candidates, fsdp, devices // candidates // fsdp)
    for candidates in divisors
    for fsdp in divisors
    if devices % (candidates * fsdp) == 0
    and config.search.candidates % candidates == 0
    and model.width % fsdp == 0
    and _splits_layers(model, devices // candidates // fsdp)
  ]


def _splits_layers(model: ModelConfig, tensor: int) -> bool:
  heads = model.groups, model.heads_per_group
  return model.ffn % tensor == 0 and any(n % tensor == 0 for n in heads)
