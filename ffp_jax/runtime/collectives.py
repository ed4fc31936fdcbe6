"""What the devices of a compiled program exchange, read from its HLO text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BETWEEN_SLICES = 'between slices'  # over the network, whatever is computed
KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  BETWEEN_SLICES,
)

_COMPUTATION = re.compile(r'^(ENTRY )?%([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(
  r'^\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\(([^)]*)\)'
)
_CALLED = re.compile(
  r'(calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)'
  r'|(?:branch_computations|called_computations)=\{([^}]*)\}'
)


class _Instruction(NamedTuple):
  root: bool  # whether its computation returns it
  shape: str  # of the result
  opcode: str
  operands: list[str]  # their names
  line: str


class Collective(NamedTuple):
  """One collective of a program."""

  kind: str  # one of KINDS
  result: str  # type and shape on one device, such as bf16[1,128]
  size: int  # bytes that a device receives each time, at the least
  times: float  # how often it is executed
  # [groups, devices of each], indices in the mesh, flat; none between slices
  groups: np.ndarray
  loops: int  # number of loops that it is in


def find_collectives(hlo: str, taken: float = 1.0) -> list[Collective]:
  """Returns the collectives of a program.

  A loop's are executed as often as its counter says, those of a loop in a loop
  as often as both say together. A counter whose start is computed is taken to
  start at 0, and a loop whose end is computed counts once. The bytes are those
  of an exchange in which no device receives what it does not need: of n devices
  in a group, (n - 1) / n of what is gathered, twice that of what is reduced to
  all.

  Args:
    hlo: text of a compiled program for one of its devices, optimised.
    taken: how often each branch of a conditional is executed, as a share.

  Raises:
    ValueError: the groups of a collective are in an unknown form.
  """
  computations, entry = _split(hlo)
  return list(_walk(computations, entry, 1, 0, set(), taken))


def _split(hlo: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
  """Returns each computation's instructions by name, and the entry's name."""
  computations: dict[str, dict[str, _Instruction]] = {}
  name = entry = ''
  for line in hlo.splitlines():
    if found := _COMPUTATION.match(line):
      name = found[2]
      computations[name] = {}
      entry = name if found[1] else entry
    elif found := _INSTRUCTION.match(line):
      root, own, shape, opcode, inside = found.groups()
      operands = re.findall(r'%([\w.-]+)', inside)
      instruction = _Instruction(bool(root), shape, opcode, operands, line)
      computations[name][own] = instruction
  return computations, entry


def _walk(
  computations, name, times, loops, seen, taken
) -> Iterator[Collective]:
  """Yields the collectives of a computation and of those that it calls.

  Args:
    computations: from `_split`.
    name: of the computation.
    times: how often it is executed.
    loops: number of loops around it.
    seen: channels of the collectives that run beside other work, which are
      written once in each piece of that work.
    taken: see `find_collectives`.
  """
  own = computations[name]
  for x in own.values():
    if kind := _kind(x):
      channel = re.search(r'channel_id=(\d+).*chain_id=', x.line)
      if not channel or channel[1] not in seen:
        seen |= {channel[1]} if channel else set()
        scattered = name.startswith('all-reduce-scatter')
        yield _read(x, kind, scattered, times, loops)
      continue
    for role, callee, callees in _CALLED.findall(x.line):
      for called in re.findall(r'[\w.-]+', callee or callees):
        count, depth, known = times, loops, seen
        if role == 'body':
          count *= _trips(computations, own, x)
          depth, known = loops + 1, set(seen)
        elif x.opcode == 'conditional':
          count *= taken
        yield from _walk(computations, called, count, depth, known, taken)


def _kind(x: _Instruction) -> str | None:
  """Returns the kind of a collective; None for its end and for all else."""
  if x.opcode == 'recv' and 'is_host_transfer=true' in x.line:
    return BETWEEN_SLICES
  name = x.opcode.removesuffix('-start')
  return name if name in KINDS else None


def _trips(computations, own, loop: _Instruction) -> int:
  """Returns how often a loop runs, 1 if no counter ends it.

  A counter is compared with a constant in the loop's condition, and the body
  adds a constant to it.

  Args:
    computations: from `_split`.
    own: the instructions beside the loop.
    loop: a while.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
    return int(known[1])
  called = dict(re.findall(r'(condition|body)=%([\w.-]+)', loop.line))
  condition, body = (computations[called[x]] for x in ('condition', 'body'))
  (root,) = (x for x in condition.values() if x.root)
  if root.opcode != 'compare' or 'direction=LT' not in root.line:
    return 1
  counter, limit = (condition.get(name) for name in root.operands)
  found = re.search(r'get-tuple-element\(.*\), index=(\d+)', counter.line)
  end = _constant(condition, limit)
  if not found or end is None:
    return 1
  index = int(found[1])
  first = _constant(own, own[own[loop.operands[0]].operands[index]])
  (last,) = (x for x in body.values() if x.root)
  added = body[last.operands[index]]
  steps = [_constant(body, body[name]) for name in added.operands]
  step = next((n for n in steps if n), 1)
  return -(-(end - (first or 0)) // step)


def _constant(own, x: _Instruction) -> int | None:
  """Returns the value of an integer constant or its copy, None of all else."""
  while x.opcode in ('copy', 'bitcast', 'convert'):
    x = own[x.operands[0]]
  found = re.search(r' constant\((\d+)\)', x.line)
  return int(found[1]) if found else None


def _read(x: _Instruction, kind, scattered, times, loops) -> Collective:
  """Returns a collective from its instruction; see `_walk`.

  An all-reduce of which each device keeps a part (`scattered`) is fused into a
  reduce-scatter.
  """
  shape = x.shape
  if x.opcode.endswith('-start') and kind != 'all-reduce' and shape[0] == '(':
    shape = _second(shape)  # the first is the operand
  arrays = re.findall(r'([a-z]+\d*\w*)\[([\d,]*)\]', shape)
  if kind == BETWEEN_SLICES:
    arrays = arrays[:1]  # others are of the transfer itself
    groups = np.zeros((0, 1), int)
  else:
    groups = _groups(x.line)
  size = sum(_bytes(dtype, dims) for dtype, dims in arrays)
  result = ' '.join(f'{dtype}[{dims}]' for dtype, dims in arrays)
  n = groups.shape[1]
  if kind == 'all-reduce':
    kind = 'reduce-scatter' if scattered else kind
    size = size * (n - 1) * (1 if scattered else 2) // n
  elif kind == 'reduce-scatter':
    size = size * (n - 1)
  elif kind in ('all-gather', 'all-to-all'):
    size = size * (n - 1) // n
  return Collective(kind, result, size, times, groups, loops)


def _second(shape: str) -> str:
  """Returns the second item of a tuple's shape."""
  depth, start, items = 0, 1, []
  for i, x in enumerate(shape):
    depth += (x in '({[') - (x in ')}]')
    if (x == ',' and depth == 1) or depth == 0:
      items.append(shape[start:i])
      start = i + 1
  return items[1]


def _bytes(dtype: str, dims: str) -> int:
  """Returns the bytes of an array, such as bf16 and '1,128'."""
  digits = re.search(r'\d+', dtype)
  bits = int(digits[0]) if digits else 8  # pred
  return math.prod(int(x) for x in dims.split(',') if x) * bits // 8


def _groups(line: str) -> np.ndarray:
  """Returns the devices that take part together, [groups, devices of each]."""
  if pairs := re.search(r'source_target_pairs=\{((?:\{[\d,]+\},?)*)\}', line):
    return _lists(pairs[1])
  if lists := re.search(r'replica_groups=\{((?:\{[\d,]+\},?)+)\}', line):
    return _lists(lists[1])
  iota = r'\[[\d,]+\](?:T\([\d,]+\))?'
  if found := re.search(rf'replica_groups=\[([\d,]+)\]<=({iota})', line):
    return _iota(found[2]).reshape(_numbers(found[1]))
  found = re.search(
    rf'replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(({iota})\))? '
    r'\{([^}]*)\}',
    line,
  )
  if not found:
    raise ValueError(f'replica groups of an unknown form: {line.strip()}')
  axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
  sizes = [int(n) for n in axes.values()]
  devices = _iota(found[2] or f'[{math.prod(sizes)}]').reshape(sizes)
  return _along(devices, list(axes), found[3])


def _along(devices: np.ndarray, names: list[str], axes: str) -> np.ndarray:
  """Returns groups along axes of a mesh.

  Args:
    devices: of the mesh, an axis for each of `names`.
    names: of its axes.
    axes: names such as 'x', or for the part of n devices of one of which m are
      before it, 'x':(m)n.
  """
  inner = []
  for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
    i = names.index(name)
    if size:  # one axis becomes three
      shape = devices.shape
      part = int(before), int(size), -1
      devices = devices.reshape(*shape[:i], *part, *shape[i + 1 :])
      names = [
        *names[:i],
        f'{name}<',
        f'{name}:{before}',
        name,
        *names[i + 1 :],
      ]
      name = f'{name}:{before}'
    inner.append(name)
  order = [x for x in names if x not in inner] + inner
  count = math.prod(devices.shape[names.index(x)] for x in inner)
  return devices.transpose([names.index(x) for x in order]).reshape(-1, count)


def _iota(text: str) -> np.ndarray:
  """Returns the device indices of '[2,4]T(1,0)', transposed."""
  sizes, *order = re.findall(r'[\d,]+', text)
  sizes = _numbers(sizes)
  devices = np.arange(math.prod(sizes)).reshape(sizes)
  return devices.transpose(_numbers(order[0])) if order else devices


def _lists(text: str) -> np.ndarray:
  """Returns the groups of '{0,1},{2,3}'."""
  return np.array([_numbers(x) for x in re.findall(r'\{([\d,]+)\}', text)])


def _numbers(text: str) -> list[int]:
  """Returns the numbers of '1,2'."""
  return [int(x) for x in text.split(',')]
