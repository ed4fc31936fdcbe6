"""SmolLM2-135M, all allocation methods at one budget of evaluated tokens.

Command: python -m ffp_jax.compare --config=configs/compare.py --workdir=DIR
`--config.compare.methods="('uniform', 'random')"` selects methods; a later
command on the same DIR may add methods, sparsities and seeds. docs/results.md
has the results.
"""

from ffp_jax.baselines.settings import comparison


def get_config():
  return comparison()
