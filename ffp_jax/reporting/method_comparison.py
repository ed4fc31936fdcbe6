"""A comparison as a page: tables, and plots beside it."""

import itertools
import pathlib

import numpy as np

from ffp_jax.reporting import blocks, labels, plots
from ffp_jax.reporting.blocks import Heading, Picture, Table, Text
from ffp_jax.runtime.storage import to_json_types

_OURS = 'fastforward'


def run_key(line: dict) -> tuple:
  """What tells one run of compare.json from another."""
  return line['method'], line['sparsity'], line['seed']


def run_line(run: dict) -> str:
  """One run as one line of the log."""
  run = to_json_types(run)
  return (
    f'{run["method"]} at {run["sparsity"]:g}, seed {run["seed"]}: '
    f'{labels.ppl(run["ppl"])}, calibrated '
    f'{labels.ppl(run["ppl_calibrated"])}, {run["tokens"]:,} tokens, '
    f'{run["seconds"]:.0f} s'
  )


def write(results: dict, workdir: pathlib.Path):
  """Makes compare.md and its plots from what compare.json holds."""
  blocks.write_markdown(workdir / 'compare.md', page(results))


def summary(results: dict) -> str:
  """The table as plain text."""
  rows = [
    f'{"":24}{"sparsity":>10}{"perplexity":>18}{"+ calibration":>18}',
    f'{"dense":24}{"":>10}{labels.ppl(results["dense_ppl"]):>18}',
  ]
  for sparsity, groups in _grouped(results['runs']):
    for method, runs in groups:
      before, after = (_spread(runs, k) for k in ('ppl', 'ppl_calibrated'))
      rows.append(f'{method:24}{sparsity:>10g}{before:>18}{after:>18}')
  return '\n'.join([*rows, *labels.protocol(results['protocol'], True)])


def page(results: dict):
  """The blocks of compare.md."""
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
  if paired := _behind(results['runs']):
    yield Text(
      'The seed also cuts the text, so methods compare best seed by seed: '
      f'how much higher than {_OURS} with calibration, and on how many seeds.'
    )
    yield paired
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


def _overview(runs) -> Table:
  """A row a method, a column a sparsity."""
  return _by_method(
    'Held-out perplexity with calibration (seeds)',
    {
      (method, sparsity): f'{_spread(same, "ppl_calibrated")} ({len(same)})'
      for sparsity, groups in _grouped(runs)
      for method, same in groups
    },
  )


def _behind(runs) -> Table | None:
  """How far each method is from ours on the same seed and sparsity."""
  ppl = {run_key(run): run['ppl_calibrated'] for run in runs}

  def ours(run):
    return ppl.get((_OURS, *run_key(run)[1:]))

  rivals = [
    {**run, 'behind': run['ppl_calibrated'] - ours(run)}
    for run in runs
    if run['method'] != _OURS and None not in (run['ppl_calibrated'], ours(run))
  ]
  if not rivals:
    return None
  return _by_method(
    f'Behind {_OURS}',
    {
      (method, sparsity): _gap(same)
      for sparsity, groups in _grouped(rivals)
      for method, same in groups
    },
  )


def _gap(runs) -> str:
  gaps = [run['behind'] for run in runs]
  sign = '+' if np.mean(gaps) >= 0 else ''
  more = sum(gap > 0 for gap in gaps)
  return f'{sign}{_spread(runs, "behind")} ({more} of {len(gaps)})'


def _by_method(title, cells: dict) -> Table:
  """Cells of (method, sparsity), a row a method, a column a sparsity."""
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


def _pictures(results):
  """(name, caption, what draws it); no curves where each is one point."""
  if any(len(run['checkpoints']) > 1 for run in results['runs']):
    caption = (
      'Held-out perplexity of the incumbent, calibrated, against evaluated '
      'tokens'
    )
    yield 'curves', caption, curves
  yield 'kept', 'Share kept in every layer', kept


def _grouped(runs):
  """(sparsity, [(method, its runs)]), methods in the order they came."""
  first = {run['method']: i for i, run in reversed(list(enumerate(runs)))}

  def order(run):
    return run['sparsity'], first[run['method']]

  ordered = sorted(runs, key=order)
  for sparsity, same in itertools.groupby(ordered, lambda r: r['sparsity']):
    groups = itertools.groupby(same, lambda r: r['method'])
    yield sparsity, [(method, list(found)) for method, found in groups]


def _row(method, runs):
  return (
    method,
    str(len(runs)),
    _spread(runs, 'ppl'),
    _spread(runs, 'ppl_calibrated'),
    _spread(runs, 'reward', labels.reward),
    f'{np.mean([run["tokens"] for run in runs]):,.0f}',
    f'{np.mean([run["seconds"] for run in runs]):,.0f}',
  )


def _spread(runs, name, form=labels.ppl) -> str:
  """Mean and standard deviation over seeds; any that isn't finite shows."""
  values = [run[name] for run in runs]
  if None in values:
    return form(None)
  mean = form(float(np.mean(values)))
  if len(values) == 1:
    return mean
  return f'{mean} ± {form(float(np.std(values, ddof=1)))}'


def curves(results: dict):
  """Calibrated held-out perplexity of the incumbents, a panel a sparsity."""
  panels = list(_grouped(results['runs']))
  title = 'Calibrated perplexity of the incumbents, lower is better'
  picture, axes = plots.figure(1 + 3.6 * len(panels), title, len(panels))
  for ax, (sparsity, groups) in zip(axes[:, 0], panels, strict=True):
    for i, (method, runs) in enumerate(groups):
      looks = zip(*(run['checkpoints'] for run in runs), strict=True)
      x, y = zip(*map(_mean_look, looks), strict=True)
      ax.plot(x, y, label=method, marker='o', markersize=3, **_look(i))
    plots.log_scale(ax)
    ax.set(title=f'{sparsity:.0%} removed', ylabel='perplexity, calibrated')
    ax.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
  axes[-1, 0].set(xlabel='evaluated tokens')
  axes[-1, 0].xaxis.set_major_formatter('{x:,.0f}')
  return picture


def _mean_look(looks):
  known = [x['ppl_calibrated'] for x in looks]
  known = [np.nan if x is None else x for x in known]
  return looks[0]['tokens'], np.mean(known)


def kept(results: dict):
  """Share kept in every layer at the largest sparsity, means over seeds."""
  *_, (sparsity, groups) = _grouped(results['runs'])
  title = f'Share kept in every layer, {sparsity:.0%} removed'
  picture, axes = plots.figure(1 + 1.3 * len(groups), title, len(groups), 2)
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
  return picture


def _look(i):
  """Colours of a palette of ten, safe for the colour-blind; then dashed."""
  import matplotlib  # slow to import

  colors = matplotlib.color_sequences['petroff10']
  return {'color': colors[i % 10], 'linestyle': '-' if i < 10 else '--'}
