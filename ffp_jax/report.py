"""Writes the report of a finished run, or a page that compares several.

python -m ffp_jax.report DIR [DIR ...] [--out=FILE.html]
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from ffp_jax import __version__
from ffp_jax.errors import RequestError, refuse
from ffp_jax.reporting import blocks, labels, page, run_comparison
from ffp_jax.reporting.run_report import Run, report
from ffp_jax.runtime.storage import (
  RECOVERY_METRICS,
  SEARCH_METRICS,
  is_local,
  read_json_lines,
  to_json_types,
  write_atomically,
)


def summary(results: dict, allocation: Mapping[str, Any]) -> str:
  """Returns the outcome of a run as text, below 16 lines of 80 columns.

  Args:
    results: content of results.json.
    allocation: content of allocation.json.
  """
  results = to_json_types(results)
  widths = 12, 10, labels.NAME_WIDTH + 2, 10
  rows = [
    f'{name:24}' + ''.join(map(str.rjust, cells, widths))
    for name, *cells in (
      ('', *labels.perplexity_columns(results)),
      *labels.perplexity_rows(results),
    )
  ]
  target, achieved = (
    allocation[f'sparsity_{k}'] for k in ('target', 'achieved')
  )
  dense, pruned = results['params_dense'], results['params_pruned']
  before, after = (results[f'bytes_{k}'] for k in ('dense', 'pruned'))
  return '\n'.join(
    [
      *rows,
      *labels.protocol(results['protocol'], shorten=True),
      *labels.other_protocol(results),
      '',
      f'sparsity    {achieved:.3%} of the prunable parameters '
      f'({target:.3%} asked)',
      f'parameters  {dense:,} -> {pruned:,} ({labels.change(dense, pruned)})',
      f'weights     {labels.size(before)} -> {labels.size(after)} '
      f'({labels.change(before, after)})',
    ]
  )


def print_run(workdir: pathlib.Path, results: dict) -> None:
  """Prints the outcome of a finished run, and where to find it."""
  print(summary(results, read_run(workdir).allocation))
  print(f'\nmodel       {workdir / labels.final_directory(results)}')
  print(f'report      {workdir / "report.html"}')


def versions() -> dict[str, str]:
  """Returns the versions that a run's figures depend on, for results.json."""
  packages = {
    name: importlib.metadata.version(name) for name in ('jax', 'flax')
  }
  python = platform.python_version()
  return {'python': python, **packages, 'ffp_jax': __version__}


def read_run(workdir: pathlib.Path) -> Run:
  """Reads the files of a finished run.

  Raises:
    RequestError: `workdir` isn't the directory of a finished run.
  """
  try:
    config, allocation, results = (
      json.loads((workdir / f'{name}.json').read_text())
      for name in ('config', 'allocation', 'results')
    )
    missing = {'versions', 'device', 'protocol'} - set(results)
  except (OSError, TypeError, ValueError) as error:
    raise RequestError(
      f'report: {workdir} is not the directory of a finished run ({error})'
    ) from error
  if missing:
    raise RequestError(
      f'report: {workdir / "results.json"} lacks {", ".join(sorted(missing))}; '
      'it is not from this version of ffp_jax'
    )
  search, recovery = (
    read_json_lines(path) if path.exists() else []
    for path in (workdir / SEARCH_METRICS, workdir / RECOVERY_METRICS)
  )
  return Run(str(workdir), config, allocation, results, search, recovery)


def write_report(workdir: pathlib.Path):
  """Writes report.html, report.md and its plots into a finished run.

  Without search steps there is no plot_search.png. With tensorboardX installed,
  the metrics are also written for TensorBoard, to the directory tb.

  Args:
    workdir: holds config.json, allocation.json, results.json and, if there
      was a search, metrics.jsonl.

  Raises:
    RequestError: see `read_run`.
  """
  run = read_run(workdir)
  content = list(report(run))
  blocks.write_markdown(workdir / 'report.md', content)
  title = f'Pruning {run.config["model"]}'
  write_atomically(workdir / 'report.html', page.page(title, content))
  if is_local(workdir) and importlib.util.find_spec('tensorboardX'):
    _write_scalars(workdir / 'tb', run)


def add_measurements(
  workdir: pathlib.Path, section: str, columns: Mapping[str, Mapping]
):
  """Adds measurements to a finished run's results.json and its reports.

  Args:
    workdir: of the run.
    section: 'tasks' or 'speed'.
    columns: 'dense' or 'pruned' to figures by name. Earlier figures of other
      names are kept.

  Raises:
    RequestError: see `read_run`.
  """
  results = read_run(workdir).results
  rows = results.setdefault(section, {})
  for column, figures in columns.items():
    for name, value in figures.items():
      rows.setdefault(name, {})[column] = value
  text = json.dumps(to_json_types(results), indent=2) + '\n'
  write_atomically(workdir / 'results.json', text)
  write_report(workdir)


def _write_scalars(directory: pathlib.Path, run: Run):
  """Writes the numbers of every step for TensorBoard; replaces old files."""
  from tensorboardX import SummaryWriter  # ty: ignore[import-not-found]

  shutil.rmtree(directory, ignore_errors=True)
  with SummaryWriter(str(directory)) as writer:
    stages = {'search': run.metrics, 'recovery': run.recovery}
    for stage, lines in stages.items():
      for line in lines:
        for name, value in line.items():
          if name != 'step' and value is not None:
            writer.add_scalar(f'{stage}/{name}', value, line['step'])


def parse(argv: Sequence[str]) -> list[str]:
  """Reads the flags, and returns the program's name and the directories."""
  flags.FLAGS.set_gnu_getopt(True)  # flags may follow directories
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    refuse(error)
  if len(rest) < 2:
    refuse('report: give the directory of a finished run, or of several')
  if len(rest) == 2 and flags.FLAGS['out'].present:
    refuse('--out: is for several runs; one has its report beside it')
  out = pathlib.Path(flags.FLAGS.out)
  if out.is_dir() or not out.resolve().parent.is_dir():
    refuse(f'--out: {str(out)!r} is a directory, or in none')
  return rest


def main(argv: Sequence[str]):
  workdirs = [pathlib.Path(name).expanduser() for name in argv[1:]]
  try:
    if len(workdirs) == 1:
      out = workdirs[0] / 'report.html'
      write_report(workdirs[0])
    else:
      out = pathlib.Path(flags.FLAGS.out)
      runs = [read_run(workdir) for workdir in workdirs]
      content = run_comparison.compare(runs)
      write_atomically(out, page.page('Pruning runs compared', content))
  except (RequestError, OSError) as error:
    refuse(error)
  print(out)


if __name__ == '__main__':
  flags.DEFINE_string(
    'out', 'comparison.html', 'HTML file to write when several runs are given.'
  )
  app.run(main, flags_parser=parse)
