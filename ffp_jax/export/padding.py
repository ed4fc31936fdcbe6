"""Pads a model's layers with units of zeros.

The order of units doesn't matter. A unit of zeros adds nothing, since every
activation function is 0 at 0 and so the output projection gets zeros.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ffp_jax.checkpoints.model import Model
from ffp_jax.models import families
from ffp_jax.models.decoder import ModelConfig


def dense(config: ModelConfig) -> ModelConfig:
  """Returns the config of a pruned model in the dense model's shapes."""
  return dataclasses.replace(config, kept_groups=None, kept_ffn=None)


def with_units(
  config: ModelConfig, groups: int = 1, channels: int = 1
) -> ModelConfig:
  """Returns a config whose layers all have so many units at least."""
  if config.kept_groups is None or config.kept_ffn is None:
    return config
  return dataclasses.replace(
    config,
    kept_groups=tuple(max(groups, k) for k in config.kept_groups),
    kept_ffn=tuple(max(channels, f) for f in config.kept_ffn),
  )


def notes(own: ModelConfig, wider: ModelConfig, runtime: str) -> list[str]:
  """Returns what to say of sublayers that had no unit and now have one."""
  count = sum(
    had == 0 != has
    for i in range(own.layers)
    for had, has in zip(own.widths(i), wider.widths(i), strict=True)
  )
  if not count:
    return []
  return [f'{count} sublayers without units have one of zeros for {runtime}']


def round_channels(config: ModelConfig, multiple: int) -> ModelConfig:
  """Returns a config whose layers have a multiple of so many FFN channels."""

  def round_up(channels):
    return -(-channels // multiple) * multiple

  if config.kept_ffn is None:
    return dataclasses.replace(config, ffn=round_up(config.ffn))
  kept = tuple(map(round_up, config.kept_ffn))
  return dataclasses.replace(config, kept_ffn=kept)


def padded_tensors(
  model: Model, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """Pads the tensors of a model, with zeros after the units that it has.

  Args:
    model: dense or sliced.
    config: whose shapes to give them; wider, and else the model's own.

  Yields:
    (Hugging Face name, array).
  """
  shapes = {
    tensor.name: families.stored_shape(tensor, shape)
    for tensor, _, _, shape in families.list_tensors(
      config, model.family, np.float32
    )
  }
  for name, value in model.tensors():
    sizes = zip(shapes.pop(name), value.shape, strict=True)
    yield name, np.pad(value, [(0, wide - own) for wide, own in sizes])
  for name, shape in shapes.items():  # of sublayers without units
    yield name, np.zeros(shape, value.dtype)
