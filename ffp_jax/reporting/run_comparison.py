"""The page that compares several pruning runs."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

from ffp_jax.reporting import labels, plots
from ffp_jax.reporting.blocks import Block, Heading, Items, Picture, Table, Text
from ffp_jax.reporting.run_report import Run


def compare(runs: Sequence[Run]) -> Iterator[Block]:
  """Yields the blocks of the page.

  There is a section per model, text and protocol, since perplexities compare
  only where all three are the same.
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
  for group in _comparable(enumerate(runs, 1)):
    yield from _section(group)


def _comparable(
  numbered: Iterable[tuple[int, Run]],
) -> Iterable[list[tuple[int, Run]]]:
  """Returns groups of runs with the same model, text and protocol."""
  groups = {}
  for number, run in numbered:
    key = run.config['model'], json.dumps(run.results['protocol'])
    groups.setdefault(key, []).append((number, run))
  return groups.values()


def _section(numbered: list[tuple[int, Run]]) -> Iterator[Block]:
  numbers, runs = zip(*numbered, strict=True)
  first = runs[0].results
  yield Heading(2, runs[0].config['model'])
  yield Text(' '.join(labels.protocol(first['protocol'])))
  points = [('dense', first['params_dense'], first['dense']['ppl'])]
  for number, run in numbered:
    ppl = run.results[labels.final_key(run.results)]['ppl']
    points.append((str(number), run.results['params_pruned'], ppl))
  points = [plots.Point(*p, best=_on_frontier(p, points)) for p in points]
  finite = [point for point in points if point.ppl is not None]
  if finite:
    yield Picture(
      'Filled points, joined by the line, are the frontier: no other model '
      'here is at least as small and at least as good. The numbers are those '
      'of the runs.',
      f'frontier_{numbers[0]}',
      plots.frontier(finite),
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


def _on_frontier(
  point: tuple[str, int, float | None],
  points: Iterable[tuple[str, int, float | None]],
) -> bool:
  """Returns whether no other point is at least as small and as good."""
  _, params, ppl = point
  return ppl is not None and not any(
    other[1:] != point[1:] and other[1] <= params and other[2] <= ppl
    for other in points
    if other[2] is not None
  )


def _run_row(point: plots.Point, run: Run) -> tuple[str, ...]:
  results = run.results
  uniform = results[labels.uniform_key(results)]['ppl']
  return _row(point, labels.ppl(uniform))


def _row(point: plots.Point, uniform: str) -> tuple[str, ...]:
  return (
    point.label,
    f'{point.params / 1e6:,.1f}',
    labels.ppl(point.ppl),
    uniform,
    'yes' if point.best else 'no',
  )
