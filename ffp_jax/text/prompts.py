"""Prompts: token ids to continue, and text as it is generated."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ffp_jax.checkpoints.model import ModelFiles
from ffp_jax.errors import RequestError
from ffp_jax.models import decoding
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.text import tokenization


class Prompt(NamedTuple):
  """A prompt as a model's tokenizer has it."""

  tokenizer: Any  # of transformers
  ids: np.ndarray  # int32, one or more
  ends: frozenset[int]  # ids that end a text
  new: int  # tokens to generate at most


def make_prompt(
  files: ModelFiles, text: str, new: int, *, tokenizer: Any = None
) -> Prompt:
  """Tokenizes a prompt and checks that a model can continue it.

  Args:
    files: of the model; no weight is read.
    text: the prompt.
    new: tokens to generate at most.
    tokenizer: the model's own; None to load it.

  Raises:
    RequestError: the prompt is empty, or longer than the model's positions.
  """
  tokenizer = tokenizer or tokenization.load_tokenizer(files.directory)
  ids = tokenization.token_ids(tokenizer, text)
  ends = tokenization.end_ids(files.directory, tokenizer)
  if not ids.size:
    raise RequestError('--prompt: gives no token; say something')
  tokenization.check_tokens(files.config, ids, 0)
  decoding.check_slots(files.config, len(ids) + new)
  return Prompt(tokenizer, ids, ends, new)


def stream_text(
  params: dict,
  config: ModelConfig,
  prompt: Prompt,
  *,
  temperature: float = 0.0,
  seed: int = 0,
) -> Iterator[str]:
  """Continues a prompt.

  Args:
    params: of the decoder.
    config: the decoder's.
    prompt: from `make_prompt`.
    temperature: 0 for the likeliest token each time.
    seed: of the choices, where the temperature is above 0.

  Yields:
    Pieces of text, each to be put behind the prompt and the pieces before.
  """
  tokenizer, ids, ends, new = prompt
  steps = decoding.generate_tokens(
    params,
    ids[None],
    np.array([len(ids)]),
    config=config,
    slots=len(ids) + new,
    temperature=temperature,
    seed=seed,
  )
  made, said = list(ids), tokenizer.decode(ids)
  for chosen in itertools.islice(steps, new):
    made.append(chosen.item())
    if made[-1] in ends:
      return
    text = tokenizer.decode(made)
    if not text.endswith('\N{REPLACEMENT CHARACTER}'):  # half a character
      yield text[len(said) :]
      said = text
