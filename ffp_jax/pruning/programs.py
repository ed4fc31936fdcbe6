"""The programs of a run: the jitted functions that it calls, and their shapes.

No weights and no devices are needed, and nothing is computed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from ffp_jax import config as config_lib
from ffp_jax.evaluation import scoring
from ffp_jax.evaluation.loss import make_nll
from ffp_jax.models import adapters, removed
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import (
  abstract,
  allocation,
  calibration,
  flops,
  importance,
  masks,
  recovery,
  refit,
  search,
)
from ffp_jax.pruning.sublayers import find_sublayers

_RANK = 8  # of LoRA, where the config has none


class Program(NamedTuple):
  """A jitted function, and the abstract arguments that a run calls it with."""

  name: str
  function: Any
  arguments: tuple
  keywords: dict
  flops: flops.Flops
  parts: int  # devices that the FLOPs are shared by; the others repeat them
  reads: int  # bytes of weights that a device multiplies by, in all passes
  beside: int  # bytes on a device besides: its own, less arguments that share
  calls: int  # of the run; 0 where it would only with other settings
  taken: float = 1.0  # share of the executions of conditionals that do work


def list_programs(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  dtype: jnp.dtype,
  mesh: Mesh,
) -> list[Program]:
  """Returns the programs of a run that take time, in the order of the run.

  Args:
    config: of the run.
    model: of the dense decoder.
    dtype: of the weights.
    mesh: of the devices.
  """
  params = abstract.params(model, dtype, mesh)
  programs = [
    _importance(config, model, params, mesh),
    _scoring(
      'scoring, a window',
      *(config.text.context, model, params, mesh),
      calls=_windows_scored(config),
    ),
  ]
  if config_lib.refits(config):
    programs.append(_refit_layer(config, model, params, mesh))
  programs.append(search_step(config, model, dtype, mesh))
  scored = _scored(config, model)
  rows = config.text.reward_windows * config.text.context
  again = _scoring(
    're-scoring, a row',
    *(config.search.context, scored, abstract.params(scored, dtype, mesh)),
    *(mesh, config.budget.sparsity),
    calls=(1 + config.search.finalists) * (rows // config.search.context),
  )
  programs.append(again)
  if config.calibration.enabled:
    programs.append(_calibrate_layer(config, model, params, mesh))
  for rank in 0, config.recovery.rank or _RANK:
    programs.append(_recovery_step(config, model, params, rank, mesh))
  return programs


def _windows_scored(config) -> int:
  """Returns how many windows of text a run scores models of dense shape on.

  They are the reward text, for the dense loss; the held-out text and that of
  another kind, for the reported figures; and validation in recovery.
  """
  text, settings = config.text, config.recovery
  models = 5 if config.calibration.enabled else 3
  models += 2 if text.other else 0
  validations = 0
  if settings.tokens:
    models += 2 if text.other else 1
    validations = 1 + -(-settings.tokens // settings.every)
  return (
    text.reward_windows
    + models * text.heldout_windows
    + validations * text.validation_windows
  )


def _output_projections(params: dict) -> tuple:
  """Returns what refit and calibration change."""
  stack = params['stack']
  return stack['attention']['out'], stack['ffn']['down']


def _reads(params: dict, mesh: Mesh, passes: int, sparsity: float = 0.0) -> int:
  """Returns the bytes of weights that a device reads in some passes.

  What `fsdp` splits is gathered first, so that a device multiplies by all of
  it.

  Args:
    params: on all devices.
    mesh: of the devices.
    passes: number of them.
    sparsity: of the masks, on which a refit model's depend.
  """
  factors = abstract.local_bytes(removed.find_factors(params))
  used = removed.used_share(sparsity) * factors
  total = abstract.local_bytes(params) - factors + int(used)
  return passes * total * mesh.shape['fsdp']


def _parts(mesh: Mesh, rows: int = 0) -> int:
  """Returns how many devices share the FLOPs of a program.

  Args:
    mesh: of the devices.
    rows: that the axis `candidates` splits; without any it idles.
  """
  size = mesh.shape['candidates']
  return mesh.size // (1 if rows and rows % size == 0 else size)


def _importance(config, model, params, mesh) -> Program:
  text = config.text
  return Program(
    name='importance',
    function=importance.make_measure(model),
    arguments=(
      params,
      abstract.tokens(text.calibration_windows, 1, text.context),
    ),
    keywords={},
    flops=flops.importance(config, model),
    parts=_parts(mesh),
    reads=_reads(params['stack'], mesh, text.calibration_windows),
    beside=0,
    calls=1,
  )


def _scoring(
  name, context, model, params, mesh, sparsity=0.0, *, calls
) -> Program:
  """Returns the loss of a window of masked candidates or the dense model."""
  return Program(
    name=name,
    function=scoring.make_mean_nll(model),
    arguments=(
      params,
      abstract.tokens(1, context),
      abstract.tokens(2),
      abstract.keep(model),
    ),
    keywords={},
    flops=flops.scoring(model, context, sparsity),
    parts=_parts(mesh),
    reads=_reads(params, mesh, 1, sparsity),
    beside=0,
    calls=calls,
    taken=removed.used_share(sparsity),
  )


def _refit_layer(config, model, params, mesh) -> Program:
  """Returns the refit of the last layer: all others are there already."""
  windows = config.text.calibration_windows
  layer, keep = abstract.first_layer(params, abstract.keep(model))
  ranks = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32), keep)
  dtype = params['embed']['table'].dtype
  scored = abstract.params(_scored(config, model), dtype, mesh)
  new = removed.find_factors(scored)
  return Program(
    name='refit, a layer',
    function=refit.refit_layer,
    arguments=(
      layer,
      abstract.streams(windows, config, model, params, mesh),
      ranks,
    ),
    keywords={'config': model, 'strength': float(config.search.refit)},
    flops=flops.refit_layer(config, model),
    parts=_parts(mesh),
    reads=_reads(layer, mesh, windows),
    beside=abstract.local_bytes((params, new)),
    calls=model.layers,
  )


def _scored(config, model: ModelConfig) -> ModelConfig:
  """Returns the decoder that scores candidates."""
  return dataclasses.replace(model, refit=config_lib.refits(config))


def search_step(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  dtype: jnp.dtype,
  mesh: Mesh,
) -> Program:
  """Returns a step of the stage with the most rows; see `list_programs`."""
  c = config.search
  scored = _scored(config, model)
  params = abstract.params(scored, dtype, mesh)
  sublayers = find_sublayers(
    model,
    round_heads=config.budget.round_heads,
    round_ffn=config.budget.round_ffn,
    floor=config.budget.floor,
  )
  net, optim = search.make_policy(config, sublayers)
  nll = make_nll(scored, remat=c.remat)
  block = c.block or 1

  def others():
    rank = masks.rank_all(masks.ones(model.layers, model.groups, model.ffn))
    return (
      search.initial_state(config, sublayers),
      allocation.make_target(sublayers, config.budget.sparsity),
      allocation.to_device(sublayers, rank),
    )

  state, target, device_sublayers = jax.eval_shape(others)
  tokens = abstract.tokens(max(c.rows), c.context)
  parts = _parts(mesh, c.candidates)
  turns = -(-c.candidates // (mesh.shape['candidates'] * block))
  passes, sparsity = flops.search_passes(config) * turns, config.budget.sparsity
  return Program(
    name='search step',
    function=search.make_step(net, optim, nll, config, block),
    arguments=(
      state,
      params,
      tokens,
      abstract.scalar(),
      target,
      device_sublayers,
    ),
    keywords={},
    flops=flops.search_step(config, scored),
    parts=parts,
    reads=_reads(params, mesh, passes, sparsity),
    beside=0,
    calls=sum(c.steps),
    taken=removed.used_share(sparsity),
  )


def _calibrate_layer(config, model, params, mesh) -> Program:
  """Returns the calibration of the last layer: all others are there already."""
  text = config.text
  windows = config.calibration.windows or text.calibration_windows
  fit, check = (
    abstract.streams(n, config, model, params, mesh)
    for n in (windows, text.validation_windows)
  )
  # ty: ignore[invalid-argument-type]
  streams = calibration.Streams(fit, check)
  layer, keep = abstract.first_layer(params, abstract.keep(model))
  return Program(
    name='calibration, a layer',
    function=calibration.calibrate_layer,
    arguments=(layer, streams, keep),
    keywords={
      'config': model,
      'strengths': tuple(config.calibration.strengths),
    },
    flops=flops.calibrate_layer(config, model),
    parts=_parts(mesh),
    reads=_reads(layer, mesh, windows + text.validation_windows),
    beside=abstract.local_bytes((params, _output_projections(params))),
    calls=2 * model.layers,
  )


def _recovery_step(config, model, params, rank, mesh) -> Program:
  """Returns a training step of recovery.

  Beside it lies the best state so far. The dense model and the trained one
  share what calibration and training don't change.

  Args:
    config: of the run.
    model: of the dense decoder.
    params: of it.
    rank: of the low-rank updates, 0 to train every weight.
    mesh: of the devices.
  """
  settings = config.recovery
  if rank:
    trained = abstract.place(adapters.factor_shapes(model, rank), mesh)
    frozen = params
    beside = abstract.local_bytes((trained, _output_projections(params)))
    beside -= abstract.local_bytes(params)
  else:
    trained, frozen = abstract.params(model, jnp.float32, mesh), {}
    beside = abstract.local_bytes(trained)
  optim = recovery.optimizer()
  moments = optax.tree_utils.tree_map_params(
    optim, lambda _, x: x, jax.eval_shape(optim.init, trained), trained
  )
  tokens = abstract.tokens(
    settings.accumulate, settings.rows, config.text.context
  )
  calls = settings.tokens // config_lib.recovery_batch(config)
  passes = 1 + (3 if settings.remat else 2)  # of the dense model, of the pruned
  return Program(
    name=f'recovery, rank {rank}' if rank else 'recovery, all',
    function=recovery.make_step(
      recovery.make_loss(
        model,
        rank=rank,
        cross_entropy=settings.cross_entropy,
        remat=settings.remat,
      ),
      optim,
      recovery.schedule(peak=1.0, warmup=1, steps=2),
    ),
    arguments=(
      trained,
      moments,
      abstract.tokens(),
      abstract.scalar(),
      frozen,
      params,
      abstract.keep(model),
      tokens,
    ),
    keywords={},
    flops=flops.recovery_step(config, model, rank),
    parts=_parts(mesh, settings.rows),
    reads=_reads(params, mesh, passes * settings.accumulate),
    beside=beside,
    calls=calls if rank == settings.rank else 0,
  )
