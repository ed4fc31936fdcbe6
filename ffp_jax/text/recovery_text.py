"""Text for recovery: tokens on disk, and windows in a fixed order.

A source is an array of windows [W,T], see `windows.windows`. It may be a token
file that is mapped into memory, so that only the windows of a batch are read.
"""

import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ffp_jax.errors import RequestError
from ffp_jax.runtime.storage import staged


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
  sources: Sequence[np.ndarray],
  order_Nx2: np.ndarray,
  step: int,
  *,
  micro_batches: int,
  rows: int,
) -> np.ndarray:
  """Returns the tokens of a step, int32 [A,B,T].

  Args:
    sources: windows [W,T] of each source.
    order_Nx2: from `order`.
    step: from 0; each takes the next micro_batches * rows windows.
    micro_batches: A.
    rows: B.
  """
  size = micro_batches * rows
  found = order_Nx2[step * size : (step + 1) * size]
  tokens = np.stack([sources[source][window] for source, window in found])
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
