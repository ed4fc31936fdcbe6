"""What a report is made of, and the same as Markdown.

Text is plain here: every renderer escapes what it writes.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Heading(NamedTuple):
  """A title; levels follow one another, from the page's own, 1."""

  level: int
  text: str


class Text(NamedTuple):
  """A paragraph."""

  text: str


class Code(NamedTuple):
  """What a reader may copy, such as a command."""

  text: str


class Items(NamedTuple):
  """Named values, one a line."""

  rows: list[tuple[str, str]]


class Bar(NamedTuple):
  """A cell whose share, of 0 to 1, is drawn as a length as well."""

  text: str
  share: float


class Heat(NamedTuple):
  """A cell whose share, of 0 to 1, is drawn as a colour as well."""

  text: str
  share: float


class Table(NamedTuple):
  """Rows of cells; the first cell of a row names it."""

  caption: str
  header: tuple[str, ...]
  rows: list[tuple[str | Bar | Heat, ...]]


class Picture(NamedTuple):
  """A picture.

  Attributes:
    text: what it shows, for those who don't see it.
    png: file beside report.md.
    svg: the same for a page; empty where a table of the page shows it.
    data: what is drawn, which a page folds away.
  """

  text: str
  png: str
  svg: str = ''
  data: Table | None = None


Block = Heading | Text | Code | Items | Table | Picture


def markdown(blocks: Iterable[Block]) -> str:
  """The blocks as a Markdown page."""
  return '\n\n'.join(_markdown(block) for block in blocks) + '\n'


def _markdown(block):
  match block:
    case Heading():
      return f'{"#" * block.level} {_escape(block.text)}'
    case Text():
      return _escape(block.text)
    case Code():
      return f'```\n{block.text}\n```'
    case Items():
      return '\n'.join(f'- {name}: {_escape(x)}' for name, x in block.rows)
    case Picture():
      return f'![{_escape(block.text)}]({block.png})'
    case Table():
      # The first column holds names, the others numbers.
      rules = [':--'] + ['--:'] * (len(block.header) - 1)
      rows = [[_escape(text_of(cell)) for cell in row] for row in block.rows]
      return '\n'.join(
        f'| {" | ".join(row)} |' for row in [block.header, rules, *rows]
      )


def text_of(cell: str | Bar | Heat) -> str:
  """The words of a table's cell."""
  return cell if isinstance(cell, str) else cell.text


def _escape(text: str) -> str:
  """Lets paths and names stand as they are."""
  return re.sub(r'([\\`*\[\]<|$])', r'\\\1', ' '.join(text.split()))
