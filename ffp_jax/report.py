"""What a run writes down: metrics as it goes, then the report and its plots."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import sys
import time

from absl import logging
from tqdm import tqdm

# The models compared, in the order and colour of every table and plot;
# Okabe and Ito's colour-blind-safe palette, paler before calibration.
_MODELS = {
  'dense': ('dense', '#7f7f7f'),
  'uniform': ('uniform', '#f5c396'),
  'uniform_calibrated': ('uniform + calibration', '#d55e00'),
  'searched': ('searched', '#99cbe6'),
  'calibrated': ('searched + calibration', '#0072b2'),
}
_BLUE, _ORANGE, _GREY = '#0072b2', '#d55e00', '#5f5f5f'
_LOG_SECONDS = 10  # between progress lines where there is no terminal
_LABEL_WIDTH = 0.16  # of a stage's label, as a share of the axes
_MANY_TIMES = 10  # perplexities this far apart need a log scale


@dataclasses.dataclass(frozen=True)
class Book:
  """Where a run writes its times, metrics and JSON files.

  Attributes:
    workdir: need not exist until something is written.
    seconds: by stage, in the order of `timed`.
  """

  workdir: pathlib.Path
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)

  @contextlib.contextmanager
  def timed(self, stage: str):
    """Logs a stage's start and time; a stage entered again adds up."""
    logging.info('%s: start', stage)
    start = time.perf_counter()
    yield
    spent = time.perf_counter() - start
    logging.info('%s: %.1f s', stage, spent)
    self.seconds[stage] = round(self.seconds.get(stage, 0.0) + spent, 3)

  def append(self, line: dict):
    """Adds a line to metrics.jsonl; non-finite floats become null."""
    self.workdir.mkdir(parents=True, exist_ok=True)
    with open(self.workdir / 'metrics.jsonl', 'a') as file:
      file.write(_json(line) + '\n')  # flushed as it closes

  def rewind(self, step: int):
    """Drops from metrics.jsonl what a search resumed at `step` will redo.

    A line that a crash tore is dropped too, so that `append` starts a new one.
    """
    path = self.workdir / 'metrics.jsonl'
    if path.exists():
      kept = [line for line in _lines(path) if line['step'] < step]
      _replace(path, ''.join(_json(line) + '\n' for line in kept))

  def write_json(self, name: str, content):
    """Writes `workdir/name`, whole or not at all; NumPy is accepted."""
    _replace(self.workdir / name, _json(content, indent=2) + '\n')

  def read_json(self, name: str):
    """The content of `workdir/name`, None if there is no such file."""
    path = self.workdir / name
    return json.loads(path.read_text()) if path.exists() else None

  def progress(self, total: int, initial: int) -> tqdm:
    """The search's bar on a terminal, else the same as lines in the log.

    Use `set_postfix` before `update`, to show this step's values.
    """
    form = '{desc} {n_fmt}/{total_fmt} {bar}{postfix}, {remaining} left'
    common = {'total': total, 'initial': initial, 'desc': 'search'}
    if sys.stderr.isatty():
      return tqdm(**common, bar_format=form, dynamic_ncols=True)
    form = form.replace(' {bar}', '')
    # miniters, lest tqdm guess how many steps fill the interval.
    return _LogBar(
      **common,
      bar_format=form,
      mininterval=_LOG_SECONDS,
      miniters=1,
      file=io.StringIO(),
    )


class _LogBar(tqdm):
  """A bar that logs a plain line whenever tqdm would redraw."""

  _shown = None

  def display(self, msg=None, pos=None):
    del msg, pos
    if self._shown != (self.n, self.postfix):  # close repeats the last one
      self._shown = (self.n, self.postfix)
      logging.info('%s', self)

  def set_postfix(self, **values):
    # tqdm's own redraws at once, as often as it is called.
    super().set_postfix(refresh=False, **values)


def _plain(value):
  if hasattr(value, 'tolist'):  # NumPy
    value = value.tolist()
  if isinstance(value, dict):
    return {key: _plain(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _json(content, indent=None) -> str:
  return json.dumps(_plain(content), indent=indent, allow_nan=False)


def _lines(path) -> list[dict]:
  found = []
  for line in path.read_text(errors='replace').splitlines():
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      logging.warning('%s: a torn line is left out', path)
  return found


def _replace(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  temp = path.with_name(f'.{path.name}.tmp')
  temp.write_text(text)
  os.replace(temp, path)


def summary(results: dict, allocation: dict) -> str:
  """What the run found, as plain text of less than 15 lines of 80 columns.

  Args:
    results: what results.json holds.
    allocation: what allocation.json holds.
  """
  rows = [f'{"":24}{"perplexity":>12}{"x dense":>10}']
  rows += [
    f'{name:24}{ppl:>12}{times:>10}' for name, ppl, times in _compare(results)
  ]
  asked, got = (allocation[f'sparsity_{k}'] for k in ('target', 'achieved'))
  dense, pruned = results['params_dense'], results['params_pruned']
  before, after = (results[f'bytes_{k}'] for k in ('dense', 'pruned'))
  return '\n'.join(
    [
      *rows,
      *_protocol(results['protocol'], shorten=True),
      '',
      f'sparsity    {got:.2%} of the prunable parameters ({asked:.2%} asked)',
      f'parameters  {dense:,} -> {pruned:,} ({_removed(dense, pruned)})',
      f'weights     {_size(before)} -> {_size(after)} '
      f'({_removed(before, after)})',
    ]
  )


def write(workdir: pathlib.Path):
  """Writes report.md and its plots from the JSON files of a finished run.

  Without search steps there is no plot_search.png.

  Args:
    workdir: holds config.json, allocation.json, results.json and, if there
      was a search, metrics.jsonl.
  """
  names = ('config', 'allocation', 'results')
  config, allocation, results = (
    json.loads((workdir / f'{name}.json').read_text()) for name in names
  )
  path = workdir / 'metrics.jsonl'
  metrics = _lines(path) if path.exists() else []
  _plot_kept(allocation).savefig(workdir / 'plot_kept.png')
  _plot_perplexity(results).savefig(workdir / 'plot_perplexity.png')
  if metrics:
    _plot_search(metrics).savefig(workdir / 'plot_search.png')
  sections = [
    *_request(config, results),
    *_perplexities(results),
    *_sizes(results, allocation),
    *_cost(results),
    *_search(metrics),
    *_allocation(allocation),
  ]
  _replace(workdir / 'report.md', '\n\n'.join(sections) + '\n')


def _request(config, results):
  yield f'# Pruning `{config["model"]}`'
  yield '\n'.join(
    [
      f'- model: `{config["model"]}`',
      f'- text: `{config["data"]}`',
      f'- sparsity: {config["budget"]["sparsity"]:.2%} of the prunable '
      'parameters (attention and FFN of the decoder layers)',
      f'- seed: {config["seed"]}',
      '- every setting: [config.json](config.json)',
    ]
  )
  if 'command' in results:
    yield f'```\n{results["command"]}\n```'


def _perplexities(results):
  yield '## Perplexity'
  yield _table('model | perplexity | x dense', _compare(results))
  yield ' '.join(_protocol(results['protocol'])) + (
    ' Lower is better. *Uniform* spends the same budget with one share for '
    'every module; *searched* is the allocation that the search found.'
  )
  yield '![Held-out perplexity of each model](plot_perplexity.png)'
  yield '### Reward against held-out text'
  yield (
    'Both before calibration. The search saw the reward text and never the '
    'held-out text; where the ratio is lower on the latter, the allocation '
    'fits the reward text.'
  )
  seen, unseen = results['reward'], results['protocol']
  dense, searched = (results[k]['ppl'] for k in ('dense', 'searched'))
  rows = [
    ('reward', seen, seen['dense_ppl'], seen['searched_ppl']),
    ('held-out', unseen, dense, searched),
  ]
  yield _table(
    'text | context | tokens | dense | searched | dense / searched',
    [
      (name, f'{use["context"]:,}', f'{use["tokens"]:,}')
      + (_ppl(dense), _ppl(searched), _ratio(dense, searched, 3))
      for name, use, dense, searched in rows
    ],
  )


def _sizes(results, allocation):
  asked, got = (allocation[f'sparsity_{k}'] for k in ('target', 'achieved'))
  dense, removed = results['params_dense'], results['params_removed']
  prunable = results['params_prunable']
  yield '## Size'
  yield (
    f'Sparsity {asked:.3%} asked, {got:.3%} achieved, of the prunable '
    f'parameters; {removed / dense:.2%} of all parameters removed.'
  )
  rows = {
    'parameters, all': (dense, results['params_pruned']),
    'parameters, prunable': (prunable, prunable - removed),
    'weights, bytes': (results['bytes_dense'], results['bytes_pruned']),
  }
  yield _table(
    'what | dense | pruned | change',
    [(k, f'{a:,}', f'{b:,}', _removed(a, b)) for k, (a, b) in rows.items()],
  )


def _cost(results):
  yield '## Cost'
  yield '\n'.join(
    f'- {name.replace("_", " ")}: {results[name]:,}'
    for name in ('candidates_evaluated', 'tokens_evaluated', 'compilations')
  )
  seconds = results['seconds']
  rows = [(stage, f'{s:,.1f}') for stage, s in seconds.items()]
  total = ('**all**', f'**{sum(seconds.values()):,.1f}**')
  yield _table('stage | seconds', [*rows, total])


def _search(metrics):
  yield '## Search'
  if not metrics:
    yield 'No search steps were taken.'
    return
  yield (
    'Rewards compare within a stage only: each has its own sparsity and tokens.'
  )
  yield '![Reward of the candidates evaluated](plot_search.png)'


def _allocation(allocation):
  yield '## Allocation'
  yield '![Share kept in every layer, attention and FFN](plot_kept.png)'
  rows = []
  for layer in allocation['layers']:
    row = [str(layer['layer'])]
    for kind in ('attention', 'ffn'):
      kept, total = layer[f'{kind}_kept'], layer[f'{kind}_total']
      row.append(f'{kept:,} / {total:,} ({kept / total:.0%})')
    rows.append(row)
  yield _table('layer | attention groups kept | FFN channels kept', rows)


def _table(header, rows) -> str:
  names = header.split(' | ')
  # The first column holds names, the others numbers.
  rules = [':--'] + ['--:'] * (len(names) - 1)
  return '\n'.join(f'| {" | ".join(row)} |' for row in [names, rules, *rows])


def _compare(results):
  dense = results['dense']['ppl']
  return [
    (label, _ppl(results[key]['ppl']), _ratio(results[key]['ppl'], dense, 2))
    for key, (label, _) in _MODELS.items()
    if key in results
  ]


def _protocol(protocol, shorten=False) -> list[str]:
  text = protocol['text']
  if shorten and len(text) > 40:  # a long path: its end tells it apart
    text = '...' + text[-37:]
  return [
    f'Text {text}, {protocol["split"]} split:',
    f'{protocol["windows"]:,} windows of {protocol["context"]:,} tokens, '
    f'{protocol["tokens"]:,} tokens scored.',
  ]


def _ppl(value) -> str:
  if value is None:
    return 'not finite'
  return f'{value:,.2f}' if value < 1e5 else f'{value:.2e}'


def _ratio(above, below, digits) -> str:
  if above is None or below is None:
    return '-'
  ratio = above / below
  return f'{ratio:,.{digits}f}' if ratio < 1e5 else f'{ratio:.1e}'


def _removed(before, after) -> str:
  return f'{after / before - 1:+.1%}'


def _size(count) -> str:
  return f'{count / 1e6:,.1f} MB'


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


def _plot_kept(allocation):
  figure, axes = _figure(4.6, 'Share kept in every layer', rows=2)
  layers = allocation['layers']
  mean = 1 - allocation['sparsity_target']
  kinds = {'attention': ('attention groups', _ORANGE)}
  kinds['ffn'] = ('FFN channels', _BLUE)
  for ax, (kind, (label, color)) in zip(axes, kinds.items(), strict=True):
    share = [layer[f'{kind}_kept'] / layer[f'{kind}_total'] for layer in layers]
    ax.bar([layer['layer'] for layer in layers], share, color=color, width=0.75)
    ax.axhline(mean, color='black', linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
      f'budget\n{mean:.1%}',
      (1, mean),
      xycoords=('axes fraction', 'data'),
      xytext=(5, 0),
      textcoords='offset points',
      va='center',
      fontsize=9,
    )
    ax.set(ylim=(0, 1), ylabel=f'{label} kept')
    ax.yaxis.set_major_formatter('{x:.0%}')
    ax.grid(axis='y', color='0.9')
    ax.tick_params(axis='x', length=0)
  axes[-1].xaxis.get_major_locator().set_params(integer=True)
  axes[-1].set(xlabel='layer', xlim=(-0.7, len(layers) - 0.3))
  return figure


def _plot_perplexity(results):
  figure, (ax,) = _figure(3.2, 'Held-out perplexity, lower is better')
  rows = [(*_MODELS[k], results[k]['ppl']) for k in _MODELS if k in results]
  labels, colors, values = zip(*rows, strict=True)
  known = [value for value in values if value is not None]
  log = bool(known) and max(known) > _MANY_TIMES * min(known)
  # On a log scale bars start at 1, where perplexity does: length is loss.
  base = 1.0 if log else 0.0
  ax.set_xscale('log' if log else 'linear')
  widths = [(base if v is None else v) - base for v in values]
  bars = ax.barh(labels, widths, left=base, color=colors, height=0.66)
  ax.bar_label(bars, [_ppl(v) for v in values], padding=4, fontsize=10)
  if values[0] is not None:
    ax.axvline(values[0], color=_GREY, linewidth=1, linestyle=(0, (1, 2)))
  ax.invert_yaxis()
  ax.set_xlim(left=base)
  ax.margins(x=0.14)
  ax.spines['left'].set_visible(False)
  ax.tick_params(axis='y', length=0, labelsize=10)
  scale = 'perplexity (log scale)' if log else 'perplexity'
  protocol = '\n'.join(_protocol(results['protocol'], shorten=True))
  ax.set_xlabel(f'{scale}\n{protocol}', fontsize=9)
  return figure


def _plot_search(metrics):
  figure, (ax,) = _figure(4.2, 'Reward of the candidates, higher is better')
  ends = list(itertools.accumulate(line['candidates'] for line in metrics))
  stages = [
    list(group)
    for _, group in itertools.groupby(
      zip(ends, metrics, strict=True), lambda pair: pair[1]['stage']
    )
  ]
  lines = {
    'reward_max': ('best of the step', _ORANGE),
    'reward_mean': ('mean of the step', _BLUE),
  }
  for stage in stages:  # apart, since rewards compare within a stage only
    x, found = zip(*stage, strict=True)
    for key, (label, color) in lines.items():
      y = [math.nan if line[key] is None else line[key] for line in found]
      label = label if stage is stages[0] else None
      ax.plot(x, y, color=color, label=label, marker='o', markersize=3)
  _mark_stages(ax, [stage[0] for stage in stages], ends[-1])
  ax.set(xlabel='candidates evaluated', ylabel='reward', xlim=(0, ends[-1]))
  ax.grid(axis='y', color='0.9')
  figure.legend(loc='outside lower right', ncols=2, frameon=False, fontsize=9)
  return figure


def _mark_stages(ax, firsts, total):
  """Flags above the axes, each on a pole where its stage starts."""
  starts = [(end - line['candidates']) / total for end, line in firsts]
  rows = {}
  # From the last one, so that a flag is above all that it would cover.
  for i in reversed(range(len(firsts))):
    under = [rows[j] for j in rows if starts[j] < starts[i] + _LABEL_WIDTH]
    rows[i] = 1 + max(under, default=-1)
    line = firsts[i][1]
    ax.annotate(
      f'{line["sparsity"]:.1%} sparsity\n{line["reward_tokens"]:,} tokens',
      (starts[i], 0),
      xycoords='axes fraction',
      xytext=(starts[i] + 0.006, 1.03 + 0.13 * rows[i]),
      fontsize=9,
      color=_GREY,
    )
    pole = [0, 1.13 + 0.13 * rows[i]]
    ax.plot(
      [starts[i]] * 2,
      pole,
      transform=ax.transAxes,
      clip_on=False,
      color='0.7',
      linewidth=1,
    )
