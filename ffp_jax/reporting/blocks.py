"""The blocks that reports are made of, and their rendering as Markdown.

Blocks hold plain text; every renderer escapes what it writes.
"""

import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ffp_jax.reporting import figures
from ffp_jax.runtime.storage import write_atomically

if TYPE_CHECKING:
  from matplotlib.figure import Figure  # slow to import


class Heading(NamedTuple):
  """A title; level 1 is the title of the page, and no level is skipped."""

  level: int
  text: str


class Text(NamedTuple):
  """A paragraph."""

  text: str


class Code(NamedTuple):
  """Text that a reader may copy, such as a command."""

  text: str


class Items(NamedTuple):
  """Pairs of a name and its value, one per line."""

  rows: Sequence[tuple[str, str]]


class Table(NamedTuple):
  """Rows of cells; the first cell of a row is its name."""

  caption: str
  header: tuple[str, ...]
  rows: Sequence[tuple[str, ...]]


class Picture(NamedTuple):
  """A picture with its caption.

  Attributes:
    text: the caption, which is also the alternative text.
    name: unique among the pictures of a page.
    figure: from a function of `plots`.
    data: the drawn values, shown folded away below the picture.
  """

  text: str
  name: str
  figure: 'Figure'
  data: Table | None = None

  @property
  def file(self) -> str:
    """Returns the name of the PNG file that a Markdown page links to."""
    return f'plot_{self.name}.png'


Block = Heading | Text | Code | Items | Table | Picture


def write_markdown(path: pathlib.Path, blocks: Iterable[Block]):
  """Writes a Markdown page, and its pictures as PNG files beside it."""
  blocks = list(blocks)
  for block in blocks:
    if isinstance(block, Picture):
      path.with_name(block.file).write_bytes(figures.png(block.figure))
  write_atomically(path, markdown(blocks))


def markdown(blocks: Iterable[Block]) -> str:
  """Returns the text of a Markdown page."""
  return '\n\n'.join(_markdown(block) for block in blocks) + '\n'


def _markdown(block: Block) -> str:
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


def _picture(picture: Picture) -> str:
  image = f'![{_escape(picture.text)}]({picture.file})'
  if not picture.data:
    return image
  # After a blank line, text inside an HTML element is read as Markdown.
  return (
    f'{image}\n\n<details>\n<summary>{_escape(picture.data.caption)}</summary>\n\n'
    f'{_table(picture.data)}\n\n</details>'
  )


def _table(table: Table) -> str:
  # The first column holds names, the others hold numbers.
  rules = [':--'] + ['--:'] * (len(table.header) - 1)
  rows = [[_escape(cell) for cell in row] for row in table.rows]
  return '\n'.join(
    f'| {" | ".join(row)} |' for row in [table.header, rules, *rows]
  )


def _escape(text: str) -> str:
  """Returns text on one line, with Markdown's special characters escaped."""
  return re.sub(r'([\\`*\[\]<|$])', r'\\\1', ' '.join(text.split()))
