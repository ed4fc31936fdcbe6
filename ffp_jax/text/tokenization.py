"""A text as a model's own tokenizer has it."""

import base64
import functools
import importlib.util
import json
import pathlib
from typing import NamedTuple

import numpy as np
from absl import logging

from ffp_jax.checkpoints import model_config
from ffp_jax.errors import RequestError
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.text import corpora

# What transformers reads beside the vocabulary, all of it JSON.
_SETTINGS = (
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
)
_VOCABULARIES = (
  'tokenizer.json',
  '*.model',
  'tokenizer.model.*',
  '*.tiktoken',
  'tekken.json',
  'vocab.json',
  'vocab.txt',
  'merges.txt',
)
_POINTER = b'version https://git-lfs'


class Tokens(NamedTuple):
  """A text as a model's tokenizer has it."""

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


def load_tokenizer(directory: pathlib.Path):
  """Returns a model's own tokenizer, of transformers; runs no code of its own.

  Raises:
    RequestError: the directory has none that can be loaded.
  """
  import transformers  # slow to import

  transformers.logging.set_verbosity_error()
  try:
    # Left open, it would ask on the terminal.
    tokenizer = _class_of(directory, transformers).from_pretrained(
      directory, trust_remote_code=False
    )
  except Exception as error:  # what tokenizers raises has no narrower class
    reason = f'{type(error).__name__}: {error}'
    raise RequestError(f'{directory}: {_fault(directory, reason)}') from error
  # Some classes make one up of special tokens alone where files are missing.
  if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
    reason = 'it knows special tokens only'
    raise RequestError(f'{directory}: {_fault(directory, reason)}')
  return tokenizer


def _class_of(directory: pathlib.Path, transformers):
  """Returns the class of transformers that loads a tokenizer.

  AutoTokenizer cuts the text of every Qwen2 in that family's own way, whatever
  tokenizer.json says; one that was made from a GGUF file is exact as it is.
  """
  path = directory / 'tokenizer_config.json'
  settings = {} if _json_fault(path) else json.loads(path.read_text('utf-8'))
  if settings.get('ffp_jax') == 'gguf':
    return transformers.PreTrainedTokenizerFast
  return transformers.AutoTokenizer


def tokenize(directory: pathlib.Path, text: str) -> Tokens:
  """Returns a text by the model's own tokenizer, tokenised once.

  Raises:
    RequestError: see `load` and `ids_of`.
  """
  tokenizer = load_tokenizer(directory)
  return Tokens(token_ids(tokenizer, text), tokenizer.bos_token_id)


def token_ids(tokenizer, text: str) -> np.ndarray:
  """Returns the ids of a whole text, int32 [N].

  Raises:
    RequestError: the tokenizer has no token for a part of the text.
  """
  try:
    ids = tokenizer(text, verbose=False)['input_ids']
  except Exception as error:  # as above
    raise RequestError(
      f'{tokenizer.name_or_path}: the tokenizer cannot encode the text '
      f'({error})'
    ) from error
  return np.asarray(ids, np.int32)


def end_ids(directory: pathlib.Path, tokenizer) -> frozenset[int]:
  """Returns the ids that end a text: the model's own and the tokenizer's EOS.

  As in transformers, the model's are those of generation_config.json, even if
  it names none, and of config.json where there is no such file or it is no
  JSON object.

  Raises:
    RequestError: `eos_token_id` is neither an id nor a list of ids.
  """
  path = directory / 'generation_config.json'
  if _json_fault(path):
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


def check_tokens(config: ModelConfig, tokens, context: int):
  """Refuses what a lookup would clamp in silence; warns of unknown positions.

  Raises:
    RequestError: an id beyond the vocabulary, or positions beyond the table.
  """
  if len(tokens) and tokens.max() >= config.vocab:
    raise RequestError(
      f'model: the tokenizer gives id {tokens.max()}, the embedding has '
      f'{config.vocab} rows; the two do not belong together'
    )
  most = config.rope_scaling.reach(config.max_positions)
  if context <= most:
    return
  problem = f'text.context: {context} is more than the {most} positions of this'
  if config.positions == 'learned':
    raise RequestError(f'{problem} model')
  _warn(f'{problem} model; its figures will be worse than within them')


@functools.cache
def _warn(line: str):
  """Logs a line once, however many runs of one process share its cause."""
  logging.warning('%s', line)


def _fault(directory: pathlib.Path, reason: str) -> str:
  """Returns why transformers can't load a tokenizer, and what helps.

  Args:
    directory: of the model.
    reason: what transformers said, for want of a better one.
  """
  found = {
    path.name: path
    for pattern in (*_SETTINGS, *_VOCABULARIES)
    for path in sorted(directory.glob(pattern))
    if path.is_file()
  }
  for name, path in found.items():
    if fault := _file_fault(path):
      return f'{name} {fault}'
  if fault := _missing(found):
    return fault
  if 'trust_remote_code' in reason:
    return (
      'the tokenizer is code of its own, which is not run here; in '
      'transformers, AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)'
      ".backend_tokenizer.save('tokenizer.json') writes one that is data, then "
      'take auto_map out of tokenizer_config.json'
    )
  for name, look in (
    ('tokenizer.json', _tokenizers_fault),
    ('tokenizer.model', _sentencepiece_fault),
  ):
    if name in found and (fault := look(found[name])):
      return f'{name} {fault}'
  line = reason.strip().splitlines()[0]
  return (
    f'no usable tokenizer ({line}); check {", ".join(found)}, or fetch them '
    'again'
  )


def _missing(found: dict) -> str | None:
  """Returns which files are needed, where they are not there."""
  words = found.keys() - set(_SETTINGS)
  if not words:
    return (
      'no tokenizer: neither tokenizer.json, nor tokenizer.model, nor '
      'vocab.json with merges.txt; copy them from the model that this one was '
      'made from'
    )
  for one, other in (
    ('vocab.json', 'merges.txt'),
    ('merges.txt', 'vocab.json'),
  ):
    if words == {one}:
      return f'{one} without {other}; copy it from where the model comes from'
  return None


def _file_fault(path: pathlib.Path) -> str | None:
  """Returns what is wrong with a file, whatever it should hold."""
  with path.open('rb') as file:
    head = file.read(len(_POINTER))
  if head == _POINTER:
    return (
      'is a Git LFS pointer, not the file itself; fetch it with: git lfs pull'
    )
  if not head:
    return 'is empty; fetch it again'
  return _json_fault(path) if path.suffix == '.json' else None


def _json_fault(path: pathlib.Path) -> str | None:
  """Returns why a file can't be read as a JSON object."""
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    if 'BOM' in str(error):
      return 'begins with a byte-order mark; save it as UTF-8 without one'
    return f'is not valid JSON ({error}); cut short or damaged, fetch it again'
  if not isinstance(content, dict):
    return 'is not a JSON object; fetch it again'
  return None


def _tokenizers_fault(path: pathlib.Path) -> str | None:
  """Returns why a tokenizer.json can't be read by the library that saves it."""
  import tokenizers

  try:
    tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # no narrower class
    return (
      f'cannot be read by tokenizers {tokenizers.__version__} ({error}); if it '
      'was saved by a newer version, pip install --upgrade tokenizers '
      'transformers, else fetch it again'
    )
  return None


def _sentencepiece_fault(path: pathlib.Path) -> str | None:
  """Returns why a tokenizer.model can't be read."""
  if not importlib.util.find_spec('sentencepiece'):
    return 'needs sentencepiece; pip install sentencepiece'
  import sentencepiece

  try:
    sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (OSError, RuntimeError):
    if _is_tiktoken(path):
      return (
        'is one of tiktoken; pip install tiktoken, or put the tokenizer.json '
        'of the same model beside it'
      )
    return 'is not a SentencePiece model; cut short or damaged, fetch it again'
  return None


def _is_tiktoken(path: pathlib.Path) -> bool:
  """Returns whether the first line is a token in base64 and its rank."""
  with path.open('rb') as file:
    token, _, rank = file.readline(1000).strip().partition(b' ')
  try:
    base64.b64decode(token, validate=True)
  except ValueError:
    return False
  return rank.isdigit()
