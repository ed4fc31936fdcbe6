"""OPT-125M, 20% of the prunable parameters, two CPU cores or any GPU.

Command: python -m ffp_jax.main --config=configs/opt_125m.py \
  --config.data=wikitext2 --workdir=DIR
The repository on the hub must hold safetensors; --config.model also takes a
directory. Not run yet, for want of a machine with these weights.
"""

from ffp_jax.config import defaults


def get_config():
  config = defaults()
  config.model = 'facebook/opt-125m'
  config.text.calibration_windows = 64
  # A unit of attention is one head of twelve: removing one is cheap.
  config.search.attention_prior = 1.0
  return config
