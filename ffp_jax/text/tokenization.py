"""Tokenization of text by a model's own tokenizer."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from ffp_jax.checkpoints import model_config
from ffp_jax.checkpoints.directory import warn_once
from ffp_jax.errors import RequestError
from ffp_jax.models.config import ModelConfig
from ffp_jax.text import corpora
from ffp_jax.text.tokenizer_faults import find_fault, json_fault


class Tokens(NamedTuple):
  """Holds the tokens of a text."""

  ids: np.ndarray  # int32 [N]
  bos: int | None  # the tokenizer's beginning-of-sequence id


class TokenText(NamedTuple):
  """A named text as a model's tokenizer has it."""

  ids: np.ndarray  # int32 [N]
  bos: int | None  # the tokenizer's beginning-of-sequence id
  name: str
  extent: str  # of the source: 'the text', or the first so many MB
  windows: int | None = None  # that papers report on; None for all


def read_tokens(
  directory: pathlib.Path, source: str, *, field: str = '', report=False
) -> TokenText:
  """Reads a text and tokenizes it with a model's own tokenizer.

  Args:
    directory: of the model.
    source, field, report: see `corpora.read_text`.

  Raises:
    RequestError: the text or the tokenizer can't be read.
  """
  text = corpora.read_text(source, field=field, report=report)
  tokens = tokenize(directory, text.content)
  return TokenText(*tokens, text.name, text.extent, text.windows)


def load_tokenizer(directory: pathlib.Path) -> Any:
  """Loads a model's own tokenizer with transformers, never running its code.

  Raises:
    RequestError: the directory has no tokenizer that can be loaded.
  """
  import transformers  # slow to import

  transformers.logging.set_verbosity_error()
  try:
    # Without `trust_remote_code` it would ask on the terminal.
    tokenizer = _class_of(directory, transformers).from_pretrained(
      directory, trust_remote_code=False
    )
  except Exception as error:  # tokenizers raises no narrower class
    reason = f'{type(error).__name__}: {error}'
    fault = find_fault(directory, reason)
    raise RequestError(f'{directory}: {fault}') from error
  # If files are missing, some classes load with special tokens alone.
  if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
    fault = find_fault(directory, 'it knows special tokens only')
    raise RequestError(f'{directory}: {fault}')
  return tokenizer


def _class_of(directory: pathlib.Path, transformers):
  """Returns the class of transformers that loads a tokenizer.

  AutoTokenizer replaces the pre-tokenizer of every Qwen2 by that family's own,
  whatever tokenizer.json says. A tokenizer that was made from a GGUF file must
  be taken as it is.
  """
  path = directory / 'tokenizer_config.json'
  settings = {} if json_fault(path) else json.loads(path.read_text('utf-8'))
  if settings.get('ffp_jax') == 'gguf':
    return transformers.PreTrainedTokenizerFast
  return transformers.AutoTokenizer


def tokenize(directory: pathlib.Path, text: str) -> Tokens:
  """Tokenizes a text with the tokenizer of the model in `directory`.

  Raises:
    RequestError: see `load_tokenizer` and `token_ids`.
  """
  tokenizer = load_tokenizer(directory)
  return Tokens(token_ids(tokenizer, text), tokenizer.bos_token_id)


def token_ids(tokenizer: Any, text: str) -> np.ndarray:
  """Returns the ids of a whole text, int32 [N].

  Args:
    tokenizer: of transformers.
    text: to tokenize.

  Raises:
    RequestError: the tokenizer has no token for a part of the text.
  """
  try:
    ids = tokenizer(text, verbose=False)['input_ids']
  except Exception as error:  # tokenizers raises no narrower class
    raise RequestError(
      f'{tokenizer.name_or_path}: the tokenizer cannot encode the text '
      f'({error})'
    ) from error
  return np.asarray(ids, np.int32)


def end_ids(directory: pathlib.Path, tokenizer: Any) -> frozenset[int]:
  """Returns the ids that end a text: the model's and the tokenizer's EOS.

  As in transformers, the model's are those of generation_config.json, even if
  it names none; or of config.json if that file is missing or not a JSON
  object.

  Args:
    directory: of the model.
    tokenizer: of transformers.

  Raises:
    RequestError: `eos_token_id` is neither an id nor a list of ids.
  """
  path = directory / 'generation_config.json'
  if json_fault(path):
    values = model_config.read_config_json(directory)
  else:
    values = json.loads(path.read_text(encoding='utf-8'))
  stated = values.get('eos_token_id')
  ids = stated if isinstance(stated, list) else [stated]
  found = [i for i in (*ids, tokenizer.eos_token_id) if i is not None]
  if not all(type(i) is int for i in found):
    raise RequestError(
      f'{directory}: eos_token_id must be an id or a list of ids, found '
      f'{stated!r}'
    )
  return frozenset(found)


def check_tokens(
  config: ModelConfig, tokens: np.ndarray | tuple[()], context: int
) -> None:
  """Checks ids and positions, which JAX would clamp silently.

  Logs a warning if a model with rotary positions was not made for so long a
  context.

  Args:
    config: of the model.
    tokens: ids of the text, [N].
    context: tokens per window.

  Raises:
    RequestError: an id is beyond the vocabulary, or positions are beyond the
      table of learned ones.
  """
  if len(tokens) and tokens.max() >= config.vocab:
    raise RequestError(
      f'model: the tokenizer gives id {tokens.max()}, the embedding has '
      f'{config.vocab} rows; the two do not belong together'
    )
  most = config.rope_scaling.max_context(config.max_positions)
  if context <= most:
    return
  problem = f'text.context: {context} is more than the {most} positions of this'
  if config.positions == 'learned':
    raise RequestError(f'{problem} model')
  warn_once(f'{problem} model; its figures will be worse than within them')
