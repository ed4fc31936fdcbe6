"""A model directory, dense or pruned, as what every format is made from."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.errors import RequestError
from ffp_jax.models.decoder import ModelConfig


class Model(NamedTuple):
  """A model in memory, and the directory that it is from."""

  directory: pathlib.Path
  description: dict  # config.json
  config: ModelConfig
  params: dict

  @property
  def family(self) -> str:
    return self.description['model_type']

  def tensors(self):
    """(Hugging Face name, array) of every tensor."""
    return weights.named_tensors(self.params, self.config, self.family)


def find(name: str) -> tuple[pathlib.Path, dict, ModelConfig]:
  """A model's directory and what config.json has to say, no weight read.

  Args:
    name: as `hub.resolve_model` takes it.

  Raises:
    RequestError: there is no such model, or it is broken.
  """
  directory = hub.resolve_model(name)
  config = model_config.read_model_config(directory)
  description = model_config.read_config_json(directory) | {
    'tie_word_embeddings': config.tied
  }
  return directory, description, config


def load(directory, description, config, dtype: str | None) -> Model:
  """Reads the weights.

  Args:
    directory, description, config: from `find`.
    dtype: 'float32', 'float16' or 'bfloat16'; None for that of the file.

  Raises:
    RequestError: see `weights.load_params`.
  """
  if dtype is None:
    found = weights.check_files(directory, config, jnp.float32)
    dtype = weights.main_dtype(*found)
  params = weights.load_params(directory, config, jnp.dtype(dtype))
  return Model(directory, description, config, jax.tree.map(np.asarray, params))


def need_pruned(config: ModelConfig, name: str):
  """Refuses a dense model.

  Raises:
    RequestError: it is dense.
  """
  if not config.sliced:
    raise RequestError(
      f'--model: {name} is not pruned, and already what --format=hf and '
      'hf_dense make; use it as it is, or --format=gguf or orbax'
    )
