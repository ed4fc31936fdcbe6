"""Mixtures of several texts by weight."""

import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ffp_jax.errors import RequestError

_PIECE = 2048  # least characters of a piece
# Up to twice as many stay whole; longer texts are cut after a line or a word.
_PIECES = re.compile(
  rf'.{{1,{2 * _PIECE}}}\Z|.{{{_PIECE}}}(?:.{{0,{_PIECE}}}?\n+|.*?\s)|.+',
  re.DOTALL,
)


class Part(NamedTuple):
  """Describes one text of a mixture."""

  source: str
  weight: float


def parse(source: str) -> list[Part]:
  """Parses the texts and weights of a mixture, as in 'a.txt:0.7,b.jsonl:0.3'.

  Args:
    source: texts separated by commas, each with a weight after its last
      colon, or with weight 1 if no number is there. An existing path is taken
      as that path, commas and colons included.

  Returns:
    The parts whose weight is not 0; for a single text, that part.

  Raises:
    RequestError: a weight is negative or not finite, or all are 0.
  """
  if _exists(source):
    return [Part(source, 1.0)]
  parts = [_parse_part(x.strip()) for x in source.split(',')]
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


def _parse_part(source) -> Part:
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
  """Yields documents in pieces of about one size, in their order.

  Short documents, such as the lines of WikiText-2, are joined, and long ones,
  such as a book in a text file, are cut after a line or a word.

  Args:
    documents: texts; None, for a null document, is passed on.
    join: text between two documents.
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
  """Yields the documents of several texts, such that any stretch has all texts.

  The next document is always of the text that is furthest behind its share of
  the bytes. The mixture ends when the first text ends: without it the shares
  would not hold, and held-out windows, which are cut from the end, would lack
  that text.

  Args:
    texts: documents of each text; None for a null document.
    shares: of each text, positive; only their ratios matter.
  """
  queues = [iter(text) for text in texts]
  used = [0.0] * len(queues)  # bytes divided by share
  while True:
    behind = min(range(len(queues)), key=used.__getitem__)
    document = next(queues[behind], ...)
    if document is ...:
      return
    if document is not None:
      used[behind] += len(document.encode()) / shares[behind]
    yield document
