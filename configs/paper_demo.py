"""SmolLM2-135M by the published search, shortened for two CPU cores.

Command: python -m ffp_jax.main --config=configs/paper_demo.py --workdir=DIR
Differs from configs/paper_llama2_7b.py in that there are 240 proposals
(published: 2,000 to 8,000), that the whole reward text is used from the 120th
on (published: the 1,000th), that it is two windows of 512 tokens, scored in
rows of 128, and that 16 calibration windows of 512 tokens in place of 64 are
all used for calibration.
Time: about 11 minutes while other work ran on the same two cores, 5 of them
the search.
Result on pydoc with seed 0, held-out perplexity: 9.81 dense, 19.96
uniform, 17.53 searched, 12.85 searched and calibrated.
"""

from ffp_jax.config import PUBLISHED, defaults
from ffp_jax.pruning import curriculum


def get_config():
  config = defaults()
  config.update_from_flattened_dict(PUBLISHED)
  config.data = 'pydoc'
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
