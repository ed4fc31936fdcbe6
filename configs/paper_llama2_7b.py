"""LLaMA-2-7B as FastForward Pruning published it, one 80 GB GPU, bfloat16.

Command: python -m ffp_jax.main --config=configs/paper_llama2_7b.py \
  --config.data=wikitext2 --workdir=DIR
PPO on sampled proposals (arXiv 2511.18977): 20% of the prunable parameters in
stairs of 5%, 15 proposals per step. Proposals meet the budget by the exact
projection; --config.search.repair=cut selects the published repair. Not run
yet, for want of a machine with these weights.
"""

from ffp_jax.config import PUBLISHED, defaults
from ffp_jax.pruning import curriculum

_EPISODES = 4000  # proposals; published: 2,000 to 8,000


def get_config():
  config = defaults()
  config.update_from_flattened_dict(PUBLISHED)
  config.model = 'meta-llama/Llama-2-7b-hf'
  config.text.context = 2048
  config.text.calibration_windows = 64
  config.text.reward_windows = 64
  config.calibration.windows = 32
  config.search.context = 2048
  config.budget.round_ffn = 64
  config.budget.sparsity = 0.2
  config.search.update(
    curriculum.published(
      _EPISODES // config.search.candidates,
      config.search.candidates,
      stairs=4,  # 5, 10, 15 and 20%
      first=0.05,
      full=1000,
      rows=config.text.reward_windows,
    )
  )
  return config
