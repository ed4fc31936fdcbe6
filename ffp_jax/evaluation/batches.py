"""Batches of tokenised requests, padded to a few shapes."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_MIN_LENGTH = 32  # tokens of the shortest padded row


class Batch(NamedTuple):
  """Requests that are computed together."""

  index: list[int]  # indices of the requests, at most B
  tokens: np.ndarray  # int32 [B,T], right-padded; the last rows may be padding
  lengths: np.ndarray  # int32 [B], tokens before the padding, 1 or more


def power_of_two(count: int, least: int) -> int:
  """Returns a count rounded up to a power of two, or `least`, if more."""
  return max(least, 1 << (count - 1).bit_length())


def make_batches(
  rows: list[list[int]],
  *,
  max_length: int,
  batch_tokens: int,
  new_tokens: int = 0,
) -> Iterator[Batch]:
  """Sorts rows by length, longest first, and pads them to few shapes.

  Args:
    rows: token ids, none empty.
    max_length: tokens of the longest shape; other shapes are powers of two.
    batch_tokens: approximate number of tokens in a batch.
    new_tokens: number of tokens that each row will grow by.

  Yields:
    `Batch`es.
  """

  def padded_length(length):
    return min(max_length, power_of_two(length, _MIN_LENGTH))

  order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
  for time, group in itertools.groupby(
    order, lambda i: padded_length(len(rows[i]))
  ):
    same, count = list(group), max(1, batch_tokens // (time + new_tokens))
    for start in range(0, len(same), count):
      index = same[start : start + count]
      padded = np.zeros((count, time), np.int32)
      lengths = np.ones(count, np.int32)
      for row, i in enumerate(index):
        lengths[row] = len(rows[i])
        padded[row, : lengths[row]] = rows[i]
      yield Batch(index, padded, lengths)
