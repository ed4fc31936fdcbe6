"""What a finished run leaves behind, without the run."""

import pathlib

import numpy as np

from ffp_jax.reporting.run_report import Run
from ffp_jax.runtime.storage import to_json_types
from ffp_jax.runtime.workdir import Workdir


def config(**changes):
  return {
    'model': 'some/model',
    'data': 'pydoc',
    'seed': 7,
    'budget': {'sparsity': 0.2},
    **changes,
  }


def allocation(layers=4):
  return {
    'sparsity_target': 0.2,
    'sparsity_achieved': 0.19998,
    'params_dense': 1000000,
    'params_pruned': 850000,
    'layers': [
      {
        'layer': i,
        'attention_kept': 2,
        'attention_total': 3,
        'ffn_kept': 1000 + i,
        'ffn_total': 1536,
      }
      for i in range(layers)
    ],
    'seed': 7,
    'priority': np.zeros(2 * layers, np.float32),
  }


def results(**changes):
  return {
    'dense': {'ppl': 16.58},
    'uniform': {'ppl': 24.57},
    'uniform_calibrated': {'ppl': 21.03},
    'searched': {'ppl': 21.25},
    'calibrated': {'ppl': 19.65},
    'protocol': {
      'text': 'pydoc',
      'split': 'held-out (end of the text)',
      'name': 'gptq',
      'context': 512,
      'stride': 512,
      'bos': False,
      'windows': 32,
      'tokens': 16352,
    },
    'reward': {
      'dense_ppl': 15.0,
      'searched_ppl': 20.0,
      'tokens': 12264,
      'context': 512,
      'of': 'calibrated',
    },
    'params_dense': 1000000,
    'params_pruned': 850000,
    'params_prunable': 750000,
    'params_removed': 150000,
    'bytes_dense': 4000000,
    'bytes_pruned': 3400000,
    'seconds': {'load': 1.5, 'search': 30.25},
    'candidates_evaluated': 12,
    'tokens_evaluated': 3060,
    'compilations': 2,
    'versions': {'python': '3.11.7', 'jax': '0.10.2'},
    'device': '4 x TPU v4',
    'command': 'python -m ffp_jax.main --workdir=/tmp/x',
    **changes,
  }


def other(text='general', **changes):
  """Returns what results.json holds on a text of another kind."""
  protocol = results()['protocol'] | {'text': text, 'windows': 24}
  return {
    'dense': {'ppl': 31.25},
    'calibrated': {'ppl': 50.0},
    'protocol': protocol | {'tokens': 12264},
    **changes,
  }


def line(step, **changes):
  return {
    'step': step,
    'stage': step // 3,
    'sparsity': 0.1 + 0.1 * (step // 3),
    'candidates': 2,
    'reward_tokens': 255,
    'reward_mean': np.float32(0.5 + 0.01 * step),
    'reward_max': 0.6 + 0.01 * step,
    **changes,
  }


def run(name='runs/a', *, lines=6, settings=None, **changes) -> Run:
  """A run as `report.read_run` gives it.

  Args:
    name: of its directory.
    lines: of metrics; or how many usual ones.
    settings: changes to its config.
    **changes: to its results.
  """
  if isinstance(lines, int):
    lines = [line(step) for step in range(lines)]
  return Run(
    name,
    config(**(settings or {})),
    *(to_json_types(x) for x in (allocation(), results(**changes), lines)),
  )


def uncalibrated(results: dict) -> dict:
  """The results of the same run without calibration."""
  left = {
    key: value
    for key, value in results.items()
    if key not in ('uniform_calibrated', 'calibrated')
  }
  return {**left, 'reward': {**results['reward'], 'of': 'searched'}}


def write(workdir: pathlib.Path, run: Run):
  """Writes the files that the report reads."""
  files = Workdir(workdir)
  for name in ('config', 'allocation', 'results'):
    files.write_json(f'{name}.json', getattr(run, name))
  (workdir / 'metrics.jsonl').touch()
  for values in run.metrics:
    files.append(values)
