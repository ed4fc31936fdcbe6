"""The export formats, and how a model is written in one of them."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ffp_jax.checkpoints import orbax_tree, weights
from ffp_jax.checkpoints.model import (
  Model,
  ModelFiles,
  find_model,
  load_model,
  to_numpy,
)
from ffp_jax.errors import RequestError
from ffp_jax.export import card, gguf_file, padding, transformers_code
from ffp_jax.export.slicing import copy_companions
from ffp_jax.runtime.storage import staged

_FLOATS = ('float32', 'float16', 'bfloat16')


class Format(NamedTuple):
  """How a format is made."""

  dtypes: tuple[str, ...]  # that it can hold
  pruned: bool  # True where it is for pruned models only
  # (directory, ModelConfig, pre) -> what `write` needs, or RequestError
  prepare: Callable
  write: Callable  # (Model, path, dtype, what is prepared) -> notes


def _nothing(directory, config, pre):
  del directory, config, pre


def _directory(model: Model, out: pathlib.Path, description: dict):
  """Makes a model directory with all but its weights."""
  out.mkdir()
  dtype = next(value for _, value in model.tensors()).dtype.name
  description = description | {'dtype': dtype}
  (out / 'config.json').write_text(json.dumps(description, indent=2) + '\n')
  copy_companions(model.directory, out)


def _compact(model, out, dtype, prepared):
  del dtype, prepared
  config = padding.with_units(model.config)
  _directory(model, out, transformers_code.description(model, config))
  weights.save_tensors(padding.padded_tensors(model, config), out)
  transformers_code.copy_to(out)
  (out / 'README.md').write_text(card.text(model, 'hf'))
  return padding.notes(model.config, config, 'vLLM')


def _dense(model, out, dtype, prepared):
  del dtype, prepared
  _directory(model, out, transformers_code.dense_description(model))
  tensors = padding.padded_tensors(model, padding.dense(model.config))
  weights.save_tensors(tensors, out)
  (out / 'README.md').write_text(card.text(model, 'hf_dense'))
  return ['the shapes are those of the dense model: no smaller, no faster']


def _orbax(model, out, dtype, prepared):
  del dtype, prepared
  _directory(model, out, model.description)
  orbax_tree.write_params(model.params, out)
  return []


def _native(model, out, dtype, prepared):
  del dtype, prepared
  _directory(model, out, model.description)
  weights.save_tensors(model.tensors(), out)
  return []


FORMATS = {
  'ffp_jax': Format(_FLOATS, False, _nothing, _native),
  'gguf': Format(gguf_file.DTYPES, False, gguf_file.prepare, gguf_file.write),
  'hf': Format(_FLOATS, True, _nothing, _compact),
  'hf_dense': Format(_FLOATS, True, _nothing, _dense),
  'orbax': Format(_FLOATS, False, _nothing, _orbax),
}


def export(
  name: str,
  format: str,
  out: pathlib.Path,
  *,
  dtype: str | None,
  pre: str | None,
) -> list[str]:
  """Loads a model and writes it in a format.

  Args:
    name: of the model, as `find_model` takes it.
    format, out, dtype, pre: see `write_model`.

  Returns:
    What the user should know, one line each.

  Raises:
    RequestError: the request can't be met; known before weights are read,
      but for damaged ones.
  """
  _check(format, out, dtype, pre)
  files = find_model(name)
  prepared = _prepare(files, format, pre, name)
  # A GGUF keeps vectors in float32, so that nothing is rounded before.
  model = load_model(files, None if format == 'gguf' else dtype)
  return _write(to_numpy(model), format, out, dtype, prepared)


def write_model(
  model: Model,
  format: str,
  out: pathlib.Path,
  *,
  dtype: str | None = None,
  pre: str | None = None,
) -> list[str]:
  """Writes a model in memory in a format; `out` is complete or absent.

  Args:
    model: dense or sliced.
    format: one of FORMATS.
    out: the file (gguf) or directory to make.
    dtype: of the weights; None for that of the model's file.
    pre: of gguf, see `gguf_vocabulary.read`.

  Returns:
    What the user should know, one line each.

  Raises:
    RequestError: the request can't be met.
  """
  dtype = dtype or model.file_dtype.name
  _check(format, out, dtype, pre)
  files = ModelFiles(model.directory, model.description, model.config)
  prepared = _prepare(files, format, pre, str(model.directory))
  model = to_numpy(model)
  if format != 'gguf':  # which converts by itself
    cast = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), model.params)
    model = dataclasses.replace(model, params=cast)
  return _write(model, format, out, dtype, prepared)


def _check(format, out, dtype, pre):
  """Refuses what needs no model to be known."""
  if format not in FORMATS:
    raise RequestError(
      f'--format: {format!r} is not one of {", ".join(FORMATS)}'
    )
  dtypes = FORMATS[format].dtypes
  if dtype not in (None, *dtypes):
    raise RequestError(f'--dtype: {dtype!r} is not one of {", ".join(dtypes)}')
  if pre and format != 'gguf':
    raise RequestError('--pre: belongs to --format=gguf')
  if out.exists():
    raise RequestError(f'--out: {out} exists; remove it or name another')
  if not out.absolute().parent.is_dir():
    raise RequestError(f'--out: no directory {out.absolute().parent}')


def _prepare(files: ModelFiles, format, pre, name):
  """Returns what writing needs besides the weights; refuses what can't be."""
  if FORMATS[format].pruned and not files.config.sliced:
    raise RequestError(
      f'--model: {name} is not pruned, and already what --format=hf and '
      'hf_dense make; use it as it is, or --format=gguf or orbax'
    )
  return FORMATS[format].prepare(files.directory, files.config, pre)


def _write(model, format, out, dtype, prepared):
  dtype = dtype or next(value for _, value in model.tensors()).dtype.name
  with staged(out) as stage:
    return FORMATS[format].write(model, stage, dtype, prepared)


def size(out: pathlib.Path) -> int:
  """Returns the bytes of a file or of all files in a directory."""
  paths = out.rglob('*') if out.is_dir() else [out]
  return sum(path.stat().st_size for path in paths if path.is_file())
