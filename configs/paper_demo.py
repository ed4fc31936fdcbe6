"""The published search, cut to what two CPU cores do in minutes: SmolLM2-135M.

Command: python -m ffp_jax.main --config=configs/paper_demo.py --workdir=DIR
As configs/paper_llama2_7b.py, but 240 proposals (published: 2,000 to 8,000),
the whole reward text from the 120th on (published: the 1,000th), and that text
two windows of 512 tokens, scored in rows of 128; 16 calibration windows of 512
tokens in the place of 64, all of them also for reconstruction. Time: the search
516 s with other work beside it on the same two cores.
"""

from ffp_jax.config import PUBLISHED, defaults
from ffp_jax.pruning import curriculum


def get_config():
  config = defaults()
  config.update_from_flattened_dict(PUBLISHED)
  config.text.reward_windows = 2
  config.search.context = 128
  config.search.update(
    curriculum.published(
      16,
      config.search.candidates,
      stairs=4,  # 5, 10, 15 and 20%
      first=0.05,
      full=120,
      rows=8,
    )
  )
  return config
