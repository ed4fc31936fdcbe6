"""What a report is made of, and the same as Markdown.

Text is plain here: every renderer escapes what it writes.
"""

import pathlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ffp_jax.reporting import plots
from ffp_jax.runtime.storage import write_atomically

if TYPE_CHECKING:
  from matplotlib.figure import Figure  # slow to import


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


class Table(NamedTuple):
  """Rows of cells; the first cell of a row names it."""

  caption: str
  header: tuple[str, ...]
  rows: list[tuple[str, ...]]


class Picture(NamedTuple):
  """A picture.

  Attributes:
    text: what it shows, under it and for those who don't see it.
    name: tells it from the others of its page.
    figure: what a function of `plots` has drawn.
    data: what is drawn, folded away.
  """

  text: str
  name: str
  figure: 'Figure'
  data: Table | None = None

  @property
  def file(self) -> str:
    """The picture beside a Markdown page."""
    return f'plot_{self.name}.png'


Block = Heading | Text | Code | Items | Table | Picture


def write_markdown(path: pathlib.Path, blocks: Iterable[Block]):
  """Writes the blocks as a Markdown page, and its pictures beside it."""
  blocks = list(blocks)
  for block in blocks:
    if isinstance(block, Picture):
      path.with_name(block.file).write_bytes(plots.png(block.figure))
  write_atomically(path, markdown(blocks))


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
      return _picture(block)
    case Table():
      return _table(block)


def _picture(picture):
  image = f'![{_escape(picture.text)}]({picture.file})'
  if not picture.data:
    return image
  # The blank lines make what is between them Markdown again.
  return (
    f'{image}\n\n<details>\n<summary>{_escape(picture.data.caption)}</summary>\n\n'
    f'{_table(picture.data)}\n\n</details>'
  )


def _table(table):
  # The first column holds names, the others numbers.
  rules = [':--'] + ['--:'] * (len(table.header) - 1)
  rows = [[_escape(cell) for cell in row] for row in table.rows]
  return '\n'.join(
    f'| {" | ".join(row)} |' for row in [table.header, rules, *rows]
  )


def _escape(text: str) -> str:
  """Lets paths and names stand as they are."""
  return re.sub(r'([\\`*\[\]<|$])', r'\\\1', ' '.join(text.split()))
