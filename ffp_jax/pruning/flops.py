"""FLOPs of the programs of a run, on all devices together, from shapes alone.

What masks remove is computed and thrown away, and so is counted. A refit counts
with the share of its blocks that a sparsity uses.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ffp_jax.models import families, removed
from ffp_jax.models.decoder import ModelConfig


class Flops(NamedTuple):
  """FLOPs of one execution of a program."""

  total: float
  full: float = 0.0  # of them, in float32 at full precision


def forward_flops(
  model: ModelConfig, context: int, sparsity: float = 0.0
) -> tuple[float, float]:
  """Returns the FLOPs that a forward pass takes for each token.

  Args:
    model: of the decoder, dense or sliced.
    context: tokens that attention looks at; those that it masks count too.
    sparsity: of the masks; of those of a refit model alone the FLOPs depend.

  Returns:
    (FLOPs of the products with the weights, of those of attention).
  """
  plain = dataclasses.replace(model, refit=False)
  products = _size(families.param_shapes(plain, jnp.float32))
  if model.refit:
    factors = _size(families.param_shapes(model, jnp.float32)) - products
    products += removed.used_share(sparsity) * factors
  if not model.tied:  # the embedding is looked up, not multiplied
    products -= model.vocab * (model.embed_width or model.width)
  groups = sum(model.widths(i)[0] for i in range(model.layers))
  heads = groups * model.heads_per_group * model.head_size
  return 2 * products, 4 * heads * context


def _layers_flops(model: ModelConfig, context: int) -> float:
  """Returns those of `forward_flops` that all layers take together."""
  stack = families.param_shapes(model, jnp.float32)['stack']
  return 2 * _size(stack) + forward_flops(model, context)[1]


def _size(shapes) -> int:
  """Returns the number of parameters."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))


def scoring(model: ModelConfig, context: int, sparsity: float) -> Flops:
  """Returns the FLOPs of the loss of one window of text."""
  return Flops(context * sum(forward_flops(model, context, sparsity)))


def importance(config: ml_collections.ConfigDict, model: ModelConfig) -> Flops:
  """Returns the FLOPs of measuring the inputs of all output projections."""
  context = config.text.context
  tokens = config.text.calibration_windows * context
  return Flops(tokens * _layers_flops(model, context))


def search_step(config: ml_collections.ConfigDict, model: ModelConfig) -> Flops:
  """Returns the FLOPs of one search step.

  A candidate takes a forward pass and, if its gradient is wanted, a backward
  pass to activations and masks alone, which costs as much as a forward pass;
  `remat` adds another one.

  Args:
    config: of the run.
    model: of the decoder that scores candidates, refit or not.
  """
  c = config.search
  token = sum(forward_flops(model, c.context, config.budget.sparsity))
  forward = max(c.rows) * c.context * token
  return Flops(forward * c.candidates * search_passes(config))


def search_passes(config: ml_collections.ConfigDict) -> int:
  """Returns how often a candidate of the search goes through the weights."""
  if not config.policy.pathwise_weight:
    return 1
  return 3 if config.search.remat else 2


def refit_layer(config: ml_collections.ConfigDict, model: ModelConfig) -> Flops:
  """Returns the FLOPs of the refit of one layer.

  They are a forward pass, and for each sublayer with I inputs and D outputs
  the Gram matrix (5/8 of a full product, see `ridge.upper_gram`), its Cholesky
  factor and that factor's inverse (I^3 / 3 each) and one product with the
  weights.

  Args:
    config: of the run.
    model: of the dense decoder.
  """
  tokens = config.text.calibration_windows * config.text.context
  full = 0.0
  for size in _inputs(model):
    full += 1.25 * tokens * size**2
    full += size**3 * 2 / 3 + 2 * size**2 * model.width
  forward = tokens * _layers_flops(model, config.text.context) / model.layers
  return Flops(forward + full, full)


def calibrate_layer(
  config: ml_collections.ConfigDict, model: ModelConfig
) -> Flops:
  """Returns the FLOPs of the calibration of one layer.

  They are a forward pass of the calibration and validation windows, and for
  each sublayer their Gram matrices and products of I x I with I x D: two for
  the targets, one for the error without a change, and for each strength one
  for the residual, one for the error and two triangular solves, which cost as
  much as one, beside a Cholesky factor (I^3 / 3).

  Args:
    config: of the run.
    model: of the dense decoder.
  """
  text = config.text
  windows = config.calibration.windows or text.calibration_windows
  tokens = (windows + text.validation_windows) * text.context
  strengths = len(config.calibration.strengths)
  full = 0.0
  for size in _inputs(model):
    full += 1.25 * tokens * size**2 + strengths * size**3 / 3
    full += (3 + 3 * strengths) * 2 * size**2 * model.width
  forward = tokens * _layers_flops(model, text.context) / model.layers
  return Flops(forward + full, full)


def _inputs(model: ModelConfig) -> tuple[int, int]:
  """Returns the inputs of both output projections of a dense layer."""
  return model.groups * model.heads_per_group * model.head_size, model.ffn


def recovery_step(
  config: ml_collections.ConfigDict, model: ModelConfig, rank: int
) -> Flops:
  """Returns the FLOPs of one training step of recovery.

  A token takes a forward pass of the dense model, and of the pruned one a
  forward pass and a backward pass; this costs as much as two forward ones, or
  one where only low-rank updates are trained; `remat` adds one more.

  Args:
    config: of the run.
    model: of the dense decoder.
    rank: of the low-rank updates, 0 to train every weight.
  """
  passes = 1 + 1 + (1 if rank else 2) + (1 if config.recovery.remat else 0)
  context = config.text.context
  rows = config.recovery.rows * config.recovery.accumulate
  return Flops(passes * rows * context * sum(forward_flops(model, context)))
