"""Text for recovery: tokens on disk, and windows in a fixed order.

A source is an array of windows [W,T], see `windows.windows`. It may be a token
file that is mapped into memory, so that only the windows of a batch are read.
"""

import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from ffp_jax.errors import RequestError
from ffp_jax.runtime.storage import staged
from ffp_jax.text import corpora, mixture, windows

_SHARED_TOKENS = 13  # in a row, by which two windows are taken for the same
_TOKEN_BYTES = 16  # of text, more than a token has in any language


class Source(NamedTuple):
  """A text to train on."""

  name: str
  weight: float
  windows: np.ndarray  # int32 [W,T]; may be on disk


class RecoveryText(NamedTuple):
  """The texts to train on, and the order of their windows."""

  sources: list[Source]
  order: np.ndarray  # see `order`

  @property
  def name(self) -> str:
    """Returns the names of the texts, with their weights if there are many."""
    if len(self.sources) == 1:
      return self.sources[0].name
    return ','.join(f'{x.name}:{x.weight:g}' for x in self.sources)


def arrange(
  sources: Sequence[Source],
  reserved: Sequence[np.ndarray],
  *,
  seed: int,
  windows: int,
) -> RecoveryText:
  """Leaves out what is reserved, and puts the other windows in an order.

  Args:
    sources: the texts.
    reserved: windows [W,T] that validate or test. A window is left out if it
      has 13 tokens in a row in common with one of them.
    seed: of the order.
    windows: number to train on, which may be more than there are.

  Raises:
    RequestError: a text has no window, or none is left of it.
  """
  seen = np.unique(np.concatenate([_runs(x).ravel() for x in reserved]))
  kept = [_find_new(source, seen) for source in sources]
  order_Nx2 = order(
    seed, [x.weight for x in sources], [*map(len, kept)], windows
  )
  for i, (source, new) in enumerate(zip(sources, kept, strict=True)):
    rows = order_Nx2[:, 0] == i
    order_Nx2[rows, 1] = new[order_Nx2[rows, 1]]
    if (taken := rows.sum()) > len(new):
      logging.warning(
        'recovery.data: %s has %s tokens and is read %.1f times; more text '
        'makes a better model',
        *(source.name, f'{new.size * source.windows.shape[1]:,}'),
        taken / len(new),
      )
  return RecoveryText(list(sources), order_Nx2)


def _runs(windows_WxT) -> np.ndarray:
  """Returns a hash of every run of tokens in a window, uint64 [W,runs]."""
  length = min(_SHARED_TOKENS, windows_WxT.shape[1])
  runs = windows_WxT.shape[1] - length + 1
  hashed = np.zeros((len(windows_WxT), runs), np.uint64)
  for i in range(length):
    tokens = windows_WxT[:, i : i + runs].astype(np.uint64)
    hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + tokens + np.uint64(1)
  return hashed


def _find_new(source: Source, seen) -> np.ndarray:
  """Returns the indices of the windows without any of the runs `seen`."""
  if not len(source.windows):
    raise RequestError(
      f'recovery.data: {source.name} is shorter than one window of '
      'text.context tokens; give more text'
    )
  blocks = np.split(source.windows, range(1024, len(source.windows), 1024))
  new = [~np.isin(_runs(x), seen).any(axis=1) for x in blocks]
  found = np.flatnonzero(np.concatenate(new))
  left_out = len(source.windows) - len(found)
  if not len(found):
    raise RequestError(
      f'recovery.data: all of {source.name} is in the reward, validation or '
      'held-out text; give another text'
    )
  if left_out:
    logging.info(
      'recovery.data: %s: %d of %d windows share text with held-out, '
      'validation or reward windows, left out',
      *(source.name, left_out, len(source.windows)),
    )
  return found


def read_sources(
  data: str, tokenizer: Callable, *, context: int, most: int, field: str
) -> list[Source]:
  """Tokenizes the texts that `recovery.data` names, onto the disk.

  Args:
    data: one or several texts with weights, as `data` takes them.
    tokenizer: of transformers.
    context: tokens per window.
    most: tokens to read of each text.
    field: see `corpora.read_text`.

  Raises:
    RequestError: a text can't be read, or the weights are invalid.
  """
  parts = mixture.parse(data)
  # Few tokens may be the beginning of a long document.
  limit = max(most * _TOKEN_BYTES, corpora.TEXT_BYTES)
  opened = [
    corpora.open_source(x.source, field=field, limit=limit) for x in parts
  ]
  return [
    Source(
      text.name,
      part.weight,
      windows.windows(_tokens_on_disk(text, tokenizer, most), context),
    )
    for text, part in zip(opened, parts, strict=True)
  ]


def _tokens_on_disk(text: corpora.Source, tokenizer, most) -> np.ndarray:
  """Returns the tokens of a text, int32 [N], mapped from a nameless file."""
  pieces = mixture.pieces(text.documents, text.join)
  pieces = (piece for piece in pieces if piece)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'tokens'
    if not token_file(pieces, tokenizer, path, most=most, join=text.join):
      return np.zeros(0, np.int32)
    return np.memmap(path, np.int32, 'r')


def order(
  seed: int, weights: Sequence[float], sizes: Sequence[int], windows: int
) -> np.ndarray:
  """Returns an order of the windows of several sources, mixed by weight.

  The next window is of the source that is furthest behind its share. Each
  pass over a source has a new random order. The order of fewer windows is the
  beginning of that of more.

  Args:
    seed: of the random orders.
    weights: of the sources, at least 0; only their ratios matter.
    sizes: windows of each source.
    windows: N, which may be more than there are.

  Returns:
    int64 [N,2], source and window.

  Raises:
    RequestError: the sum of the weights is not positive, or a source with a
      positive weight has no window.
  """
  share = np.asarray(weights, np.float64)
  if not np.isfinite(share).all() or share.min() < 0 or not share.sum() > 0:
    raise RequestError(
      f'recovery.data: the weights {tuple(weights)} must be 0 or more, and one '
      'at least positive'
    )
  if np.any((share > 0) & (np.asarray(sizes) < 1)):
    raise RequestError(
      'recovery.data: a text is shorter than one window; give more text or a '
      'shorter text.context'
    )
  share = share / share.sum()
  source_N = _mix_sources(share, windows)
  window_N = np.empty(windows, np.int64)
  for source in np.unique(source_N):
    at = np.flatnonzero(source_N == source)
    passes = [
      np.random.default_rng((seed, source, epoch)).permutation(sizes[source])
      for epoch in range(-(-len(at) // sizes[source]))
    ]
    window_N[at] = np.concatenate(passes)[: len(at)]
  return np.stack([source_N, window_N], axis=1)


def _mix_sources(share, windows: int) -> np.ndarray:
  """Returns the source of each window, always the one furthest behind."""
  taken, source_N = np.zeros(len(share)), np.empty(windows, np.int64)
  for i in range(windows):
    source_N[i] = np.argmax(share * (i + 1) - taken)
    taken[source_N[i]] += 1
  return source_N


def batch(
  text: RecoveryText, step: int, *, micro_batches: int, rows: int
) -> np.ndarray:
  """Returns the tokens of a step, int32 [A,B,T].

  Args:
    text: from `arrange`.
    step: from 0; each takes the next micro_batches * rows windows.
    micro_batches: A.
    rows: B.
  """
  size = micro_batches * rows
  found = text.order[step * size : (step + 1) * size]
  tokens = np.stack([text.sources[i].windows[window] for i, window in found])
  return tokens.reshape(micro_batches, rows, -1)


def token_file(
  documents: Iterable[str],
  tokenizer: Callable,
  path: pathlib.Path,
  *,
  most: int,
  join: str,
) -> int:
  """Writes the tokens of a text to a file, with one document in memory.

  They are those of the joined text, if its documents neither begin nor end
  with white space and its tokenizer does not mark the beginning of a text.

  Args:
    documents: of the text; no more are read than needed.
    tokenizer: of transformers.
    path: of the file to make, complete or not at all: int32 in the machine's
      byte order, for `np.memmap`.
    most: tokens after which to stop.
    join: text between documents, such as a blank line or the end-of-sequence
      token.

  Returns:
    The number of tokens.
  """
  count = 0
  with staged(path) as stage, stage.open('wb') as file:
    for number, document in enumerate(documents):
      ids = tokenizer(
        join + document if number else document,
        add_special_tokens=not number,
        verbose=False,
      )['input_ids']
      new = np.asarray(ids[: most - count], np.int32)
      file.write(new.tobytes())
      count += len(new)
      if count >= most:
        break
  return count
