"""The configuration of the decoder, which is all that families differ in."""

import dataclasses

from ffp_jax.models import rope


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Holds every size and choice that the decoder needs.

  `kept_groups` and `kept_ffn` hold the number of units of each layer of a
  sliced model. Both are None for a dense model, whose layers are alike and
  are scanned.
  """

  vocab: int
  width: int
  layers: int
  groups: int  # K
  heads_per_group: int  # G
  head_size: int  # H
  ffn: int  # F
  norm: str = 'rms'  # 'rms', 'layer' or, without parameters, 'bare_layer'
  norm_eps: float = 1e-5
  pre_norm: bool = True
  final_norm: bool = True
  positions: str = 'rope'  # 'rope' or 'learned'
  rope_theta: float = 10000.0
  rope_scaling: rope.Scaling = rope.Scaling()
  max_positions: int = 2048
  position_offset: int = 0  # rows of the position table before position 0
  activation: str = 'silu'
  gated: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: bool = False  # whether each query and key head has an RMSNorm
  ffn_bias: bool = False
  window: int | None = None  # tokens of sliding-window attention
  tied: bool = False  # whether the head is the embedding table
  refit: bool = False  # whether masks refit what they keep, see removed.py
  adapter_rank: int = 0  # of the low-rank updates, see adapters.py; 0 for none
  embed_width: int | None = None  # None if embeddings are not projected
  kept_groups: tuple[int, ...] | None = None
  kept_ffn: tuple[int, ...] | None = None

  @property
  def sliced(self) -> bool:
    """Whether the layers may differ in width."""
    return self.kept_ffn is not None

  def widths(self, layer: int) -> tuple[int, int]:
    """Returns the key/value groups and the FFN channels of one layer."""
    if self.kept_groups is None or self.kept_ffn is None:
      return self.groups, self.ffn
    return self.kept_groups[layer], self.kept_ffn[layer]
