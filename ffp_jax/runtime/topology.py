"""TPU slices that are not here: their devices to compile for, their chips.

The devices come from the TPU's own compiler, in the package libtpu, which needs
no TPU to compile.
"""

import importlib
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ffp_jax.errors import RequestError

INSTALL = "pip install 'libtpu==0.0.42.*'"


class Chip(NamedTuple):
  """What one chip can do at best; a chip is one device."""

  tflops: float  # 10^12 bfloat16 operations a second
  hbm_gib: float  # GiB of memory that the compiler has for a program
  hbm_gb: float  # GB that the memory reads or writes a second
  ici_gb: float  # GB that all its links together receive a second
  dcn_gb: float | None  # GB that it receives a second from other slices
  options: dict[str, Any]  # of the compiler, to have one device a chip


# Peak and bandwidths: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e.
# Those pages give the links in both directions (v5e 400, v5p 1200, v6e 800
# GB/s), of which half is received; for v4 the all-reduce bandwidth of a pod,
# 1.1 PB/s of 4096 chips, which is that half on the other pages that give it.
# The network between slices: of a pod of 256 chips (v5e, v6e) or of a chip
# (v5p); v4's page does not say.
# Memory: what the compiler of libtpu 0.0.42.1 says that it has, of 32, 16, 95
# and 32 on those pages.
CHIPS = {
  'v4': Chip(275, 30.75, 1200, 268, None, {'chip_config_name': 'megacore'}),
  'v5e': Chip(197, 15.75, 819, 200, 3.125, {}),
  'v5p': Chip(459, 95.74, 2765, 600, 6.25, {}),
  'v6e': Chip(918, 31.25, 1638, 400, 12.5, {}),
}


class NoCompiler(Exception):
  """The TPU's compiler is not installed here."""


def parse(name: str) -> tuple[Chip, int]:
  """Returns the chip of a topology and the number of chips.

  Args:
    name: such as v5e:4x4.

  Raises:
    RequestError: the name is in another form, or of an unknown chip.
  """
  found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
  if not found or found[1] not in CHIPS:
    raise RequestError(
      f'--topology: {name!r} is not a chip ({", ".join(CHIPS)}) and a shape, '
      'as in v5e:4x4 or v5p:2x2x1'
    )
  return CHIPS[found[1]], math.prod(int(n) for n in found[2].split('x'))


def find_devices(name: str, slices: int = 1) -> list[jax.Device]:
  """Returns the devices of a topology; nothing can be run on them.

  Args:
    name: such as v5e:4x4.
    slices: number of such slices, connected by a network.

  Raises:
    NoCompiler: libtpu is not installed.
    RequestError: the compiler knows no such topology.
  """
  chip, count = parse(name)
  for key, value in {
    # It neither asks for the metadata of a host in the cloud, nor claims a TPU
    # that another process has, nor writes logs about either.
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_LOG_DIR': 'disabled',
  }.items():
    os.environ.setdefault(key, value)
  options = dict(chip.options)
  if count == 1:  # otherwise hosts have four
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    importlib.import_module('libtpu')
  except ImportError as error:
    raise NoCompiler(str(error)) from error
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=name, num_slices=slices, **options
    )
  except jax.errors.JaxRuntimeError as error:
    raise RequestError(f'--topology: {name}: {error}') from error
  return list(found.devices)
