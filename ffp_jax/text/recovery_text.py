"""Text for recovery: tokens on disk, windows in an order known beforehand.

A source is an array of windows [W,T], see `windows.windows`; of a token file,
mapped into memory, only the windows of a batch are ever read.
"""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from ffp_jax.errors import RequestError
from ffp_jax.runtime.storage import staged


def order(
  seed: int, weights: Sequence[float], sizes: Sequence[int], windows: int
) -> np.ndarray:
  """Mixes the windows of several sources, each by its weight.

  The next window is of the source that is furthest behind its share. Each
  source is gone through in a new random order on each pass. The order of
  fewer windows is the beginning of that of more.

  Args:
    seed: of the shuffles.
    weights: of the sources, at least 0; only their ratios matter.
    sizes: windows of each source.
    windows: how many are wanted.

  Returns:
    int64 [N,2], source and window.

  Raises:
    RequestError: the weights don't sum to something positive, or a source
      with a weight has no window.
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
  taken, source_N = np.zeros(len(share)), np.empty(windows, np.int64)
  for i in range(windows):
    source_N[i] = np.argmax(share * (i + 1) - taken)
    taken[source_N[i]] += 1
  window_N = np.empty(windows, np.int64)
  for source in np.unique(source_N):
    at = np.flatnonzero(source_N == source)
    passes = [
      np.random.default_rng((seed, source, epoch)).permutation(sizes[source])
      for epoch in range(-(-len(at) // sizes[source]))
    ]
    window_N[at] = np.concatenate(passes)[: len(at)]
  return np.stack([source_N, window_N], axis=1)


def batch(sources, order_Nx2, step: int, *, micro_batches: int, rows: int):
  """Returns the tokens of a step, int32 [A,B,T].

  Args:
    sources: arrays of windows [W,T] each.
    order_Nx2: from `order`.
    step: from 0; it takes the windows that follow those of the step before.
    micro_batches: A.
    rows: B.
  """
  size = micro_batches * rows
  found = order_Nx2[step * size : (step + 1) * size]
  tokens = np.stack([sources[source][window] for source, window in found])
  return tokens.reshape(micro_batches, rows, -1)


def token_file(
  documents: Iterable[str], tokenizer, path: pathlib.Path, *, most: int, join
) -> int:
  """Writes a text's tokens to a file, a document in memory at a time.

  They are those of the joined text, if its documents neither begin nor end
  with white space and its tokenizer doesn't mark the beginning of a text.

  Args:
    documents: of the text; no more are taken than needed.
    tokenizer: of transformers.
    path: of the file to make, of int32 as the machine has them, to be read by
      `np.memmap`; complete or absent.
    most: tokens after which to stop.
    join: what goes between documents, such as a blank line or the text of the
      end-of-sequence token.

  Returns:
    How many tokens there are.
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
