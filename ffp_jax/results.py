"""The contents of allocation.json and results.json."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from ffp_jax import config as config_lib
from ffp_jax.models import families

if TYPE_CHECKING:
  pass


def allocation(config, job, best) -> dict:
  """What allocation.json holds: what was asked, and what every layer keeps.

  Args:
    config: of the run.
    job: its `prune.PruningJob`.
    best: the `prune.Finalist` that was pruned to.
  """
  attention, ffn = np.split(best.counts, 2)
  units = job.sublayers.units
  total = families.param_count(job.model)
  removed = job.sublayers.total - job.sublayers.kept_cost(best.counts)
  return {
    'sparsity_target': config.budget.sparsity,
    'sparsity_achieved': job.sublayers.sparsity(best.counts),
    'params_dense': total,
    'params_pruned': total - removed,
    'budgets': [
      {
        'name': resource.name,
        'removed_target': resource.removed,
        'removed': 1.0 - resource.kept(best.counts) / resource.kept(units),
      }
      for resource in job.sublayers.resources
    ],
    'layers': [
      {
        'layer': i,
        'attention_kept': int(attention[i]),
        'attention_total': job.model.groups,
        'ffn_kept': int(ffn[i]),
        'ffn_total': job.model.ffn,
      }
      for i in range(job.model.layers)
    ],
    'seed': config.seed,
    'priority': best.priority.tolist(),
  }


def rewards(config, text, best) -> dict:
  """Perplexities on the reward text, beside which to read the held-out."""
  rows = text.rows_RxT
  return {
    'reward': {
      'dense_ppl': float(np.exp(np.mean(text.dense_R))),
      'searched_ppl': float(np.exp(best.nll)),
      'tokens': rows.size - len(rows),
      'context': rows.shape[1],
      # Which of the models judged it foretells.
      'of': 'calibrated' if config_lib.refits(config) else 'searched',
    }
  }


def device() -> str:
  """What the run computes on, such as '4 x TPU v4'."""
  return f'{jax.device_count()} x {jax.devices()[0].device_kind}'


def sizes(job, found, size) -> dict:
  """Parameters and bytes, dense and pruned, in the dtype of the files."""
  before, after = found['params_dense'], found['params_pruned']
  return {
    'params_dense': before,
    'params_pruned': after,
    'params_prunable': job.sublayers.total,
    'params_removed': before - after,
    'bytes_dense': before * job.dtype.itemsize,
    'bytes_pruned': size,
  }
