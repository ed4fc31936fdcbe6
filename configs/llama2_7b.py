"""LLaMA-2-7B, 20% of the prunable parameters, one 80 GB GPU, bfloat16.

Command: python -m ffp_jax.main --config=configs/llama2_7b.py \
  --config.data=wikitext2 --workdir=DIR
The weights are gated on the hub; --config.model also takes a directory.
Not run yet, for want of a machine with these weights.
"""

from ffp_jax.config import defaults


def get_config():
  config = defaults()
  config.model = 'meta-llama/Llama-2-7b-hf'
  config.text.context = 2048
  config.text.calibration_windows = 64
  config.search.context = 2048
  config.search.remat = True
  config.budget.round_ffn = 64
  # With its teacher it fits where the model fits: see docs/scale.md.
  config.recovery.rank = 32
  config.recovery.tokens = 1_048_576
  config.recovery.accumulate = 4
  config.recovery.every = 131_072
  config.recovery.remat = True
  return config
