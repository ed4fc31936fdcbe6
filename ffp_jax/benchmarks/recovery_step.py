"""Measures a training step of recovery beside the same step in PyTorch.

    python -m ffp_jax.benchmarks.recovery_step --model=demo --ranks=0,8

Both distil the dense model into one that has lost 30%, spread evenly, on the
same random tokens in float32; rank 0 trains every weight, others adapters. The
pruned model is masked, as recovery has it, or sliced. Each library has its own
process, and the processes take turns, so that a drift of the machine's speed
affects both alike. Prints medians, and the loss and the gradient's norm of the
first step, which are to agree.

A step's FLOPs are those of the dense model's forward pass and the pruned one's
forward and backward passes, where masked units count and masked positions of
attention do not. The machine's rate is that of the faster library's product of
two float32 matrices of 2,048 rows and columns.

Needs torch, and peft for adapters, which are not requirements of ffp_jax.
"""

import dataclasses
import importlib.util
import json
import pathlib
import statistics

import numpy as np
from absl import app, flags

from ffp_jax.benchmarks import recovery_setting, turns
from ffp_jax.benchmarks.recovery_setting import Setting
from ffp_jax.checkpoints.model import find_model
from ffp_jax.config import defaults
from ffp_jax.errors import RequestError, refuse
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import allocation, flops, masks, sublayers
from ffp_jax.runtime import cli
from ffp_jax.text import tokenization

_SPARSITY = 0.3
_MODULES = {
  'JAX': 'ffp_jax.benchmarks.recovery_jax',
  'PyTorch': 'ffp_jax.benchmarks.recovery_torch',
}
# Columns of the table: key of a row, format.
_COLUMNS = {
  'rank': 'd',
  'student': '',
  'library': '',
  'seconds': '.3f',
  'tokens/s': '.1f',
  'x PyTorch': '.2f',
  'x masked': '.2f',
  'GFLOP': '.1f',
  'of matmul rate': '.1%',
  'peak host memory, MB': '.0f',
  'first KL': '.5f',
  'first gradient norm': '.5f',
}


def even_counts(model: ModelConfig) -> tuple[list[int], list[int]]:
  """Returns the groups and the channels of each layer that 30% leaves."""
  budget = defaults().budget
  where = sublayers.find_sublayers(
    model,
    round_heads=budget.round_heads,
    round_ffn=budget.round_ffn,
    floor=budget.floor,
  )
  units = masks.ones(model.layers, model.groups, model.ffn)
  counts = allocation.priorities_to_counts(
    np.zeros(len(where.units)),
    _SPARSITY,
    where,
    allocation.to_device(where, masks.rank_all(units)),
    min_ratio=defaults().search.min_ratio,
  )
  attention, ffn = np.split(counts, 2)
  return attention.tolist(), ffn.tolist()


def step_flops(model: ModelConfig, setting: Setting) -> float:
  """Returns the FLOPs of a step.

  The backward pass goes to the inputs of every product, and to its weights
  where these are trained; both inputs of attention's products are trained.

  Args:
    model: of the dense decoder.
    setting: of the step.
  """
  T = setting.context
  student = model
  if setting.sliced:
    attention, ffn = map(tuple, setting.kept)
    student = dataclasses.replace(model, kept_groups=attention, kept_ffn=ffn)
  visible = (T + 1) / 2 / T

  def forward(config):
    products, attention = flops.forward_flops(config, T)
    return products, visible * attention

  dense = sum(forward(model))
  products, attention = forward(student)
  if setting.rank:
    adapted = dataclasses.replace(student, adapter_rank=setting.rank)
    adapters = forward(adapted)[0] - products
    pruned = 2 * products + 3 * (adapters + attention)
  else:
    pruned = 3 * (products + attention)
  return setting.rows * T * (dense + pruned)


def measure(
  source: str, *, rows: int, context: int, ranks: list[int], repeats: int
) -> list[dict]:
  """Measures steps of both libraries, masked and sliced.

  Args:
    source: directory or hub id of the dense model.
    rows: windows a step.
    context: tokens of each.
    ranks: of the updates; 0 trains every weight.
    repeats: timed turns.

  Returns:
    A dict of figures for each step.

  Raises:
    RequestError: the model cannot be used, or a library is missing.
  """
  _check_libraries(ranks)
  files = find_model(source)
  model = files.config
  if model.sliced:
    raise RequestError(f'--model: {source!r} is pruned; give the dense')
  tokenization.check_tokens(model, (), context)
  setting = Setting(
    model=str(files.directory),
    vocab=model.vocab,
    units=(model.groups, model.ffn),
    kept=even_counts(model),
    sliced=False,
    rank=0,
    rows=rows,
    context=context,
  )
  found = []
  for rank in ranks:
    lines = [
      row
      for sliced in (False, True)
      for row in _measure_pair(
        model, dataclasses.replace(setting, rank=rank, sliced=sliced), repeats
      )
    ]
    masked = {row['library']: row['seconds'] for row in lines[: len(_MODULES)]}
    for row in lines:
      row['x masked'] = masked[row['library']] / row['seconds']
    found += lines
  return found


def _check_libraries(ranks):
  """Raises if what the ranks need is not installed."""
  if not importlib.util.find_spec('torch'):
    raise RequestError('recovery_step needs PyTorch: pip install torch')
  if any(ranks) and not importlib.util.find_spec('peft'):
    raise RequestError(
      '--ranks: adapters in PyTorch need: pip install peft; or give --ranks=0'
    )


def _measure_pair(model, setting, repeats):
  """Returns the rows of the table of one setting, and measures the machine.

  No other models are in memory meanwhile: with little of it free, a step takes
  much longer to get its own.
  """
  matmuls = [(module,) for module in _MODULES.values()]
  steps = [(module, setting.format()) for module in _MODULES.values()]
  answers = turns.take([*matmuls, *steps], repeats)
  best = min(_median(x) for x in answers[: len(matmuls)])
  rate = recovery_setting.matmul_flops() / best
  answers = dict(zip(_MODULES, answers[len(matmuls) :], strict=True))
  flops = step_flops(model, setting)
  rows = []
  for library, answer in answers.items():
    seconds = _median(answer)
    row = {
      'rank': setting.rank,
      'student': 'sliced' if setting.sliced else 'masked',
      'library': library,
      'seconds': seconds,
      'tokens/s': setting.rows * setting.context / seconds,
      'x PyTorch': _median(answers['PyTorch']) / seconds,
      'GFLOP': flops / 1e9,
      'of matmul rate': flops / seconds / rate,
      'matmul rate, GFLOP/s': rate / 1e9,
      'first KL': answer.turns[0]['kl'],
      'first gradient norm': answer.turns[0]['gradient_norm'],
    }
    rows.append(row | answer.last)
  return rows


def _median(answers):
  """Returns the median seconds of all turns but the first, which compiles."""
  return statistics.median(x['seconds'] for x in answers.turns[1:])


def format_table(rows: list[dict]) -> str:
  """Returns the figures as aligned columns."""
  cells = [
    [*_COLUMNS],
    *([f'{row[key]:{form}}' for key, form in _COLUMNS.items()] for row in rows),
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(f'{x:>{w}}' for x, w in zip(line, widths, strict=True))
    for line in cells
  )


def main(argv: list[str]) -> None:
  """Measures the model that the flags name and prints a table."""
  del argv
  args = flags.FLAGS
  try:
    if not args.ranks or any(not x.strip().isdigit() for x in args.ranks):
      raise RequestError('--ranks: give ranks such as 0,8; 0 is without LoRA')
    out = args.out and pathlib.Path(args.out).expanduser()
    if out and not out.absolute().parent.is_dir():
      raise RequestError(f'--out: no directory {out.absolute().parent}')
    rows = measure(
      args.model,
      rows=args.rows,
      context=args.context,
      ranks=[int(x) for x in args.ranks],
      repeats=args.turns,
    )
    if out:
      out.write_text(json.dumps(rows, indent=2) + '\n')
  except (RequestError, OSError) as error:
    refuse(error)
  print(format_table(rows))
  rates = [row['matmul rate, GFLOP/s'] for row in rows]
  print(f'matmul rate: {min(rates):.1f} to {max(rates):.1f} GFLOP/s')


if __name__ == '__main__':
  flags.DEFINE_string(
    'model', 'demo', 'Directory or hub id of the dense model.'
  )
  flags.DEFINE_integer('rows', 1, 'Windows a step.', lower_bound=1)
  flags.DEFINE_integer('context', 512, 'Tokens of a window.', lower_bound=2)
  flags.DEFINE_list(
    'ranks', ['0', '8'], 'Ranks of the updates; 0 trains every weight.'
  )
  flags.DEFINE_integer('turns', 5, 'Timed turns of each step.', lower_bound=1)
  flags.DEFINE_string('out', None, 'File to write the figures to, as JSON.')
  app.run(main, flags_parser=cli.parse_flags)
