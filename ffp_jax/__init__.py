"""FastForward Pruning: structured pruning of LLMs in JAX.

The names below come from `ffp_jax.api`, which is imported when the first of
them is used, so that `import ffp_jax` stays quick.
"""

import importlib
from typing import Any

__version__ = '0.1.0'
__all__ = [
  'PrunedModel',
  'RecoveredModel',
  'generate_text',
  'load_model',
  'load_pruned',
  'perplexity',
  'prune_model',
  'recover_model',
  'save_model',
]


def __getattr__(name: str) -> Any:
  if name in __all__:
    return getattr(importlib.import_module('ffp_jax.api'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return [*globals(), *__all__]
