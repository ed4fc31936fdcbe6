"""What a run works on: the model, its sublayers, the parts of its text."""

import pathlib
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import logging

from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.checkpoints.model import find_model
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import protocols
from ffp_jax.models import functional
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import masks as masks_lib
from ffp_jax.pruning import resources
from ffp_jax.pruning.sublayers import Sublayers, check_reachable, find_sublayers
from ffp_jax.runtime import sharding
from ffp_jax.text import corpora, tokenization
from ffp_jax.text import windows as windows_lib


class OtherText(NamedTuple):
  """A text of another kind, on which the dense and the saved model are scored.

  A model that fits the run's own text at the cost of others shows there.
  """

  windows: np.ndarray  # int32 [W,T]
  protocol: protocols.Protocol


class PruningJob(NamedTuple):
  """What a run works on, before any weight is read."""

  directory: pathlib.Path
  model: ModelConfig
  dtype: np.dtype  # of the model's file, and so of the file that is written
  sublayers: Sublayers
  text: windows_lib.Splits
  protocol: protocols.Protocol  # of the held-out figures
  other: OtherText | None

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
    floor=config.budget.floor,
  )
  budgets = resources.from_config(config, model, sublayers)
  sublayers = sublayers._replace(resources=budgets)
  check_reachable(sublayers, config)
  return sublayers


def make_job(config, files, dtype, sublayers, text) -> PruningJob:
  """Cuts a text into the parts of a run, and reads the one of another kind.

  Args:
    config: see config.py.
    files: a `ModelFiles`, or a `Model` alike.
    dtype: of the model's file.
    sublayers: from `prunable_sublayers`.
    text: a `tokenization.TokenText`.

  Raises:
    RequestError: a text is too short, or does not fit the model.
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
  return PruningJob(
    files.directory,
    files.config,
    dtype,
    sublayers,
    splits,
    _heldout_protocol(text, splits.heldout),
    find_other(config, files, text.name),
  )


def find_other(config, files, name: str) -> OtherText | None:
  """Reads the text of `config.text.other`, if there is to be one.

  An automatic text that can't be had, in all processes alike, is left out with
  a warning.

  Args:
    config, files: see `make_job`.
    name: of the run's own text.

  Raises:
    RequestError: the text that the config names can't be read, is shorter than
      a window, or does not fit the model.
  """
  if config.text.other != 'auto':
    asked = config.text.other
    return read_other(config, files, asked) if asked else None
  source = corpora.other_builtin(name)
  if not source:
    return None
  try:
    found = read_other(config, files, source)
  except RequestError as error:
    found = None
    logging.warning('no figures on a text of another kind: %s', error)
  return found if sharding.holds_everywhere(found is not None) else None


def read_other(config, files, source) -> OtherText:
  """Reads a text and takes its last windows, or all if it has fewer.

  Args:
    config, files: see `make_job`.
    source: see `corpora.read_text`.

  Raises:
    RequestError: see `find_other`.
  """
  try:
    text = tokenization.read_tokens(
      files.directory, source, field=config.text.field, report=True
    )
  except RequestError as error:
    problem = str(error).removeprefix('data: ')
    raise RequestError(f'text.other: {problem}') from error
  context = config.text.context
  tokenization.check_tokens(files.config, text.ids, context)
  windows = windows_lib.windows(text.ids, context)
  if not len(windows):
    raise RequestError(
      f'text.other: {text.name!r} has {len(text.ids)} tokens, fewer than '
      f"text.context {context}; give a longer text, or '' for none"
    )
  windows = windows[-config.text.heldout_windows :]
  return OtherText(windows, _heldout_protocol(text, windows))


def _heldout_protocol(text, windows_WxT) -> protocols.Protocol:
  """Returns the protocol of figures on windows from the end of a text."""
  return protocols.describe_protocol(
    'gptq',
    text.name,
    f'held-out (end of {text.extent})',
    windows_WxT,
    protocols.full_spans(windows_WxT),
    stride=windows_WxT.shape[1],
    bos=text.bos,
  )
