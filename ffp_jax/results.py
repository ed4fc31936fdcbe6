"""The contents of allocation.json and results.json."""

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from ffp_jax import config as config_lib
from ffp_jax.models import families
from ffp_jax.pruning.search import RewardText


def allocation(
  config: ml_collections.ConfigDict, job: Any, best: Any
) -> dict[str, Any]:
  """Returns the content of allocation.json: budgets, and counts by layer.

  Args:
    config: of the run.
    job: the `jobs.PruningJob` of the run.
    best: the `stages.Finalist` whose counts the model was pruned to.
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


def rewards(
  config: ml_collections.ConfigDict, text: RewardText, best: Any
) -> dict[str, Any]:
  """Returns `reward` of results.json: perplexities on the reward text.

  They are compared with those on held-out text, which the search never saw.

  Args:
    config: of the run.
    text: that candidates were scored on.
    best: the `stages.Finalist` whose counts the model was pruned to.
  """
  rows = text.rows_RxT
  return {
    'reward': {
      'dense_ppl': float(np.exp(np.mean(text.dense_R))),
      'searched_ppl': float(np.exp(best.nll)),
      'tokens': rows.size - len(rows),
      'context': rows.shape[1],
      # The evaluated model that the reward anticipates.
      'of': 'calibrated' if config_lib.refits(config) else 'searched',
    }
  }


def device() -> str:
  """Returns number and kind of the devices, such as '4 x TPU v4'."""
  return f'{jax.device_count()} x {jax.devices()[0].device_kind}'


def sizes(job: Any, found: Mapping[str, Any], size: int) -> dict[str, int]:
  """Returns the entries of results.json on parameters and bytes.

  Args:
    job: the `jobs.PruningJob` of the run.
    found: from `allocation`.
    size: bytes of the pruned model's weights.
  """
  before, after = found['params_dense'], found['params_pruned']
  return {
    'params_dense': before,
    'params_pruned': after,
    'params_prunable': job.sublayers.total,
    'params_removed': before - after,
    'bytes_dense': before * job.dtype.itemsize,
    'bytes_pruned': size,
  }
