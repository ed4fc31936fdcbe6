"""Line and point charts as SVG, for a page that styles them.

Drawn as wide as a phone; page.css shrinks text and marks where there is more
room.
"""

import html
import itertools
import math
from typing import NamedTuple

from ffp_jax.reporting import wording

_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 352, 40, 200
_LETTER, _LINE = 7.5, 14  # of a label
_MANY_TIMES = 10  # values this far apart need a log scale
_MANY_STEPS = 60  # dots would hide one another


class Point(NamedTuple):
  """A model in the plane of size and perplexity."""

  label: str
  params: int
  ppl: float
  best: bool  # none is both smaller and better


class _Axis(NamedTuple):
  """Values from `low` to `high`, drawn from `start` to `end`."""

  low: float
  high: float
  start: float
  end: float
  log: bool = False

  def __call__(self, value):
    low, high, value = (
      math.log(x) if self.log else x for x in (self.low, self.high, value)
    )
    share = (value - low) / (high - low)
    return round(self.start + share * (self.end - self.start), 2)

  def ticks(self):
    from matplotlib import ticker  # slow to import

    locator = ticker.MaxNLocator(6, steps=(1, 2, 5, 10))
    if self.log:
      locator = ticker.LogLocator(subs=(1, 2, 5))
    values = locator.tick_values(self.low, self.high)
    return [float(x) for x in values if self.low <= x <= self.high]


# reward -> (look, where its legend starts)
_CURVES = {'reward_mean': ('mean', 200), 'reward_max': ('best', _LEFT)}


def reward(metrics: list[dict]) -> str:
  """Rewards of every step over the candidates so far."""
  ends = list(itertools.accumulate(line['candidates'] for line in metrics))
  labels = wording.rewards(metrics)
  values = [line[key] for line in metrics for key in labels]
  x = _Axis(0, ends[-1], _LEFT, _RIGHT)
  y = _spanning([value for value in values if value is not None])
  parts = _frame(x, y, 'candidates evaluated', 'reward')
  pairs = zip(ends, metrics, strict=True)
  for stage, group in itertools.groupby(pairs, lambda pair: pair[1]['stage']):
    group = list(group)
    at = x(group[0][0] - group[0][1]['candidates'])
    parts.append(f'<path class="stage" d="M{at} {_TOP - 14}V{_BOTTOM}"/>')
    parts.append(_text(at + 3, _TOP - 4, f'{stage + 1}', 'start'))
    for key in labels:
      points = [
        (x(end - line['candidates'] / 2), line[key]) for end, line in group
      ]
      parts += _curve(_CURVES[key][0], points, y)
  for key, label in labels.items():
    look, at = _CURVES[key]
    parts.append(f'<path class="{look}" d="M{at} 10h20"/>')
    parts.append(_dot(look, at + 10, 10))
    parts.append(_text(at + 26, 14, label, 'start'))
  return _svg(
    'Reward against candidates evaluated; all of it is in the table that '
    'follows.',
    parts,
  )


def frontier(points: list[Point]) -> str:
  """Perplexity over parameters, the frontier as a line."""
  millions = [p.params / 1e6 for p in points]
  room = 0.08 * (max(millions) - min(millions)) or 1.0
  x = _Axis(min(millions) - room, max(millions) + room, _LEFT, _RIGHT)
  y = _spanning([p.ppl for p in points])
  parts = _frame(x, y, 'parameters, millions', 'perplexity')
  spots = [(x(p.params / 1e6), y(p.ppl)) for p in points]
  line = sorted(at for at, p in zip(spots, points, strict=True) if p.best)
  parts.append(f'<path class="best" d="{_path(line)}"/>')
  taken = []
  for (left, top), point in sorted(zip(spots, points, strict=True)):
    parts.append(_dot('best' if point.best else 'mean', left, top))
    parts.append(_label(left, top, point.label, taken))
  return _svg(
    'Perplexity against parameters; all of it is in the table that follows.',
    parts,
    top=_TOP - 22,  # there is no legend
  )


def _spanning(values):
  """The vertical axis that shows all of some values, if there are any."""
  low, high = min(values, default=0.0), max(values, default=1.0)
  if low > 0 and high > _MANY_TIMES * low:
    return _Axis(low / 1.2, high * 1.2, _BOTTOM, _TOP, log=True)
  room = 0.06 * (high - low) or 0.1
  return _Axis(low - room, high + room, _BOTTOM, _TOP)


def _frame(x, y, across, up):
  parts = [f'<path class="axis" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>']
  for value in y.ticks():
    parts.append(f'<path class="grid" d="M{_LEFT} {y(value)}H{_RIGHT}"/>')
    parts.append(_text(_LEFT - 5, y(value) + 4, f'{value:,g}', 'end'))
  for value in x.ticks():
    parts.append(_text(x(value), _BOTTOM + 16, f'{value:,g}', 'middle'))
  middle = (_LEFT + _RIGHT) / 2
  parts.append(_text(middle, _HEIGHT - 6, across, 'middle'))
  parts.append(_text(0, _TOP - 8, up, 'start'))
  return parts


def _curve(look, points, y):
  """A line, broken where a value is not finite, and its points."""
  for known, part in itertools.groupby(points, lambda p: p[1] is not None):
    if known:
      spots = [(left, y(value)) for left, value in part]
      yield f'<path class="{look}" d="{_path(spots)}"/>'
      if len(points) <= _MANY_STEPS:
        yield from (_dot(look, *spot) for spot in spots)


def _label(left, top, text, taken):
  """A label beside a point, or lower where another one lies."""
  width = _LETTER * len(text)
  inside = left + 6 + width < _RIGHT
  start = left + 6 if inside else left - 6 - width
  while any(
    start < b and a < start + width and abs(top - t) < _LINE
    for a, b, t in taken
  ):
    top += 1
  taken.append((start, start + width, top))
  at = left + 6 if inside else left - 6
  return _text(at, round(top + 4, 2), text, 'start' if inside else 'end')


def _dot(look, left, top):
  return f'<circle class="{look}" cx="{left}" cy="{top}"/>'


def _path(spots):
  return 'M' + 'L'.join(f'{left} {top}' for left, top in spots)


def _text(left, top, text, anchor):
  text = html.escape(text)
  return f'<text x="{left}" y="{top}" text-anchor="{anchor}">{text}</text>'


def _svg(label, parts, top=0):
  return (
    f'<svg role="img" viewBox="0 {top} {_WIDTH} {_HEIGHT - top}" '
    f'aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
  )
