"""The plots of runs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ffp_jax.reporting import labels as labels_lib
from ffp_jax.reporting.figures import (
  BLUE,
  GREY,
  ORANGE,
  RULE,
  log_scale,
  needs_log_scale,
  new_figure,
)
from ffp_jax.reporting.labels import MODELS

if TYPE_CHECKING:
  from matplotlib.axes import Axes  # slow to import
  from matplotlib.figure import Figure

_LABEL_WIDTH = 0.18  # of a stage's label, as a share of the axes' width
_MAX_MARKED_STEPS = 100  # in longer searches markers would overlap


class Point(NamedTuple):
  """A model in the plot of perplexity against parameters."""

  label: str
  params: int
  ppl: float | None
  best: bool  # on the Pareto frontier


def kept(allocation: Mapping[str, Any]) -> 'Figure':
  """Draws the share kept in every layer, attention above FFN.

  Args:
    allocation: content of allocation.json.
  """
  figure, axes = new_figure(4.6, 'Share kept in every layer', rows=2)
  axes = axes[:, 0]
  layers = allocation['layers']
  mean = 1 - allocation['sparsity_target']
  kinds = ('attention', 'ffn')
  names = ('attention groups', 'FFN channels')
  panels = zip(axes, kinds, names, (ORANGE, BLUE), strict=True)
  for ax, kind, name, color in panels:
    share = [layer[f'{kind}_kept'] / layer[f'{kind}_total'] for layer in layers]
    ax.bar([layer['layer'] for layer in layers], share, color=color, width=0.75)
    ax.axhline(mean, color='black', linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
      f'uniform\n{mean:.1%}',
      (1, mean),
      xycoords=('axes fraction', 'data'),
      xytext=(5, 0),
      textcoords='offset points',
      va='center',
      fontsize=9,
    )
    ax.set(ylim=(0, 1), ylabel=f'{name} kept')
    ax.yaxis.set_major_formatter('{x:.0%}')
    ax.grid(axis='y', color=RULE, linewidth=0.5)
    ax.tick_params(axis='x', length=0)
  axes[-1].xaxis.get_major_locator().set_params(integer=True)
  axes[-1].set(xlabel='layer', xlim=(-0.7, len(layers) - 0.3))
  return figure


def perplexity(results: Mapping[str, Any]) -> 'Figure':
  """Draws the held-out perplexity of every model as a bar.

  Args:
    results: content of results.json.
  """
  rows = [(*MODELS[k], results[k]['ppl']) for k in MODELS if k in results]
  title = 'Held-out perplexity, lower is better'
  figure, [[ax]] = new_figure(1.3 + 0.4 * len(rows), title)
  labels, colors, values = zip(*rows, strict=True)
  log = needs_log_scale(values)
  # Perplexity is at least 1: from there, bars on a log scale have lengths in
  # proportion to the loss.
  base = 1.0 if log else 0.0
  ax.set_xscale('log' if log else 'linear')
  widths = [(base if v is None else v) - base for v in values]
  bars = ax.barh(labels, widths, left=base, color=colors, height=0.66)
  ax.bar_label(bars, [labels_lib.ppl(v) for v in values], padding=4)
  if values[0] is not None:
    ax.axvline(values[0], color=GREY, linewidth=1, linestyle=(0, (1, 2)))
  ax.invert_yaxis()
  ax.set_xlim(left=base)
  ax.margins(x=0.14)
  ax.spines['left'].set_visible(False)
  ax.tick_params(axis='y', length=0)
  ax.set_xlabel('perplexity (log scale)' if log else 'perplexity')
  protocol = '\n'.join(labels_lib.protocol(results['protocol'], shorten=True))
  note = figure.supxlabel(protocol, x=0.01, ha='left', fontsize=9, color=GREY)
  note.set_parse_math(False)  # a path may hold dollar signs
  return figure


def search(metrics: Sequence[Mapping[str, Any]]) -> 'Figure':
  """Draws the rewards of a search, with the stages of its curriculum marked.

  Args:
    metrics: lines of metrics.jsonl, at least one.
  """
  figure, [[ax]] = new_figure(4.2, 'Reward of the candidates, higher is better')
  ends = list(itertools.accumulate(line['candidates'] for line in metrics))
  stages = [
    list(group)
    for _, group in itertools.groupby(
      zip(ends, metrics, strict=True), lambda pair: pair[1]['stage']
    )
  ]
  styles = {
    'reward_max': (ORANGE, '-', ORANGE),
    'reward_mean': (BLUE, '--', 'white'),
  }
  marker = 'o' if len(metrics) <= _MAX_MARKED_STEPS else 'None'
  names = labels_lib.rewards(metrics)
  for stage in stages:  # not joined: rewards compare within a stage only
    x = [end - line['candidates'] / 2 for end, line in stage]
    for key, label in names.items():
      color, dash, fill = styles[key]
      y = [math.nan if line[key] is None else line[key] for _, line in stage]
      label = label if stage is stages[0] else None
      style = {'linestyle': dash, 'marker': marker, 'markerfacecolor': fill}
      ax.plot(x, y, color=color, label=label, markersize=4, **style)
  _mark_stages(figure, ax, [stage[0] for stage in stages], ends[-1])
  ax.set(xlabel='candidates evaluated', ylabel='reward', xlim=(0, ends[-1]))
  ax.xaxis.get_major_locator().set_params(integer=True)
  ax.xaxis.set_major_formatter('{x:,.0f}')
  ax.grid(axis='y', color=RULE, linewidth=0.5)
  if needs_log_scale(line[key] for line in metrics for key in names):
    log_scale(ax)
  if len(names) > 1:
    figure.legend(loc='outside lower right', ncols=2, frameon=False)
  return figure


def recovery(lines: Sequence[Mapping[str, Any]]) -> 'Figure':
  """Draws KL divergence and validation perplexity against tokens.

  Args:
    lines: of recovery.jsonl, at least one with a validation loss.
  """
  figure, axes = new_figure(4.6, 'Recovery, lower is better', rows=2)
  above, below = axes[:, 0]
  steps = [line for line in lines if line.get('kl') is not None]
  tokens = [line['tokens'] for line in steps]
  above.plot(tokens, [x['kl'] for x in steps], color=BLUE, linewidth=1)
  above.set_ylabel('KL to the dense model')
  tested = [line for line in lines if line.get('validation') is not None]
  below.plot(
    [line['tokens'] for line in tested],
    [labels_lib.to_ppl(line['validation']) or math.nan for line in tested],
    color=ORANGE,
    marker='o',
    markersize=4,
  )
  below.set(xlabel='tokens', ylabel='validation perplexity')
  below.xaxis.set_major_formatter('{x:,.0f}')
  for ax in axes[:, 0]:
    ax.grid(axis='y', color=RULE, linewidth=0.5)
  return figure


def _mark_stages(
  figure: 'Figure',
  ax: 'Axes',
  firsts: list[tuple[int, Mapping[str, Any]]],
  total: int,
):
  """Marks where stages start by lines with labels above the axes.

  Args:
    figure: made higher to hold the labels.
    ax: with the number of evaluated candidates on the horizontal axis.
    firsts: (candidates evaluated, line of metrics) after the first step of
      each stage.
    total: candidates of the whole search.
  """
  starts = [(end - line['candidates']) / total for end, line in firsts]
  line_to_axes = dict(
    arrowstyle='-', color=RULE, relpos=(0, 0), shrinkA=0, shrinkB=0
  )
  rows = {}  # height of the label at each start
  # From right to left, so that a label is above those it would cover.
  for start, (_, line) in reversed(list(zip(starts, firsts, strict=True))):
    under = [row for at, row in rows.items() if at < start + _LABEL_WIDTH]
    rows[start] = 1 + max(under, default=-1)
    ax.axvline(start * total, color=RULE, linewidth=1)
    ax.annotate(
      f'{line["sparsity"]:.1%} sparsity\n{line["reward_tokens"]:,} tokens',
      (start, 1),
      xycoords='axes fraction',
      xytext=(0, 4 + 28 * rows[start]),
      textcoords='offset points',
      fontsize=9,
      color=GREY,
      arrowprops=line_to_axes,
    )
  figure.set_figheight(figure.get_figheight() + 0.4 * max(rows.values()))


def frontier(points: Sequence[Point]) -> 'Figure':
  """Draws perplexity against parameters, and the Pareto frontier as a line.

  Args:
    points: with finite perplexities, at least one of them the best.
  """
  figure, [[ax]] = new_figure(4.2, 'Perplexity against parameters')
  spots = [(point.params / 1e6, point.ppl) for point in points]
  styles = {False: (BLUE, 'none', 'white'), True: (ORANGE, '-', ORANGE)}
  for best, (color, line, fill) in styles.items():  # the frontier on top
    chosen = sorted(
      spot for spot, x in zip(spots, points, strict=True) if x.best == best
    )
    style = {'linestyle': line, 'marker': 'o', 'markerfacecolor': fill}
    ax.plot(*zip(*chosen, strict=True), color=color, **style)
  ax.set(xlabel='parameters, millions', ylabel='perplexity')
  ax.margins(0.08)
  if needs_log_scale(point.ppl for point in points):
    log_scale(ax)
  ax.grid(axis='y', color=RULE, linewidth=0.5)
  _label(figure, ax, [point.label for point in points], spots)
  return figure


def _label(
  figure: 'Figure', ax: 'Axes', labels: Sequence[str], spots: Sequence[tuple]
):
  """Labels points, higher up where a label would cover a point or label."""
  from matplotlib.transforms import Bbox  # slow to import

  figure.draw_without_rendering()  # lays out the axes
  centers = ax.transData.transform(spots)
  taken = [Bbox([center - 6, center + 6]) for center in centers]
  for spot, label in sorted(zip(spots, labels, strict=True)):
    name = ax.annotate(label, spot, xytext=(4, 4), textcoords='offset points')
    while any(name.get_window_extent().overlaps(box) for box in taken):
      name.xyann = (4, name.xyann[1] + 1)
    taken.append(name.get_window_extent())
