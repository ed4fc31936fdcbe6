"""The report of a finished run: Markdown, plots, and a summary."""

import json
import pathlib

from ffp_jax import plots, wording
from ffp_jax.book import lines, plain, replace


def summary(results: dict, allocation: dict) -> str:
  """What the run found, as plain text of less than 15 lines of 80 columns.

  Args:
    results: what results.json holds.
    allocation: what allocation.json holds.
  """
  results = plain(results)
  rows = [f'{"":24}{"perplexity":>12}{"x dense":>10}']
  rows += [
    f'{name:24}{ppl:>12}{times:>10}'
    for name, ppl, times in wording.compare(results)
  ]
  asked, got = (allocation[f'sparsity_{k}'] for k in ('target', 'achieved'))
  dense, pruned = results['params_dense'], results['params_pruned']
  before, after = (results[f'bytes_{k}'] for k in ('dense', 'pruned'))
  return '\n'.join(
    [
      *rows,
      *wording.protocol(results['protocol'], shorten=True),
      '',
      f'sparsity    {got:.3%} of the prunable parameters ({asked:.3%} asked)',
      f'parameters  {dense:,} -> {pruned:,} ({wording.change(dense, pruned)})',
      f'weights     {wording.size(before)} -> {wording.size(after)} '
      f'({wording.change(before, after)})',
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
  metrics = lines(path) if path.exists() else []
  plots.kept(allocation).savefig(workdir / 'plot_kept.png')
  plots.perplexity(results).savefig(workdir / 'plot_perplexity.png')
  if metrics:
    plots.search(metrics).savefig(workdir / 'plot_search.png')
  sections = [
    *_request(config, results),
    *_perplexities(results),
    *_sizes(results, allocation),
    *_cost(results),
    *_search(metrics),
    *_allocation(allocation),
  ]
  replace(workdir / 'report.md', '\n\n'.join(sections) + '\n')


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
  yield _table('model | perplexity | x dense', wording.compare(results))
  yield ' '.join(wording.protocol(results['protocol'])) + (
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
      + (
        wording.ppl(dense),
        wording.ppl(searched),
        wording.ratio(dense, searched, 3),
      )
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
    [
      (k, f'{a:,}', f'{b:,}', wording.change(a, b))
      for k, (a, b) in rows.items()
    ],
  )


def _cost(results):
  yield '## Cost'
  yield '\n'.join(
    [
      f'- candidates evaluated: {results["candidates_evaluated"]:,}',
      f'- tokens evaluated: {results["tokens_evaluated"]:,}, a backward pass '
      'counted as two forward ones',
      f'- compilations of the search step: {results["compilations"]:,}',
    ]
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
