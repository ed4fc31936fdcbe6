"""Diagnosis of tokenizers that transformers cannot load."""

import base64
import importlib.util
import json
import pathlib

from ffp_jax.runtime.storage import LFS_POINTER

# The files that transformers reads beside the vocabulary; all are JSON.
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


def find_fault(directory: pathlib.Path, reason: str) -> str:
  """Returns why transformers can't load a tokenizer, and what helps.

  Args:
    directory: of the model.
    reason: the error of transformers, stated if no better one is found.
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
  if fault := _missing_fault(found):
    return fault
  if 'trust_remote_code' in reason:
    return (
      'the tokenizer is code of its own, which is not run here; in '
      'transformers, AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)'
      ".backend_tokenizer.save('tokenizer.json') writes one that is data, then "
      'take auto_map out of tokenizer_config.json'
    )
  for name, check in (
    ('tokenizer.json', _tokenizers_fault),
    ('tokenizer.model', _sentencepiece_fault),
  ):
    if name in found and (fault := check(found[name])):
      return f'{name} {fault}'
  line = reason.strip().splitlines()[0]
  return (
    f'no usable tokenizer ({line}); check {", ".join(found)}, or fetch them '
    'again'
  )


def _missing_fault(found: dict) -> str | None:
  """Returns which files are missing, None if the vocabulary is complete."""
  vocabularies = found.keys() - set(_SETTINGS)
  if not vocabularies:
    return (
      'no tokenizer: neither tokenizer.json, nor tokenizer.model, nor '
      'vocab.json with merges.txt; copy them from the model that this one was '
      'made from'
    )
  for one, other in (
    ('vocab.json', 'merges.txt'),
    ('merges.txt', 'vocab.json'),
  ):
    if vocabularies == {one}:
      return f'{one} without {other}; copy it from where the model comes from'
  return None


def _file_fault(path: pathlib.Path) -> str | None:
  """Returns what is wrong with a file of any kind, None if nothing."""
  with path.open('rb') as file:
    head = file.read(len(LFS_POINTER))
  if head == LFS_POINTER:
    return (
      'is a Git LFS pointer, not the file itself; fetch it with: git lfs pull'
    )
  if not head:
    return 'is empty; fetch it again'
  return json_fault(path) if path.suffix == '.json' else None


def json_fault(path: pathlib.Path) -> str | None:
  """Returns why a file can't be read as a JSON object, None if it can."""
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
  """Returns why a tokenizer.json can't be read, None if it can."""
  import tokenizers

  try:
    tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # tokenizers raises no narrower class
    return (
      f'cannot be read by tokenizers {tokenizers.__version__} ({error}); if it '
      'was saved by a newer version, pip install --upgrade tokenizers '
      'transformers, else fetch it again'
    )
  return None


def _sentencepiece_fault(path: pathlib.Path) -> str | None:
  """Returns why a tokenizer.model can't be read, None if it can."""
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
