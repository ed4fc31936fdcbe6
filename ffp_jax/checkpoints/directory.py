"""Which files of a model directory hold its weights.

People save twice into one directory. The order is that of transformers
(`_get_resolved_checkpoint_files`): a whole model.safetensors, its index, a
whole pytorch_model.bin, its index. What transformers does not read comes
thereafter: Flax, orbax, GGUF.
"""

import functools
import pathlib
import re
from typing import NamedTuple

from absl import logging

from ffp_jax.checkpoints import (
  flax_file,
  gguf_model,
  orbax_tree,
  safetensors_file,
  stored,
  torch_file,
)
from ffp_jax.checkpoints.stored import Stored
from ffp_jax.errors import RequestError

_OPENERS = {
  'model.safetensors': safetensors_file.open_tensors,
  'pytorch_model.bin': torch_file.open_tensors,
  'flax_model.msgpack': flax_file.open_tensors,
  'gguf': gguf_model.open_tensors,
}
_WEIGHTS = (
  '*.safetensors',
  'pytorch_model*.bin',
  '*.msgpack',
  '*.gguf',
  orbax_tree.FOLDER,
)
# What torch.distributed saves; transformers puts these before all others.
_DISTRIBUTED = re.compile(r'shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors')


class Checkpoint(NamedTuple):
  """The files that are read, one format of them."""

  kind: str  # a key of _OPENERS, or 'orbax'
  paths: list[pathlib.Path]


def find_checkpoint(directory: pathlib.Path) -> Checkpoint | None:
  """The checkpoint that is read, None where there is none.

  Says in the log what is passed over, once.

  Raises:
    RequestError: an index is broken or names what is not there, or the
      checkpoint is of a kind that only torch.distributed reads.
  """
  found = _first(directory)
  if found is None:
    return None
  others = [x.name for x in _all(directory) if x not in found.paths]
  index = directory / f'{found.kind}.index.json'
  if found.paths[0].name == found.kind and index.exists():
    others.append(index.name)
  if others:
    first, *more = (path.name for path in found.paths)
    warn_once(
      f'{directory}: read from {first}'
      + (f' and {len(more)} more' if more else '')
      + f', passed over: {stored.some(others)}'
    )
  return found


def _first(directory) -> Checkpoint | None:
  if parts := [x for x in _all(directory) if _DISTRIBUTED.fullmatch(x.name)]:
    raise RequestError(
      f'{parts[0]}: part of a checkpoint of torch.distributed; load it with '
      'transformers and write it with save_pretrained elsewhere'
    )
  for name in stored.formats():
    if paths := stored.weight_files(directory, name):
      return Checkpoint(name, paths)
  if orbax_tree.is_orbax(directory):
    return Checkpoint('orbax', [directory / orbax_tree.FOLDER])
  paths = list(directory.glob('*.gguf'))
  return Checkpoint('gguf', paths) if len(paths) == 1 else None


def _all(directory) -> list[pathlib.Path]:
  return sorted({x for kind in _WEIGHTS for x in directory.glob(kind)})


@functools.cache
def warn_once(line: str):
  """Logs a line at its first time, however often a model is opened."""
  logging.warning('%s', line)


def missing_error(directory: pathlib.Path) -> RequestError:
  """The error of a directory in which `find` finds nothing."""
  best, *others = stored.FORMATS
  names = [
    x.name if x.exists() else f'{x.name}, a link to {x.readlink()}, is dead'
    for x in _all(directory)
  ]
  there = f', only {stored.some(names)}' if names else ''
  return RequestError(
    f'{directory / best}: missing, and there is no {", ".join(others)}, no '
    f'index of one and no single .gguf{there}; give a directory with weights'
  )


def open_tensors(found: Checkpoint) -> dict[str, Stored]:
  """Name to tensor of a checkpoint that is not orbax, nothing read.

  Raises:
    RequestError: a file is damaged, or a tensor in two of them.
  """
  where, origin = {}, {}
  for path in found.paths:
    tensors = _OPENERS[found.kind](path)
    if twice := where.keys() & tensors.keys():
      name = min(twice)
      raise RequestError(
        f'{path}: tensor {name} is in {origin[name].name} too, and the index '
        'names both; keep the shards of one save with its index'
      )
    where |= tensors
    origin |= dict.fromkeys(tensors, path)
  return where


def is_tied(directory: pathlib.Path, embed: str, head: str) -> bool:
  """Whether weights that config.json calls tied are so, as transformers has it.

  They are not where both are stored and differ; where one is stored, it is
  both, whichever it is.

  Args:
    directory: of the model; one without weights is taken at its word.
    embed, head: Hugging Face names of the two tensors.

  Raises:
    RequestError: see `find` and `open_tensors`.
  """
  found = find_checkpoint(directory)
  if found is None or found.kind == 'orbax':
    return True
  where = open_tensors(found)
  both = stored.lookup(where, embed), stored.lookup(where, head)
  if None in both or stored.equal(*both):
    return True
  warn_once(
    f'{directory}: config.json says tie_word_embeddings, but {embed} and '
    f'{head} are both stored and differ; read as not tied'
  )
  return False
