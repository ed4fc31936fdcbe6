"""config.json of a model directory, read as the decoder's configuration."""

import dataclasses
import json
import pathlib

from ffp_jax.checkpoints import directory as directories
from ffp_jax.checkpoints.stored import FORMATS
from ffp_jax.errors import RequestError
from ffp_jax.models.config import ModelConfig
from ffp_jax.models.families import EMBED, FAMILIES, HEAD_NAME
from ffp_jax.models.json_fields import Fields


def read_config_json(directory: pathlib.Path) -> dict:
  """Returns the config.json of a model directory, if it is supported.

  Raises:
    RequestError: it is missing, not a JSON object, of an unsupported family,
      or of a quantised model.
  """
  path = directory / 'config.json'
  try:
    hf = json.loads(path.read_bytes())  # bytes may begin with a mark
  except FileNotFoundError as error:
    if (directory / 'adapter_config.json').exists():
      raise RequestError(
        f'{directory}: an adapter, not a model; merge it into its model first '
        '(PEFT: merge_and_unload, then save_pretrained)'
      ) from error
    raise RequestError(
      f'{directory}: no config.json; is this a model directory?'
    ) from error
  except (ValueError, RecursionError) as error:
    raise RequestError(f'{path}: not valid JSON ({error})') from error
  family = hf.get('model_type') if isinstance(hf, dict) else None
  if family not in tuple(FAMILIES):
    known = ', '.join(FAMILIES)
    raise RequestError(
      f'{path}: model_type {family!r} is not supported; use one of {known}'
    )
  _check_plain_weights(path, hf)
  return {key: hf[key] for key in hf if key != 'quantization_config'}


def _check_plain_weights(path, hf):
  """Refuses weights that are quantised, compressed or in unusual files."""
  if hf.get('transformers_weights'):
    raise RequestError(
      f'{path}: transformers_weights names {hf["transformers_weights"]!r}; '
      f'give that file the name {FORMATS[0]} and remove the key'
    )
  quantised = hf.get('quantization_config') or {}
  sparse = isinstance(quantised, dict) and quantised.get('sparsity_config')
  if not quantised or sparse and _dense(quantised) and _dense(sparse):
    return
  if sparse and not _dense(sparse):
    raise RequestError(
      f'{path}: the weights are compressed ({sparse.get("format")}); use the '
      'model they were made from, or save it anew with save_compressed=False'
    )
  raise RequestError(
    f'{path}: the weights are quantised (quantization_config); use the '
    'model they were made from'
  )


def _dense(scheme) -> bool:
  """Returns whether compressed-tensors stores plain weights with a scheme."""
  return (
    isinstance(scheme, dict)
    and scheme.get('format') == 'dense'
    and not scheme.get('config_groups')
    and not scheme.get('kv_cache_scheme')
  )


def read_model_config(directory: pathlib.Path) -> ModelConfig:
  """Returns the decoder's config of a dense or sliced model directory.

  `tied` goes by the weights, if there are any, see `directory.is_tied`.

  Raises:
    RequestError: config.json is missing, broken, incomplete or unsupported;
      or it says that embeddings are tied, and the weights can't be opened.
  """
  hf = read_config_json(directory)
  family = FAMILIES[hf['model_type']]
  fields = Fields(str(directory / 'config.json'), family.defaults | hf)
  config = family.config(fields)
  if config.tied:
    embed = family.names.outside['/'.join(EMBED)].name
    tied = directories.is_tied(directory, embed, HEAD_NAME)
    config = dataclasses.replace(config, tied=tied)
  if 'ffp_jax' not in hf:
    return config
  kept = Fields(f'{fields.where}: ffp_jax', fields.group('ffp_jax'))
  L = config.layers
  return dataclasses.replace(
    config,
    kept_groups=kept.integers('kept_groups', length=L, most=config.groups),
    kept_ffn=kept.integers('kept_ffn', length=L, most=config.ffn),
  )
