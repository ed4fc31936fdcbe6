"""SmolLM2-135M, 20% of the prunable parameters, on two CPU cores.

Command: python -m ffp_jax.main --config=configs/llama.py --workdir=DIR
"""

from ffp_jax.config import defaults


def get_config():
  return defaults()
