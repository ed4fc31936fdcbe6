"""Several texts as one, with weights; no matter what they are."""

import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ffp_jax.errors import RequestError

_PIECE = 2048  # characters at least
# Up to twice as many stay whole; a cut comes after a line, or else a word.
_PIECES = re.compile(
  rf'.{{1,{2 * _PIECE}}}\Z|.{{{_PIECE}}}(?:.{{0,{_PIECE}}}?\n+|.*?\s)|.+',
  re.DOTALL,
)


class Part(NamedTuple):
  """One text of a mixture."""

  source: str
  weight: float


def parse(source: str) -> list[Part]:
  """Returns the texts that are named in 'a.txt:0.7,b.jsonl:0.3'.

  Args:
    source: texts with a comma between them, each with a weight after its
      last colon, or with weight 1 if no number is there. The path of
      something that exists is that path, commas and colons included.

  Returns:
    The parts whose weight isn't 0; of one text, the one part.

  Raises:
    RequestError: a weight is negative or endless, or all are 0.
  """
  if _exists(source):
    return [Part(source, 1.0)]
  parts = [_part(x.strip()) for x in source.split(',')]
  if not all(0 <= part.weight < math.inf for part in parts):
    raise RequestError(
      f'data: the weights in {source!r} must be numbers from 0 up'
    )
  kept = [part for part in parts if part.weight]
  if not kept:
    raise RequestError(
      f'data: the weights in {source!r} sum to 0; make one positive'
    )
  return kept


def _part(source) -> Part:
  name, _, weight = source.rpartition(':')
  if name and not _exists(source):
    try:
      return Part(name, float(weight))
    except ValueError:
      pass
  return Part(source, 1.0)


def _exists(source) -> bool:
  try:
    return bool(source) and pathlib.Path(source).expanduser().exists()
  except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such user
    return False


def pieces(documents: Iterable[str | None], join: str) -> Iterator[str | None]:
  """Yields documents in pieces of one size, about, and in their order.

  Short ones, as the lines of WikiText-2, stay together, and long ones, as a
  book in a plain text file, are cut after a line or a word.

  Args:
    documents: None, which is passed on, for those that are null.
    join: what stands between two documents.
  """
  held, size = [], 0
  for document in documents:
    if document is None:
      yield None
      continue
    for part in _PIECES.findall(document) or ['']:
      held.append(part)
      size += len(part)
      if size >= _PIECE:
        yield join.join(held).strip('\n')
        held, size = [], 0
  if size:
    yield join.join(held).strip('\n')


def interleave(
  texts: Sequence[Iterable[str | None]], shares: Sequence[float]
) -> Iterator[str | None]:
  """Yields documents of several texts, such that any stretch holds them all.

  Next is always the text that is furthest behind its share of the bytes. All
  stops where the first text ends: with the others alone the shares would not
  hold, and the end, where held-out windows are cut, would lack that text.

  Args:
    texts: documents, or None for one that is null.
    shares: positive numbers; only their ratios matter.
  """
  queues = [iter(text) for text in texts]
  used = [0.0] * len(queues)  # bytes over share
  while True:
    behind = min(range(len(queues)), key=used.__getitem__)
    document = next(queues[behind], ...)
    if document is ...:
      return
    if document is not None:
      used[behind] += len(document.encode()) / shares[behind]
    yield document
