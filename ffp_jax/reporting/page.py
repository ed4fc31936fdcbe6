"""Rendering of blocks as one HTML page without scripts or network access."""

import html
import importlib.resources
from collections.abc import Iterable

from ffp_jax.reporting import figures
from ffp_jax.reporting.blocks import (
  Block,
  Code,
  Heading,
  Items,
  Picture,
  Table,
  Text,
)

# The security policy forbids fetching and scripts, whatever a model or path is
# named; the empty icon keeps browsers from requesting one.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page(title: str, blocks: Iterable[Block]) -> str:
  """Returns the text of an HTML page.

  Args:
    title: shown in the browser's tab.
    blocks: the content, in order.
  """
  style = (
    importlib.resources.files('ffp_jax.reporting')
    .joinpath('page.css')
    .read_text()
  )
  body = '\n'.join(map(_html, blocks))
  return _PAGE.format(title=html.escape(title), style=style, body=body)


def _html(block: Block) -> str:
  match block:
    case Heading(level, text):
      return f'<h{level}>{html.escape(text)}</h{level}>'
    case Text(text):
      return f'<p>{html.escape(text)}</p>'
    case Code(text):
      return f'<pre><code>{html.escape(text)}</code></pre>'
    case Items(rows):
      inner = '\n'.join(
        f'<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>'
        for name, value in rows
      )
      return f'<dl>\n{inner}\n</dl>'
    case Table():
      return _table(block)
    case Picture():
      return _picture(block)


def _picture(picture: Picture) -> str:
  parts = [
    f'<figure>\n{figures.svg(picture.figure, picture.name)}',
    f'<figcaption>{html.escape(picture.text)}</figcaption>\n</figure>',
  ]
  if picture.data:
    summary = html.escape(f'{picture.data.caption}, as a table')
    parts.append(
      f'<details>\n<summary>{summary}</summary>\n{_table(picture.data)}\n'
      '</details>'
    )
  return '\n'.join(parts)


def _table(table: Table) -> str:
  head = ''.join(map(_head, table.header))
  rows = '\n'.join(
    f'<tr><th scope="row">{html.escape(first)}</th>'
    f'{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
    for first, *cells in table.rows
  )
  return (
    f'<table>\n<caption>{html.escape(table.caption)}</caption>\n'
    f'<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>'
  )


def _head(name: str) -> str:
  if not name:  # screen readers would announce an empty header
    return '<td></td>'
  return f'<th scope="col">{html.escape(name)}</th>'
