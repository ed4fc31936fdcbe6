"""What a run works on: the model, its sublayers, the parts of its text."""

import pathlib
from typing import NamedTuple

import ml_collections
import numpy as np

from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.checkpoints.model import find_model
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import protocols
from ffp_jax.models import functional
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import masks as masks_lib
from ffp_jax.pruning import resources
from ffp_jax.pruning.sublayers import Sublayers, check_reachable, find_sublayers
from ffp_jax.text import tokenization
from ffp_jax.text import windows as windows_lib


class PruningJob(NamedTuple):
  """What a run works on, before any weight is read."""

  directory: pathlib.Path
  model: ModelConfig
  dtype: np.dtype  # of the model's file, and so of the file that is written
  sublayers: Sublayers
  text: windows_lib.Splits
  protocol: protocols.Protocol  # of the held-out figures

  @property
  def dense(self) -> Masks:
    """Returns masks that remove nothing."""
    model = self.model
    return masks_lib.ones(model.layers, model.groups, model.ffn)


def prepare_job(config: ml_collections.ConfigDict) -> PruningJob:
  """Finds the model, its sublayers and its text.

  Raises:
    RequestError: what is asked can't be done.
  """
  files = find_model(config.model)
  sublayers = prunable_sublayers(config, files.config)
  dtype = functional.resolve_dtype(config.dtype)
  found = weights_lib.check_files(files.directory, files.config, dtype)
  text = tokenization.read_tokens(
    files.directory, config.data, field=config.text.field
  )
  dtype = weights_lib.main_dtype(*found)
  return make_job(config, files, dtype, sublayers, text)


def prunable_sublayers(config, model: ModelConfig) -> Sublayers:
  """Returns what may be removed; refuses a budget that can't be met."""
  if model.sliced:
    raise RequestError(
      f'model: {config.model!r} is already pruned; give the dense model'
    )
  sublayers = find_sublayers(
    model,
    round_heads=config.budget.round_heads,
    round_ffn=config.budget.round_ffn,
  )
  budgets = resources.from_config(config, model, sublayers)
  sublayers = sublayers._replace(resources=budgets)
  check_reachable(sublayers, config)
  return sublayers


def make_job(config, files, dtype, sublayers, text) -> PruningJob:
  """Cuts a text into the parts of a run.

  Args:
    config: see config.py.
    files: a `ModelFiles`, or a `Model` alike.
    dtype: of the model's file.
    sublayers: from `prunable_sublayers`.
    text: a `tokenization.TokenText`.
  """
  context = config.text.context
  tokenization.check_tokens(files.config, text.ids, context)
  splits = windows_lib.split(
    windows_lib.windows(text.ids, context),
    calibration=config.text.calibration_windows,
    reward=config.text.reward_windows,
    validation=config.text.validation_windows,
    heldout=config.text.heldout_windows,
    seed=config.seed,
  )
  protocol = protocols.describe_protocol(
    'gptq',
    text.name,
    f'held-out (end of {text.extent})',
    splits.heldout,
    protocols.full_spans(splits.heldout),
    stride=context,
    bos=text.bos,
  )
  return PruningJob(
    files.directory, files.config, dtype, sublayers, splits, protocol
  )
