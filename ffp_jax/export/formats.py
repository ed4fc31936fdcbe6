"""Which formats there are, and one model in one of them."""

import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from ffp_jax.checkpoints import model as model_lib
from ffp_jax.checkpoints import orbax_tree, weights
from ffp_jax.checkpoints.model import Model
from ffp_jax.errors import RequestError
from ffp_jax.export import card, gguf_file, transformers_code
from ffp_jax.export.slicing import copy_companions
from ffp_jax.runtime.storage import staged

_FLOATS = ('float32', 'float16', 'bfloat16')


class Format(NamedTuple):
  """How a format is made."""

  dtypes: tuple[str, ...]
  pruned: bool  # whether it is only for pruned models
  # (directory, ModelConfig, pre) -> what `write` needs, or RequestError
  prepare: Callable
  write: Callable  # (Model, path, dtype, what is prepared) -> notes


def _nothing(directory, config, pre):
  del directory, config, pre


def _directory(model: Model, out: pathlib.Path, description: dict):
  """What every model directory holds beside its weights."""
  out.mkdir()
  dtype = next(value for _, value in model.tensors()).dtype.name
  description = description | {'dtype': dtype}
  (out / 'config.json').write_text(json.dumps(description, indent=2) + '\n')
  copy_companions(model.directory, out)


def _compact(model, out, dtype, prepared):
  del dtype, prepared
  _directory(model, out, transformers_code.description(model))
  weights.save_tensors(model.tensors(), out)
  transformers_code.copy_to(out)
  (out / 'README.md').write_text(card.text(model, 'hf'))
  return []


def _dense(model, out, dtype, prepared):
  del dtype, prepared
  _directory(model, out, transformers_code.dense_description(model))
  weights.save_tensors(transformers_code.padded(model), out)
  (out / 'README.md').write_text(card.text(model, 'hf_dense'))
  return ['the shapes are those of the dense model: no smaller, no faster']


def _orbax(model, out, dtype, prepared):
  del dtype, prepared
  _directory(model, out, model.description)
  orbax_tree.write_params(model.params, out)
  return []


FORMATS = {
  'gguf': Format(gguf_file.DTYPES, False, gguf_file.prepare, gguf_file.write),
  'hf': Format(_FLOATS, True, _nothing, _compact),
  'hf_dense': Format(_FLOATS, True, _nothing, _dense),
  'orbax': Format(_FLOATS, False, _nothing, _orbax),
}


def export(name: str, format: str, out: pathlib.Path, *, dtype, pre):
  """Writes a model in a format; `out` is complete or absent.

  Args:
    name: of the model, as `hub.resolve_model` takes it.
    format: one of FORMATS.
    out: file (gguf) or directory to make.
    dtype: of the weights, None for that of the model.
    pre: of gguf, see `gguf_vocabulary.read`.

  Returns:
    What the user should know, a line each.

  Raises:
    RequestError: the request can't be met; known before weights are read,
      but for damaged ones.
  """
  made = FORMATS[format]
  if dtype not in (None, *made.dtypes):
    raise RequestError(
      f'--dtype: {dtype!r} is not one of {", ".join(made.dtypes)}'
    )
  if pre and format != 'gguf':
    raise RequestError('--pre: belongs to --format=gguf')
  if out.exists():
    raise RequestError(f'--out: {out} exists; remove it or name another')
  if not out.absolute().parent.is_dir():
    raise RequestError(f'--out: no directory {out.absolute().parent}')
  directory, description, config = model_lib.find(name)
  if made.pruned:
    model_lib.need_pruned(config, name)
  prepared = made.prepare(directory, config, pre)
  # A GGUF keeps vectors in float32, so that nothing is rounded before.
  read_as = None if format == 'gguf' else dtype
  model = model_lib.load(directory, description, config, read_as)
  dtype = dtype or next(value for _, value in model.tensors()).dtype.name
  with staged(out) as stage:
    return made.write(model, stage, dtype, prepared)


def size(out: pathlib.Path) -> int:
  """Bytes of a file or of all files in a directory."""
  paths = out.rglob('*') if out.is_dir() else [out]
  return sum(path.stat().st_size for path in paths if path.is_file())
