"""One step of recovery to measure, described alike for JAX and PyTorch.

Imports neither of them, so that each has its own process.
"""

import dataclasses
import json
from typing import Self

import numpy as np

RATE = 1e-4
MAX_NORM = 1.0
DECAYS = 0.9, 0.95
_MATMUL = 2048  # rows and columns


@dataclasses.dataclass(frozen=True)
class Setting:
  """A model, what it has lost, and what it is trained on.

  Attributes:
    model: directory of the dense model.
    vocab: its token ids.
    units: groups and FFN channels of its layers.
    kept: of these the number that each layer keeps, [L] and [L].
    sliced: whether the pruned model is smaller, rather than masked.
    rank: of low-rank updates; 0 to train every weight.
    rows: windows a step.
    context: tokens of each.
  """

  model: str
  vocab: int
  units: tuple[int, int]
  kept: tuple[list[int], list[int]]
  sliced: bool
  rank: int
  rows: int
  context: int

  @classmethod
  def parse(cls, text: str) -> Self:
    """Returns the setting that `format` has written."""
    return cls(**json.loads(text))

  def format(self) -> str:
    """Returns the setting as JSON."""
    return json.dumps(dataclasses.asdict(self))

  def tokens(self, step: int) -> np.ndarray:
    """Returns the random batch of a step, int32 [B,T]."""
    source = np.random.default_rng(step)
    shape = self.rows, self.context
    return source.integers(0, self.vocab, shape, np.int32)

  def masks(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns random masks, bool [L,K] and [L,F]."""
    source = np.random.default_rng(0)

    def keep(units, kept):
      mask_LxU = np.arange(units) < np.array(kept)[:, None]
      return source.permuted(mask_LxU, axis=1)

    attention, ffn = map(keep, self.units, self.kept)
    return attention, ffn

  def kept_features(self, layer: int, name: str, size: int) -> np.ndarray:
    """Returns which inputs or outputs of a linear layer are kept, bool [size].

    Args:
      layer: its number.
      name: 'out' or 'down' for their inputs, 'query', 'key', 'value', 'gate'
        or 'up' for their outputs.
      size: how many there are, a multiple of the units.
    """
    mask_LxU = self.masks()[name in ('gate', 'up', 'down')]
    return np.repeat(mask_LxU[layer], size // mask_LxU.shape[1])

  def factor(self, layer: int, name: str, inputs: int) -> np.ndarray:
    """Returns the first factor A of a low-rank update, float32 [inputs, rank].

    Rows of removed inputs are zero, and left out of a sliced model.

    Args:
      layer: number of the layer.
      name: of the weight.
      inputs: of the dense model.
    """
    source = np.random.default_rng([layer, *name.encode()])
    a = source.standard_normal((inputs, self.rank), np.float32)
    a /= np.float32(np.sqrt(inputs))
    if name not in ('out', 'down'):
      return a
    keep = self.kept_features(layer, name, inputs)
    return a[keep] if self.sliced else a * keep[:, None]


def matrices() -> tuple[np.ndarray, np.ndarray]:
  """Returns float32 matrices whose product measures the machine's rate."""
  source = np.random.default_rng(0)
  a, b = source.standard_normal((2, _MATMUL, _MATMUL), np.float32)
  return a, b


def matmul_flops() -> int:
  """Returns the FLOPs of their product."""
  return 2 * _MATMUL**3
