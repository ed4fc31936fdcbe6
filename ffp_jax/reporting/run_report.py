"""The report of one pruning run."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ffp_jax.reporting import labels, plots
from ffp_jax.reporting.blocks import (
  Block,
  Code,
  Heading,
  Items,
  Picture,
  Table,
  Text,
)


class Run(NamedTuple):
  """The files of a finished run.

  Attributes:
    name: its directory, as the user wrote it.
    config, allocation, results: contents of the JSON files of these names.
    metrics: one line per search step; may be empty.
    recovery: one line per step of recovery; empty if there was none.
  """

  name: str
  config: dict
  allocation: dict
  results: dict
  metrics: list[dict]
  recovery: Sequence[dict] = ()


def report(run: Run) -> Iterator[Block]:
  """Yields the blocks of the report."""
  yield Heading(1, f'Pruning {run.config["model"]}')
  yield Text(_summary(run.results))
  yield from _request(run.config)
  yield from _perplexities(run)
  yield from _measured(run.results)
  yield from _sizes(run)
  yield from _allocation(run.allocation)
  yield from _search(run)
  yield from _recovery(run)
  yield from _cost(run.results)
  yield from _provenance(run)


def _summary(results: Mapping[str, Any]) -> str:
  key = labels.final_key(results)
  dense, ppl = (results[k]['ppl'] for k in ('dense', key))
  before, after = (results[f'params_{k}'] for k in ('dense', 'pruned'))
  return (
    f'{before:,} parameters became {after:,} '
    f'({labels.change(before, after)}). On held-out text the perplexity is '
    f'{labels.ppl(ppl)}, that of the dense model {labels.ppl(dense)}: '
    f'{labels.ratio(ppl, dense, 2)} times as high.'
  )


def _request(config: Mapping[str, Any]) -> Iterator[Block]:
  yield Heading(2, 'What was asked')
  yield Items(
    [
      ('model', config['model']),
      ('text', config['data']),
      (
        'sparsity',
        f'{config["budget"]["sparsity"]:.2%} of the prunable parameters, which '
        'are those of attention and FFN in the decoder layers',
      ),
    ]
  )


def _perplexities(run: Run) -> Iterator[Block]:
  results = run.results
  yield Heading(2, 'Perplexity')
  yield Text(
    'How badly a model predicts text: lower is better. Dense is the model as '
    'it was. Uniform removes the same share of every layer; searched removes '
    'from each layer what the search found. Calibration then adjusts the '
    'weights that remain.'
  )
  yield Picture(
    'A bar for each model; the dotted line is at the dense one.',
    'perplexity',
    plots.perplexity(results),
  )
  yield Table(
    'Perplexity on held-out text',
    ('model', *labels.perplexity_columns(results)),
    labels.perplexity_rows(results),
  )
  yield Text(' '.join(labels.protocol(results['protocol'])))
  if 'other' in results:
    yield Text(
      'The last two columns are on a text of another kind, which the run uses '
      'for nothing else: a model that fits its own text at the cost of others '
      'shows there. ' + ' '.join(labels.protocol(results['other']['protocol']))
    )
  yield from _generalisation(results)


def _generalisation(results: Mapping[str, Any]) -> Iterator[Block]:
  """Yields the table that sets the reward text beside held-out text."""
  yield Heading(3, 'Reward against held-out text')
  reward, heldout = results['reward'], results['protocol']
  when = {'searched': 'before', 'calibrated': 'after'}[reward['of']]
  yield Text(
    'The search saw the reward text and never the held-out text. A lower ratio '
    'on the held-out text means that the allocation fits the reward text. Both '
    f'are {when} calibration.'
  )
  if when == 'after':
    yield Text(
      'On the reward text the calibration is the one that the search foresees: '
      'of each sublayer by itself, with the inputs of the dense model.'
    )
  ppls = [
    [reward['dense_ppl'], results['dense']['ppl']],
    [reward['searched_ppl'], results[reward['of']]['ppl']],
  ]
  rows: list[tuple[str, ...]] = [
    ('tokens per window', *(f'{x["context"]:,}' for x in (reward, heldout))),
    ('tokens scored', *(f'{x["tokens"]:,}' for x in (reward, heldout))),
    ('perplexity, dense', *map(labels.ppl, ppls[0])),
    ('perplexity, pruned', *map(labels.ppl, ppls[1])),
    (
      'dense / pruned',
      *(labels.ratio(*pair, 3) for pair in zip(*ppls, strict=True)),
    ),
  ]
  yield Table(
    f'Perplexity {when} calibration', ('', 'reward text', 'held-out text'), rows
  )


def _measured(results: Mapping[str, Any]) -> Iterator[Block]:
  """Yields a table of task results and one of speeds, if there are any."""
  titles = {'tasks': 'Tasks', 'speed': 'Speed'}
  for key, title in titles.items():
    if key in results:
      names = list(dict.fromkeys(itertools.chain(*results[key].values())))
      yield Heading(2, title)
      yield Table(
        f'{title}, dense and pruned',
        ('', *names),
        [
          (
            row,
            *(
              labels.number(values[name]) if name in values else '-'
              for name in names
            ),
          )
          for row, values in results[key].items()
        ],
      )


def _sizes(run: Run) -> Iterator[Block]:
  results = run.results
  target, achieved = (
    run.allocation[f'sparsity_{k}'] for k in ('target', 'achieved')
  )
  dense, removed = results['params_dense'], results['params_removed']
  prunable = results['params_prunable']
  yield Heading(2, 'Size')
  yield Text(
    f'Sparsity {target:.3%} asked, {achieved:.3%} achieved, of the prunable '
    f'parameters; {removed / dense:.2%} of all parameters removed.'
  )
  for budget in run.allocation.get('budgets', ()):
    yield Text(
      f'{labels.RESOURCES[budget["name"]]} of the same sublayers: at least '
      f'{budget["removed_target"]:.2%} asked to be removed, '
      f'{budget["removed"]:.2%} removed.'
    )
  rows = {
    'parameters': (dense, results['params_pruned']),
    'of them prunable': (prunable, prunable - removed),
    'bytes of weights': (results['bytes_dense'], results['bytes_pruned']),
  }
  yield Table(
    'Size before and after',
    ('', 'dense', 'pruned'),
    [
      (k, f'{a:,}', f'{b:,} ({labels.change(a, b)})')
      for k, (a, b) in rows.items()
    ],
  )


def _allocation(allocation: Mapping[str, Any]) -> Iterator[Block]:
  uniform = 1 - allocation['sparsity_target']
  yield Heading(2, 'What every layer keeps')
  yield Text(
    'An attention group is one key/value head with its query heads. Layer 0 '
    'is next to the input. A uniform allocation would keep about '
    f'{uniform:.1%} everywhere.'
  )
  yield Picture(
    'A bar for each layer, attention above, FFN below; the dashed lines are at '
    'what a uniform allocation would keep.',
    'kept',
    plots.kept(allocation),
    Table(
      'Share kept in every layer',
      ('layer', 'attention groups', 'FFN channels'),
      [
        (
          str(layer['layer']),
          *(
            _share(layer[f'{kind}_kept'], layer[f'{kind}_total'])
            for kind in ('attention', 'ffn')
          ),
        )
        for layer in allocation['layers']
      ],
    ),
  )


def _share(kept: int, total: int) -> str:
  return f'{kept / total:.0%} ({kept:,} / {total:,})'


def _search(run: Run) -> Iterator[Block]:
  yield Heading(2, 'Search')
  if not run.metrics:
    yield Text('No search steps were taken.')
    return
  yield Text(
    'Every step tries some candidates. The reward of a candidate is the '
    'perplexity of the dense model divided by its own, on tokens of the reward '
    'text: higher is better. Rewards compare within a stage only: each has its '
    'own sparsity and tokens.'
  )
  yield _stages(run.metrics)
  rewards = labels.rewards(run.metrics)
  yield Picture(
    'Steps from left to right; an upright line marks where a stage begins.',
    'search',
    plots.search(run.metrics),
    Table(
      'Reward of every step',
      ('step', 'stage', *rewards.values()),
      [
        (
          str(line['step'] + 1),
          str(line['stage'] + 1),
          *(labels.reward(line[key]) for key in rewards),
        )
        for line in run.metrics
      ],
    ),
  )


def _stages(metrics: Sequence[Mapping[str, Any]]) -> Table:
  """Returns a row per stage of the curriculum."""
  rows = []
  for stage, lines in itertools.groupby(metrics, lambda line: line['stage']):
    lines = list(lines)
    best = [x['reward_max'] for x in lines if x['reward_max'] is not None]
    rows.append(
      (
        str(stage + 1),
        f'{lines[0]["sparsity"]:.1%}',
        f'{lines[0]["reward_tokens"]:,}',
        f'{sum(line["candidates"] for line in lines):,}',
        labels.reward(max(best, default=None)),
      )
    )
  return Table(
    'Stages of the curriculum',
    ('stage', 'sparsity', 'tokens', 'candidates', 'best reward'),
    rows,
  )


def _recovery(run: Run) -> Iterator[Block]:
  """Yields what the training after calibration did, if there was one."""
  if 'recovery' not in run.results or not run.recovery:
    return
  made = run.results['recovery']
  rank, ppls = made['rank'], made['validation_ppl']
  yield Heading(2, 'Recovery')
  yield Text(
    f'The pruned model was trained on {made["tokens"]:,} tokens of '
    f'{made["text"]} to predict what the dense model predicts; '
    f'{made.get("cross_entropy", 0.0):.0%} of the loss is the cross-entropy of '
    'the text itself. '
    + (f'Low-rank updates of rank {rank}' if rank else 'All kept weights')
    + ' were trained. On the validation text its perplexity went from '
    f'{labels.ppl(ppls["start"])} to {labels.ppl(ppls["best"])}; the best '
    'model of all validations is kept.'
  )
  tested = [x for x in run.recovery if x.get('validation') is not None]
  yield Picture(
    'Above, the divergence from the dense model on the text of every step; '
    'below, the perplexity on the validation text.',
    'recovery',
    plots.recovery(run.recovery),
    Table(
      'Validations',
      ('tokens', 'perplexity', 'KL of the step'),
      [
        (
          f'{line["tokens"]:,}',
          labels.ppl(labels.to_ppl(line['validation'])),
          labels.reward(line['kl']) if 'kl' in line else '-',
        )
        for line in tested
      ],
    ),
  )


def _cost(results: Mapping[str, Any]) -> Iterator[Block]:
  seconds = results['seconds']
  yield Heading(2, 'Cost')
  yield Items(
    [
      ('candidates evaluated', f'{results["candidates_evaluated"]:,}'),
      (
        'tokens evaluated',
        f'{results["tokens_evaluated"]:,}, a backward pass counted as two '
        'forward ones',
      ),
      ('compilations of the search step', f'{results["compilations"]:,}'),
      ('device', results['device']),
    ]
  )
  yield Table(
    'Time by stage of the run',
    ('stage', 'seconds'),
    [
      (stage, f'{number:,.1f}')
      for stage, number in [*seconds.items(), ('all', sum(seconds.values()))]
    ],
  )


def _provenance(run: Run) -> Iterator[Block]:
  versions = run.results['versions'].items()
  yield Heading(2, 'How to run it again')
  yield Code(run.results['command'])
  yield Items(
    [
      ('seed', str(run.config['seed'])),
      ('versions', ', '.join(f'{name} {number}' for name, number in versions)),
      ('every setting', 'config.json, beside this report'),
    ]
  )
