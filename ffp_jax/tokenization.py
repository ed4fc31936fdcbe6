"""A text as a model's own tokenizer has it."""

import pathlib
from typing import NamedTuple

import numpy as np

from ffp_jax.config import RequestError
from ffp_jax.model import ModelConfig


class Tokens(NamedTuple):
  """A text as a model's tokenizer has it."""

  ids: np.ndarray  # int32 [N]
  bos: int | None  # the tokenizer's beginning-of-sequence id


def load(directory: pathlib.Path):
  """A model's own tokenizer, of transformers.

  Raises:
    RequestError: the directory has none that can be loaded.
  """
  import transformers  # slow to import

  transformers.logging.set_verbosity_error()
  try:
    return transformers.AutoTokenizer.from_pretrained(directory)
  except (OSError, ValueError, KeyError, TypeError) as error:
    line = str(error).strip().splitlines()[0]
    raise RequestError(f'{directory}: no usable tokenizer ({line})') from error


def encode(directory: pathlib.Path, text: str) -> Tokens:
  """A text by the model's own tokenizer, tokenised once.

  Raises:
    RequestError: see `load`.
  """
  tokenizer = load(directory)
  ids = tokenizer(text, verbose=False)['input_ids']
  return Tokens(np.asarray(ids, np.int32), tokenizer.bos_token_id)


def check(config: ModelConfig, tokens, context: int):
  """Refuses what a lookup would clamp in silence.

  Raises:
    RequestError: an id beyond the vocabulary, or positions beyond the table.
  """
  if len(tokens) and tokens.max() >= config.vocab:
    raise RequestError(
      f'model: the tokenizer gives id {tokens.max()}, the embedding has '
      f'{config.vocab} rows; the two do not belong together'
    )
  if config.positions == 'learned' and context > config.max_positions:
    raise RequestError(
      f'text.context: {context} is more than the {config.max_positions} '
      'positions of this model'
    )
