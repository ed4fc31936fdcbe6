"""Every allocator at one budget of evaluated tokens, SmolLM2-135M.

Command: python -m ffp_jax.compare --config=configs/compare.py --workdir=DIR
`--config.compare.methods="('uniform', 'random')"` compares some of them; a
later command on the same DIR may ask for more methods, sparsities and seeds.
docs/results.md has the results.
"""

from ffp_jax.baselines.settings import comparison


def get_config():
  return comparison()
