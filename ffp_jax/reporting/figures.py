"""Figures of matplotlib: their common look, and their rendering.

A PNG has the colours below. In an SVG most of them are variables of the HTML
page, so that a dark screen gets other ones.
"""

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from ffp_jax.reporting.labels import MODELS

if TYPE_CHECKING:
  from matplotlib.axes import Axes  # slow to import
  from matplotlib.figure import Figure

BLUE, ORANGE, GREY, RULE = '#0072b2', '#d55e00', '#595959', '#d0d0d0'
# Names in page.css of the colours that change on a dark screen.
THEME = {
  '#000000': 'ink',
  '#ffffff': 'paper',
  GREY: 'pale',
  RULE: 'rule',
  BLUE: 'blue',
  ORANGE: 'orange',
  MODELS['searched'][1]: 'sky',
  MODELS['uniform'][1]: 'sand',
}
_LOG_SCALE_RATIO = 10  # of maximum to minimum, above which a scale is log


def new_figure(
  height: float, title: str, rows: int = 1, columns: int = 1
) -> tuple['Figure', np.ndarray]:
  """Returns an empty figure and its axes.

  Args:
    height: in inches.
    title: above the axes.
    rows, columns: numbers of axes.

  Returns:
    (figure, axes of shape [rows, columns]).
  """
  from matplotlib.figure import Figure  # slow to import

  figure = Figure(figsize=(8, height), dpi=150, layout='constrained')
  figure.suptitle(title, x=0.01, ha='left', fontsize=12, fontweight='bold')
  axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
  for ax in axes.flat:
    ax.spines[['top', 'right']].set_visible(False)
    ax.set_axisbelow(True)
  return figure, axes


def png(figure: 'Figure') -> bytes:
  """Returns the content of a PNG file of the figure."""
  figure.savefig(file := io.BytesIO(), format='png')
  return file.getvalue()


def svg(figure: 'Figure', name: str) -> str:
  """Returns the figure as an SVG element to embed in an HTML page.

  The same figure and name always give the same text.

  Args:
    figure: made by `new_figure`.
    name: unique on the page, since ids within the element are made from it.
  """
  import matplotlib  # slow to import

  settings: dict[Any, Any] = {
    'font.sans-serif': ['DejaVu Sans', 'Verdana'],  # of equal widths
    'svg.fonttype': 'none',
    'svg.hashsalt': name,
  }
  with matplotlib.rc_context(settings):
    figure.savefig(file := io.StringIO(), format='svg', transparent=True)
  text = file.getvalue()
  root = ElementTree.fromstring(text)
  for tag in ('metadata', 'defs'):  # the first defs holds a style sheet
    root.remove(_find(root, tag))
  linked = set(re.findall(r'["(]#(\w+)', text))
  for element in root.iter():
    _simplify(element, linked)
  # Black elements have no colour of their own and inherit that of the root.
  root.attrib = {
    'role': 'img',
    'aria-label': f'{figure.get_suptitle()}; all of it is in the table that '
    'follows.',
    'viewBox': root.attrib['viewBox'],
    'style': 'fill: var(--ink); stroke-linejoin: round',
  }
  return ElementTree.tostring(root, encoding='unicode')


def _find(root: ElementTree.Element, tag: str) -> ElementTree.Element:
  return next(element for element in root if element.tag.endswith('}' + tag))


def _simplify(element: ElementTree.Element, linked: set[str]):
  """Removes namespaces, blanks and unused ids; uses the page's colours.

  Args:
    element: changed in place.
    linked: ids that other elements refer to.
  """
  attributes = {
    name.rpartition('}')[2]: ' '.join(value.split())
    for name, value in element.items()
  }
  if attributes.get('id') not in linked:
    attributes.pop('id', None)
  if 'style' in attributes:
    attributes['style'] = re.sub(
      '#[0-9a-f]{6}', _css_colour, attributes['style']
    )
  element.attrib = attributes
  element.tag = element.tag.rpartition('}')[2]
  if not (element.text or '').strip():
    element.text = None
  element.tail = None


def _css_colour(match: re.Match) -> str:
  colour = match[0]
  return f'var(--{THEME[colour]})' if colour in THEME else colour


def log_scale(ax: 'Axes'):
  """Makes the vertical scale logarithmic, with plain numbers at its ticks."""
  from matplotlib import ticker  # slow to import

  ax.set_yscale('log')
  ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  ax.yaxis.set_major_formatter('{x:,g}')
  ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def needs_log_scale(values: Iterable[float | None]) -> bool:
  """Returns whether the values that are finite lie far apart."""
  known = [value for value in values if value is not None]
  return bool(known) and 0 < _LOG_SCALE_RATIO * min(known) < max(known)
