"""What several runs say side by side, block by block."""

import itertools
import json
from collections.abc import Iterator

from ffp_jax.reporting import labels, plots
from ffp_jax.reporting.blocks import Block, Heading, Items, Picture, Table, Text
from ffp_jax.reporting.run_report import Run


def compare(runs: list[Run]) -> Iterator[Block]:
  """One section for every model, text and protocol.

  Perplexities of other models, texts or protocols don't compare.
  """
  yield Heading(1, f'{len(runs)} pruning runs compared')
  yield Text(
    'Runs share a section, and compare, only if they pruned the same model and '
    'scored it on the same text in the same way.'
  )
  yield Items(
    [
      (
        f'run {i}',
        f'{run.name}: sparsity {run.allocation["sparsity_achieved"]:.2%}, seed '
        f'{run.config["seed"]}',
      )
      for i, run in enumerate(runs, 1)
    ]
  )
  for same in _alike(enumerate(runs, 1)):
    yield from _section(same)


def _alike(numbered):
  groups = {}
  for number, run in numbered:
    kind = run.config['model'], json.dumps(run.results['protocol'])
    groups.setdefault(kind, []).append((number, run))
  return groups.values()


def _section(same):
  numbers, runs = zip(*same, strict=True)
  first = runs[0].results
  yield Heading(2, runs[0].config['model'])
  yield Text(' '.join(labels.protocol(first['protocol'])))
  points = [('dense', first['params_dense'], first['dense']['ppl'])]
  for number, run in same:
    ppl = run.results[labels.final_key(run.results)]['ppl']
    points.append((str(number), run.results['params_pruned'], ppl))
  points = [plots.Point(*p, best=_leads(p, points)) for p in points]
  drawn = [point for point in points if point.ppl is not None]
  if drawn:
    yield Picture(
      'Filled points, joined by the line, are the frontier: no other model '
      'here is at least as small and at least as good. The numbers are those '
      'of the runs.',
      f'frontier_{numbers[0]}',
      plots.frontier(drawn),
    )
  dense, *others = points
  yield Table(
    'Perplexity as saved, and of the uniform allocation',
    ('run', 'params, M', 'perplexity', 'uniform', 'frontier'),
    [
      _row(dense, '-'),
      *itertools.starmap(_run_row, zip(others, runs, strict=True)),
    ],
  )


def _leads(point, points) -> bool:
  """Whether no other point is at least as small and at least as good."""
  _, params, ppl = point
  return ppl is not None and not any(
    other[1:] != point[1:] and other[1] <= params and other[2] <= ppl
    for other in points
    if other[2] is not None
  )


def _run_row(point, run):
  results = run.results
  uniform = results[labels.uniform_key(results)]['ppl']
  return _row(point, labels.ppl(uniform))


def _row(point, uniform):
  return (
    point.label,
    f'{point.params / 1e6:,.1f}',
    labels.ppl(point.ppl),
    uniform,
    'yes' if point.best else 'no',
  )
