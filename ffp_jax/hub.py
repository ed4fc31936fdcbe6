"""Where a model lies: the demo, a local directory or the Hugging Face hub."""

import pathlib

from huggingface_hub import errors, snapshot_download

from ffp_jax import demo_model
from ffp_jax.config import RequestError

_HUB_FILES = ('*.json', '*.safetensors', 'tokenizer*', '*.txt', '*.jinja')


def locate(model: str) -> pathlib.Path:
  """The local directory of 'demo', a directory, or a hub id.

  Raises:
    RequestError: there is no such model and it can't be fetched.
  """
  if model == 'demo':
    return demo_model.cached()
  path = pathlib.Path(model).expanduser()
  if path.is_dir():
    return path
  if path.is_absolute() or model.startswith(('.', '~')) or '/' not in model:
    raise RequestError(f'model: no directory {model!r}; check the path')
  try:
    return pathlib.Path(
      snapshot_download(model, allow_patterns=list(_HUB_FILES))
    )
  except (OSError, ValueError, errors.HfHubHTTPError) as error:
    raise RequestError(
      f'model: {model!r} is neither a directory nor to be had from the hub '
      f'({type(error).__name__}); give a local directory'
    ) from error
