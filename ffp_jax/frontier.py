"""One search, several budgets: a pruned model for each of several sparsities.

python -m ffp_jax.frontier --config=configs/llama.py --workdir=DIR \
  --sparsities=0.2,0.3,0.4

The first sparsity is searched as in main.py. Each further one starts from the
policy of the one before and takes --steps steps at its own sparsity; with 0
its allocation is what that policy proposes. Every point is a run in
DIR/SPARSITY, with its model and report; DIR/frontier.html compares them.
"""

import functools
import pathlib
from collections.abc import Sequence

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from ffp_jax import config as config_lib
from ffp_jax import jobs, prune, report
from ffp_jax.errors import RequestError
from ffp_jax.reporting import labels, page, run_comparison
from ffp_jax.reporting.run_report import Run
from ffp_jax.runtime import cli, storage


def point_configs(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  sparsities: Sequence[float],
  steps: int,
) -> dict[pathlib.Path, ml_collections.ConfigDict]:
  """Returns the configuration of each point by its directory, in order.

  Args:
    config: of the first point; `budget.sparsity` is not used.
    workdir: gets a directory per sparsity.
    sparsities: in rising order, each in [0, 1).
    steps: search steps of each point but the first, in the last stage.

  Raises:
    RequestError: a sparsity or another key is out of range.
  """
  if not sparsities or list(sparsities) != sorted({*sparsities}):
    raise RequestError(
      f'--sparsities: {",".join(map(str, sparsities))!r} must be different '
      'numbers in rising order, such as 0.2,0.3,0.4'
    )
  configs, previous = {}, ''
  for sparsity in sparsities:
    point = config.copy_and_resolve_references()
    point.budget.sparsity = sparsity
    if previous:
      point.search.init_from = previous
      stages = len(config.search.steps)
      point.search.steps = (0,) * (stages - 1) + (steps,)
    config_lib.validate(point)
    directory = workdir / f'{sparsity:g}'
    configs[directory], previous = point, str(directory)
  return configs


def run_frontier(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  sparsities: Sequence[float],
  steps: int,
  *,
  again: str,
) -> list[Run]:
  """Runs every point that is not finished, then compares all of them.

  Args:
    config: see `point_configs`.
    workdir: see `point_configs`; gets frontier.html too.
    sparsities: see `point_configs`.
    steps: see `point_configs`.
    again: the command that resumes, for messages.

  Returns:
    The finished run of each point.

  Raises:
    RequestError: a point cannot be met; raised before any search.
  """
  configs = point_configs(config, workdir, sparsities, steps)
  for point in configs.values():  # fails early if the last is out of reach
    jobs.prepare_job(point)
  for directory, point in configs.items():
    prune.prune_workdir(point, directory, command=again)
  runs = [report.read_run(directory) for directory in configs]
  html = page.page('Pruning frontier', run_comparison.compare(runs))
  storage.write_atomically(workdir / 'frontier.html', html)
  return runs


def summary(runs: Sequence[Run]) -> str:
  """Returns a table in plain text, with a line per point."""
  rows = [
    f'{"sparsity":>10}{"parameters":>14}{"perplexity":>12}{"uniform":>12}'
  ]
  dense = runs[0].results
  rows += [_row('dense', dense['params_dense'], dense['dense']['ppl'], None)]
  for point in runs:
    results = point.results
    rows.append(
      _row(
        f'{point.allocation["sparsity_achieved"]:.2%}',
        results['params_pruned'],
        results[labels.final_key(results)]['ppl'],
        labels.ppl(results[labels.uniform_key(results)]['ppl']),
      )
    )
  return '\n'.join([*rows, *labels.protocol(dense['protocol'], shorten=True)])


def _row(name: str, params: int, ppl: float, uniform: str | None) -> str:
  return f'{name:>10}{params:>14,}{labels.ppl(ppl):>12}{uniform or "-":>12}'


def main(argv: list[str]) -> None:
  """Runs the points that the flags ask for and prints their summary."""
  del argv
  args = flags.FLAGS
  workdir, again = cli.begin_command('ffp_jax.frontier', args.workdir)
  with cli.report_errors(workdir, again):
    try:
      sparsities = [float(number) for number in args.sparsities]
    except ValueError as error:
      raise RequestError(f'--sparsities: {error}') from error
    runs = run_frontier(
      args.config, workdir, sparsities, args.steps, again=again
    )
  print(summary(runs))
  names = [f'{x.name}/{labels.final_directory(x.results)}' for x in runs]
  print(f'\nmodels      {", ".join(names)}')
  print(f'report      {workdir / "frontier.html"}')


if __name__ == '__main__':
  config_flags.DEFINE_config_file(
    'config', help_string='Configuration file of the first point.'
  )
  flags.DEFINE_string('workdir', None, 'Directory of the points.')
  flags.DEFINE_list(
    'sparsities', None, 'Sparsities in rising order, such as 0.2,0.3,0.4.'
  )
  flags.DEFINE_integer(
    'steps', 6, 'Search steps of each point but the first.', lower_bound=0
  )
  app.run(
    main,
    flags_parser=functools.partial(
      cli.parse_flags,
      config='a file such as configs/llama.py',
      workdir='the directory of the points',
      sparsities='numbers in rising order, such as 0.2,0.3,0.4',
    ),
  )
