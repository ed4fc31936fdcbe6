"""The choice of the files of a model directory that hold its weights.

A directory may hold several checkpoints. The order of preference is that of
transformers (`_get_resolved_checkpoint_files`): a whole model.safetensors,
its index, a whole pytorch_model.bin, its index. The formats that transformers
does not read come last: Flax, orbax, GGUF.
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
_WEIGHT_PATTERNS = (
  '*.safetensors',
  'pytorch_model*.bin',
  '*.msgpack',
  '*.gguf',
  orbax_tree.FOLDER,
)
# Shards of torch.distributed, which transformers prefers to all others.
_DISTRIBUTED = re.compile(r'shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors')


class Checkpoint(NamedTuple):
  """Holds the files that are read, all of one format."""

  kind: str  # the format: a key of _OPENERS, or 'orbax'
  paths: list[pathlib.Path]


def find_checkpoint(directory: pathlib.Path) -> Checkpoint | None:
  """Returns the checkpoint of a directory, None if there is none.

  Logs once which other files are not read.

  Raises:
    RequestError: an index is broken or names a missing file, or only
      torch.distributed reads the checkpoint.
  """
  found = _preferred(directory)
  if found is None:
    return None
  others = [x.name for x in _weight_paths(directory) if x not in found.paths]
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


def _preferred(directory) -> Checkpoint | None:
  """Returns the first checkpoint in the order of preference."""
  if parts := [
    x for x in _weight_paths(directory) if _DISTRIBUTED.fullmatch(x.name)
  ]:
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


def _weight_paths(directory) -> list[pathlib.Path]:
  """Returns everything that may hold weights, by name."""
  return sorted({x for glob in _WEIGHT_PATTERNS for x in directory.glob(glob)})


@functools.cache
def warn_once(line: str) -> None:
  """Logs a warning, once per process however often a model is opened."""
  logging.warning('%s', line)


def missing_error(directory: pathlib.Path) -> RequestError:
  """Returns the error for a directory without a checkpoint."""
  best, *others = stored.FORMATS
  names = [
    x.name if x.exists() else f'{x.name}, a link to {x.readlink()}, is dead'
    for x in _weight_paths(directory)
  ]
  there = f', only {stored.some(names)}' if names else ''
  return RequestError(
    f'{directory / best}: missing, and there is no {", ".join(others)}, no '
    f'index of one and no single .gguf{there}; give a directory with weights'
  )


def open_tensors(found: Checkpoint) -> dict[str, Stored]:
  """Returns the tensors of a checkpoint by name, without reading them.

  Args:
    found: a checkpoint that is not orbax.

  Raises:
    RequestError: a file is damaged, or two files have the same tensor.
  """
  all_tensors, origin = {}, {}
  for path in found.paths:
    tensors = _OPENERS[found.kind](path)
    if twice := all_tensors.keys() & tensors.keys():
      name = min(twice)
      raise RequestError(
        f'{path}: tensor {name} is in {origin[name].name} too, and the index '
        'names both; keep the shards of one save with its index'
      )
    all_tensors |= tensors
    origin |= dict.fromkeys(tensors, path)
  return all_tensors


def is_tied(directory: pathlib.Path, embed: str, head: str) -> bool:
  """Returns whether embeddings that config.json calls tied are tied.

  As in transformers, they are not if both tensors are stored and differ. If
  only one is stored, it is used for both.

  Args:
    directory: of the model; without weights, config.json is believed.
    embed, head: Hugging Face names of the two tensors.

  Raises:
    RequestError: see `find_checkpoint` and `open_tensors`.
  """
  found = find_checkpoint(directory)
  if found is None or found.kind == 'orbax':
    return True
  tensors = open_tensors(found)
  embedding = stored.lookup(tensors, embed)
  unembedding = stored.lookup(tensors, head)
  if embedding is None or unembedding is None:
    return True
  if stored.equal(embedding, unembedding):
    return True
  warn_once(
    f'{directory}: config.json says tie_word_embeddings, but {embed} and '
    f'{head} are both stored and differ; read as not tied'
  )
  return False
