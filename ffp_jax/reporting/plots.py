"""The three pictures of a run."""

import io
import itertools
import math

from ffp_jax.reporting import wording
from ffp_jax.reporting.wording import MODELS

_BLUE, _ORANGE, _GREY = '#0072b2', '#d55e00', '#5f5f5f'
_LABEL_WIDTH = 0.16  # of a stage's label, as a share of the axes
_MANY_TIMES = 10  # perplexities this far apart need a log scale


def _figure(height, title, rows=1):
  from matplotlib.figure import Figure  # slow to import

  figure = Figure(figsize=(8, height), dpi=150, layout='constrained')
  figure.suptitle(title, x=0.01, ha='left', fontsize=12, fontweight='bold')
  axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
  for ax in axes:
    ax.spines[['top', 'right']].set_visible(False)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9)
  return figure, axes


def png(figure) -> bytes:
  """A picture as the bytes of its file."""
  figure.savefig(file := io.BytesIO(), format='png')
  return file.getvalue()


def kept(allocation):
  """Share kept in every layer, attention above FFN."""
  figure, axes = _figure(4.6, 'Share kept in every layer', rows=2)
  layers = allocation['layers']
  mean = 1 - allocation['sparsity_target']
  kinds = ('attention', 'ffn')
  names = ('attention groups', 'FFN channels')
  looks = zip(axes, kinds, names, (_ORANGE, _BLUE), strict=True)
  for ax, kind, name, color in looks:
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
    ax.grid(axis='y', color='0.9')
    ax.tick_params(axis='x', length=0)
  axes[-1].xaxis.get_major_locator().set_params(integer=True)
  axes[-1].set(xlabel='layer', xlim=(-0.7, len(layers) - 0.3))
  return figure


def perplexity(results):
  """Held-out perplexity of every model, as bars."""
  rows = [(*MODELS[k], results[k]['ppl']) for k in MODELS if k in results]
  title = 'Held-out perplexity, lower is better'
  figure, (ax,) = _figure(1.3 + 0.4 * len(rows), title)
  labels, colors, values = zip(*rows, strict=True)
  known = [value for value in values if value is not None]
  log = bool(known) and max(known) > _MANY_TIMES * min(known)
  # On a log scale bars start at 1, where perplexity does: length is loss.
  base = 1.0 if log else 0.0
  ax.set_xscale('log' if log else 'linear')
  widths = [(base if v is None else v) - base for v in values]
  bars = ax.barh(labels, widths, left=base, color=colors, height=0.66)
  ax.bar_label(bars, [wording.ppl(v) for v in values], padding=4, fontsize=10)
  if values[0] is not None:
    ax.axvline(values[0], color=_GREY, linewidth=1, linestyle=(0, (1, 2)))
  ax.invert_yaxis()
  ax.set_xlim(left=base)
  ax.margins(x=0.14)
  ax.spines['left'].set_visible(False)
  ax.tick_params(axis='y', length=0, labelsize=10)
  ax.set_xlabel('perplexity (log scale)' if log else 'perplexity')
  protocol = '\n'.join(wording.protocol(results['protocol'], shorten=True))
  note = figure.supxlabel(protocol, x=0.01, ha='left', fontsize=9, color=_GREY)
  note.set_parse_math(False)  # a path may hold dollar signs
  return figure


def search(metrics):
  """Reward over candidates, the curriculum's stages marked."""
  figure, (ax,) = _figure(4.2, 'Reward of the candidates, higher is better')
  ends = list(itertools.accumulate(line['candidates'] for line in metrics))
  stages = [
    list(group)
    for _, group in itertools.groupby(
      zip(ends, metrics, strict=True), lambda pair: pair[1]['stage']
    )
  ]
  looks = {
    'reward_max': (_ORANGE, '-', _ORANGE),
    'reward_mean': (_BLUE, '--', 'white'),
  }
  for stage in stages:  # apart, since rewards compare within a stage only
    x = [end - line['candidates'] / 2 for end, line in stage]
    for key, label in wording.rewards(metrics).items():
      color, dash, fill = looks[key]
      y = [math.nan if line[key] is None else line[key] for _, line in stage]
      label = label if stage is stages[0] else None
      look = {'linestyle': dash, 'marker': 'o', 'markerfacecolor': fill}
      ax.plot(x, y, color=color, label=label, markersize=4, **look)
  _mark_stages(ax, [stage[0] for stage in stages], ends[-1])
  ax.set(xlabel='candidates evaluated', ylabel='reward', xlim=(0, ends[-1]))
  ax.xaxis.get_major_locator().set_params(integer=True)
  ax.grid(axis='y', color='0.9')
  figure.legend(loc='outside lower right', ncols=2, frameon=False, fontsize=9)
  return figure


def _mark_stages(ax, firsts, total):
  """Flags above the axes, each on a pole where its stage starts."""
  starts = [(end - line['candidates']) / total for end, line in firsts]
  pole = dict(arrowstyle='-', color='0.7', relpos=(0, 0), shrinkA=0, shrinkB=0)
  rows = {}
  # From the last one, so that a flag is above all that it would cover.
  for start, (_, line) in reversed(list(zip(starts, firsts, strict=True))):
    under = [row for at, row in rows.items() if at < start + _LABEL_WIDTH]
    rows[start] = 1 + max(under, default=-1)
    ax.axvline(start * total, color='0.7', linewidth=1)
    ax.annotate(
      f'{line["sparsity"]:.1%} sparsity\n{line["reward_tokens"]:,} tokens',
      (start, 1),
      xycoords='axes fraction',
      xytext=(0, 4 + 28 * rows[start]),
      textcoords='offset points',
      fontsize=9,
      color=_GREY,
      arrowprops=pole,
    )
  ax.figure.set_figheight(ax.figure.get_figheight() + 0.4 * max(rows.values()))
