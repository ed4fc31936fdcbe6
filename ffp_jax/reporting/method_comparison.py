"""The page of a comparison of allocation methods: tables and plots."""

import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ffp_jax.reporting import blocks, figures, labels
from ffp_jax.reporting.blocks import Block, Heading, Picture, Table, Text
from ffp_jax.runtime.storage import to_json_types

if TYPE_CHECKING:
  from matplotlib.figure import Figure  # slow to import

_REFERENCE = 'fastforward'  # the method that the others are set against


def run_key(run: Mapping[str, Any]) -> tuple[str, float, int]:
  """Returns (method, sparsity, seed), unique among the runs of compare.json."""
  return run['method'], run['sparsity'], run['seed']


def run_line(run: Mapping[str, Any]) -> str:
  """Returns a line for the log that sums up one run."""
  run = to_json_types(run)
  return (
    f'{run["method"]} at {run["sparsity"]:g}, seed {run["seed"]}: '
    f'{labels.ppl(run["ppl"])}, calibrated '
    f'{labels.ppl(run["ppl_calibrated"])}, {run["tokens"]:,} tokens, '
    f'{run["seconds"]:.0f} s'
  )


def write(results: Mapping[str, Any], workdir: pathlib.Path):
  """Writes compare.md and its plots.

  Args:
    results: content of compare.json.
    workdir: gets the files.
  """
  blocks.write_markdown(workdir / 'compare.md', page(results))


def summary(results: Mapping[str, Any]) -> str:
  """Returns a table of all methods and sparsities as plain text."""
  rows = [
    f'{"":24}{"sparsity":>10}{"perplexity":>18}{"+ calibration":>18}',
    f'{"dense":24}{"":>10}{labels.ppl(results["dense_ppl"]):>18}',
  ]
  for sparsity, groups in _grouped(results['runs']):
    for method, runs in groups:
      before, after = (_spread(runs, k) for k in ('ppl', 'ppl_calibrated'))
      rows.append(f'{method:24}{sparsity:>10g}{before:>18}{after:>18}')
  return '\n'.join([*rows, *labels.protocol(results['protocol'], True)])


def page(results: Mapping[str, Any]) -> Iterator[Block]:
  """Yields the blocks of compare.md.

  Args:
    results: content of compare.json.
  """
  yield Heading(1, f'Allocation methods compared on {results["model"]}')
  yield Text(
    f'Each method may evaluate {results["tokens"]:,} tokens, a backward pass '
    'counted as two forward ones. All share scores, projection, calibration '
    'and text. Means over seeds, and standard deviations where there are '
    'several.'
  )
  yield Text(' '.join(labels.protocol(results['protocol'])))
  yield Text(f'Dense: perplexity {labels.ppl(results["dense_ppl"])}.')
  yield _overview(results['runs'])
  if differences := _behind(results['runs']):
    yield Text(
      'The seed also cuts the text, so methods compare best seed by seed: '
      f'how much higher than {_REFERENCE} with calibration, and on how many '
      'seeds.'
    )
    yield differences
  for sparsity, groups in _grouped(results['runs']):
    yield Heading(2, f'{sparsity:.0%} of the prunable parameters removed')
    yield Table(
      'Held-out perplexity, reward and cost',
      (
        'method',
        'seeds',
        'perplexity',
        'with calibration',
        'reward',
        'tokens',
        'seconds',
      ),
      [_row(method, runs) for method, runs in groups],
    )
  for name, caption, draw in _pictures(results):
    yield Picture(caption, name, draw(results))


def _overview(runs: Sequence[Mapping[str, Any]]) -> Table:
  """Returns calibrated perplexities, means over seeds."""
  return _by_method(
    'Held-out perplexity with calibration (seeds)',
    {
      (method, sparsity): f'{_spread(same, "ppl_calibrated")} ({len(same)})'
      for sparsity, groups in _grouped(runs)
      for method, same in groups
    },
  )


def _behind(runs: Sequence[Mapping[str, Any]]) -> Table | None:
  """Returns differences of calibrated perplexity at equal seed and sparsity.

  They are those of each method to `_REFERENCE`; None where there are none.
  """
  ppl = {run_key(run): run['ppl_calibrated'] for run in runs}

  def reference(run):
    return ppl.get((_REFERENCE, *run_key(run)[1:]))

  others = [
    {**run, 'behind': run['ppl_calibrated'] - reference(run)}
    for run in runs
    if run['method'] != _REFERENCE
    and None not in (run['ppl_calibrated'], reference(run))
  ]
  if not others:
    return None
  return _by_method(
    f'Behind {_REFERENCE}',
    {
      (method, sparsity): _difference(same)
      for sparsity, groups in _grouped(others)
      for method, same in groups
    },
  )


def _difference(runs: Sequence[Mapping[str, Any]]) -> str:
  values = [run['behind'] for run in runs]
  sign = '+' if np.mean(values) >= 0 else ''
  worse = sum(value > 0 for value in values)
  return f'{sign}{_spread(runs, "behind")} ({worse} of {len(values)})'


def _by_method(title: str, cells: Mapping[tuple[str, float], str]) -> Table:
  """Returns a table with a row per method and a column per sparsity."""
  methods = dict.fromkeys(method for method, _ in cells)
  sparsities = sorted({sparsity for _, sparsity in cells})
  return Table(
    title,
    ('method', *(f'{sparsity:.0%}' for sparsity in sparsities)),
    [
      (method, *(cells.get((method, s), '') for s in sparsities))
      for method in methods
    ],
  )


def _pictures(
  results: Mapping[str, Any],
) -> Iterator[tuple[str, str, Callable]]:
  """Yields (name, caption, function that draws it) of every picture.

  There are no curves where each of them would be a single point.
  """
  if any(len(run['checkpoints']) > 1 for run in results['runs']):
    caption = (
      'Held-out perplexity of the incumbent, calibrated, against evaluated '
      'tokens'
    )
    yield 'curves', caption, curves
  yield 'kept', 'Share kept in every layer', kept


def _grouped(
  runs: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[float, list[tuple[str, list]]]]:
  """Yields (sparsity, [(method, its runs)]), methods in order of appearance."""
  first = {run['method']: i for i, run in reversed(list(enumerate(runs)))}

  def order(run):
    return run['sparsity'], first[run['method']]

  ordered = sorted(runs, key=order)
  for sparsity, same in itertools.groupby(ordered, lambda r: r['sparsity']):
    groups = itertools.groupby(same, lambda r: r['method'])
    yield sparsity, [(method, list(group)) for method, group in groups]


def _row(method: str, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
  return (
    method,
    str(len(runs)),
    _spread(runs, 'ppl'),
    _spread(runs, 'ppl_calibrated'),
    _spread(runs, 'reward', labels.reward),
    f'{np.mean([run["tokens"] for run in runs]):,.0f}',
    f'{np.mean([run["seconds"] for run in runs]):,.0f}',
  )


def _spread(
  runs: Sequence[Mapping[str, Any]],
  name: str,
  form: Callable[[float | None], str] = labels.ppl,
) -> str:
  """Formats mean and standard deviation over seeds.

  One value that is not finite (None) makes the whole not finite.
  """
  values = [run[name] for run in runs]
  if None in values:
    return form(None)
  mean = form(float(np.mean(values)))
  if len(values) == 1:
    return mean
  return f'{mean} ± {form(float(np.std(values, ddof=1)))}'


def curves(results: Mapping[str, Any]) -> 'Figure':
  """Draws perplexity against evaluated tokens, one panel per sparsity.

  Perplexity is that of each method's incumbent, calibrated, on held-out text.
  """
  panels = list(_grouped(results['runs']))
  title = 'Calibrated perplexity of the incumbents, lower is better'
  figure, axes = figures.new_figure(1 + 3.6 * len(panels), title, len(panels))
  for ax, (sparsity, groups) in zip(axes[:, 0], panels, strict=True):
    for i, (method, runs) in enumerate(groups):
      checkpoints = zip(*(run['checkpoints'] for run in runs), strict=True)
      x, y = zip(*map(_mean_point, checkpoints), strict=True)
      ax.plot(x, y, label=method, marker='o', markersize=3, **_line_style(i))
    figures.log_scale(ax)
    ax.set(title=f'{sparsity:.0%} removed', ylabel='perplexity, calibrated')
    ax.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
  axes[-1, 0].set(xlabel='evaluated tokens')
  axes[-1, 0].xaxis.set_major_formatter('{x:,.0f}')
  return figure


def _mean_point(checkpoints: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
  """Returns (tokens, mean perplexity) of one checkpoint in several runs."""
  ppls = [x['ppl_calibrated'] for x in checkpoints]
  ppls = [np.nan if x is None else x for x in ppls]
  return checkpoints[0]['tokens'], float(np.mean(ppls))


def kept(results: Mapping[str, Any]) -> 'Figure':
  """Draws the share kept in every layer at the largest sparsity.

  Shares are means over seeds; there is a row of axes per method.
  """
  *_, (sparsity, groups) = _grouped(results['runs'])
  title = f'Share kept in every layer, {sparsity:.0%} removed'
  figure, axes = figures.new_figure(
    1 + 1.3 * len(groups), title, len(groups), 2
  )
  units = np.array(results['units'])
  for row, (method, runs) in zip(axes, groups, strict=True):
    share = np.mean([run['counts'] for run in runs], axis=0) / units
    for ax, part in zip(row, np.split(share, 2), strict=True):
      ax.bar(np.arange(len(part)), part, width=0.75)
      ax.set(ylim=(0, 1))
    row[0].set_ylabel(method, rotation=0, ha='right')
  axes[0, 0].set(title='attention groups')
  axes[0, 1].set(title='FFN channels')
  for ax in axes[-1]:
    ax.set(xlabel='layer')
  return figure


def _line_style(i: int) -> dict[str, Any]:
  """Returns the style of the i-th line.

  There are ten colours, which the colour-blind can tell apart; from the
  eleventh on lines are dashed.
  """
  import matplotlib  # slow to import

  colors = matplotlib.color_sequences['petroff10']
  return {'color': colors[i % 10], 'linestyle': '-' if i < 10 else '--'}
