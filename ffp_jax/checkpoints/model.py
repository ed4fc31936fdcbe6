"""A model in memory, dense or pruned, and the files that it comes from."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.models import functional
from ffp_jax.models.decoder import ModelConfig


class ModelFiles(NamedTuple):
  """A model on disk, of which no weight is read yet."""

  directory: pathlib.Path
  description: dict  # config.json
  config: ModelConfig


@dataclasses.dataclass(frozen=True)
class Model:
  """A model in memory.

  Attributes:
    directory: the model directory that tokenizer and settings come from.
    description: config.json.
    config: the decoder's configuration.
    params: the decoder's parameters, nested dict of arrays.
    file_dtype: the type of most weights in the file, and so of what is
      written unless another is asked for.
  """

  directory: pathlib.Path
  description: dict
  config: ModelConfig
  params: dict
  file_dtype: np.dtype

  @property
  def family(self) -> str:
    """Returns the `model_type` of config.json."""
    return self.description['model_type']

  @functools.cached_property
  def tokenizer(self) -> Any:
    """Returns the model's own tokenizer, of transformers."""
    from ffp_jax.text import tokenization  # transformers is slow to import

    return tokenization.load_tokenizer(self.directory)

  def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, array) of every tensor."""
    return weights.named_tensors(self.params, self.config, self.family)


def find_model(name: str) -> ModelFiles:
  """Finds a model and reads its config.json.

  Args:
    name: 'demo', a directory, a .gguf file or a hub id, as
      `hub.resolve_model` takes it.

  Raises:
    RequestError: there is no such model, or it is broken.
  """
  directory = hub.resolve_model(name)
  config = model_config.read_model_config(directory)
  description = model_config.read_config_json(directory)
  tied = {'tie_word_embeddings': config.tied}  # as the weights have it
  return ModelFiles(directory, description | tied, config)


def load_model(model: str | ModelFiles, dtype: str | None = 'auto') -> Model:
  """Loads a model onto the devices of the mesh that is set.

  Args:
    model: a name as `find_model` takes it, or what that returned.
    dtype: 'float32', 'float16' or 'bfloat16' for the parameters; 'auto' for
      float32 on CPU and bfloat16 elsewhere; None for that of the file.

  Raises:
    RequestError: there is no such model, or a file of it is missing, damaged
      or holds what is not finite.
  """
  files = find_model(model) if isinstance(model, str) else model
  directory, description, config = files
  wanted = functional.resolve_dtype(dtype or 'float32')
  found = weights.check_files(directory, config, wanted)
  file_dtype = weights.main_dtype(*found)
  if dtype is None:
    wanted = file_dtype
  params = weights.load_params(directory, config, wanted)
  return Model(directory, description, config, params, file_dtype)


def to_numpy(model: Model) -> Model:
  """Returns a model whose parameters are NumPy arrays on this host."""
  return dataclasses.replace(
    model, params=jax.tree.map(np.asarray, model.params)
  )
