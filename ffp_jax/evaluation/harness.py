"""Loads tasks of the LM Evaluation Harness (lm_eval) and scores a model."""

import contextlib
import os
import random
import sys
from typing import Any

import lm_eval.tasks
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.tasks.manager import TaskDict

from ffp_jax.errors import RequestError
from ffp_jax.evaluation import builtin_tasks

HARNESS = f'lm_eval {lm_eval.__version__}'
_RESAMPLES = 1000  # for standard errors without a formula
# The harness's own seeds, so that examples and shots are the same ones here.
_SEED, _NUMPY_SEED = 0, 1234


def load_tasks(
  names: list[str], tokenizer: Any, fewshot: int | None = None
) -> TaskDict:
  """Loads tasks with their examples.

  Args:
    names: of tasks, groups or tags, of `builtin_tasks`, or paths of .yaml
      files.
    tokenizer: transformers tokenizer of the model to evaluate.
    fewshot: examples in each prompt, for tasks that allow it; None for the
      tasks' own number.

  Raises:
    RequestError: a task does not exist, its examples cannot be fetched, or the
      tokenizer has no EOS.
  """
  if tokenizer.eos_token_id is None:
    raise RequestError('tasks: the tokenizer has no end-of-sequence token')
  random.seed(_SEED)
  np.random.seed(_NUMPY_SEED)
  # The harness's own tasks are thousands of files, which take long to index.
  index_own = False
  specs: list = []
  for name in names:
    if builtin_tasks.is_builtin(name):
      specs += builtin_tasks.load(name)
    else:
      specs.append(name)
      index_own |= not name.endswith('.yaml')
  try:
    loaded = lm_eval.tasks.TaskManager(include_defaults=index_own).load(specs)
  except Exception as error:  # of many kinds: files, formats, the network
    raise RequestError(
      f'tasks: cannot load {",".join(names)} '
      f'({type(error).__name__}: {error}); see lm_eval ls tasks'
    ) from error
  for task in loaded['tasks'].values():
    shots = task.get_config('num_fewshot')
    if fewshot is not None and shots != 0:  # 0 is the task's choice
      shots = fewshot
    task.set_config(key='num_fewshot', value=shots or 0)
    task.set_fewshot_seed(seed=_NUMPY_SEED)
  return loaded


def score_tasks(
  model: TemplateLM, loaded: TaskDict, limit: int | None
) -> dict[str, dict]:
  """Scores a model on tasks.

  Args:
    model: such as `harness_model.JaxLM`.
    loaded: from `load_tasks`.
    limit: number of examples of each task, from the first on; None for all.

  Returns:
    dict from each task and group to its metrics with standard errors,
    `examples`, `fewshot` and `version`, and to the mean of `builtin_tasks`.
  """
  # The harness would resample in forked processes, and JAX has threads.
  os.environ['DISABLE_MULTIPROC'] = '1'
  with contextlib.redirect_stdout(sys.stderr):
    scores = lm_eval.evaluate(
      model,
      loaded,
      limit=limit,
      log_samples=False,
      bootstrap_iters=_RESAMPLES,
    )
  counts = scores['n-samples']
  found: dict[str, dict] = {
    name: {
      key.removesuffix(',none').replace('_stderr,none', '_stderr'): value
      for key, value in figures.items()
      if isinstance(value, float)
    }
    | {
      'examples': counts[name]['effective'] if name in counts else None,
      'fewshot': scores['n-shot'].get(name),
      'version': scores['versions'].get(name),
    }
    for name, figures in scores['results'].items()
  }
  return found | builtin_tasks.mean_accuracy(found)
