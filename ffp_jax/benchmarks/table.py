"""Several finished runs side by side, as a Markdown table.

python -m ffp_jax.benchmarks.table DIR [DIR ...]
"""

import json
import pathlib
import sys

from ffp_jax.reporting import wording


def row(workdir: pathlib.Path) -> dict:
  """What the table says of one run."""
  config, results, allocation = (
    json.loads((workdir / f'{name}.json').read_text())
    for name in ('config', 'results', 'allocation')
  )
  reward = results['reward']
  return {
    'text': pathlib.Path(config['data']).name,
    'sparsity': f'{allocation["sparsity_achieved"]:.2%}',
    'seed': str(config['seed']),
    **{
      label: wording.ppl(results[key]['ppl'])
      for key, (label, _) in wording.MODELS.items()
      if key in results
    },
    'reward, searched': wording.ppl(reward['searched_ppl']),
    'tokens evaluated': f'{results["tokens_evaluated"]:,}',
    'seconds': f'{sum(results["seconds"].values()):.0f}',
  }


def table(rows: list[dict]) -> str:
  """Rows with the same keys, as Markdown."""
  lines = [rows[0].keys(), ['--:'] * len(rows[0]), *(r.values() for r in rows)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


if __name__ == '__main__':
  print(table([row(pathlib.Path(name)) for name in sys.argv[1:]]))
