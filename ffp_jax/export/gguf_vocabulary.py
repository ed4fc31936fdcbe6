"""A Hugging Face tokenizer as the metadata of a GGUF file."""

import json
import pathlib
from typing import NamedTuple

import gguf

from ffp_jax.checkpoints import gguf_cuts
from ffp_jax.errors import RequestError
from ffp_jax.export import gguf_scores
from ffp_jax.text import tokenization

_Type = gguf.TokenType


class Vocabulary(NamedTuple):
  """What llama.cpp tokenises by."""

  kind: str  # 'gpt2', byte-level BPE, or 'llama', SentencePiece
  pre: str  # how text is cut before merges
  tokens: list[str]
  types: list[int]
  merges: list[str] | None  # of gpt2
  scores: list[float] | None  # of llama
  prefix: bool  # llama: a space before the text
  roles: dict[str, int]  # 'bos', 'eos', 'unk', 'pad' to id
  adds: dict[str, bool]  # 'bos', 'eos': whether text gets one
  template: str | None  # of a chat
  notes: list[str]  # what the user should know, a line each


def read(directory: pathlib.Path, rows: int, pre: str | None) -> Vocabulary:
  """The vocabulary of a model directory.

  Args:
    directory: with a tokenizer that transformers can load.
    rows: of the embedding; ids beyond the tokenizer's become unused tokens,
      added tokens beyond the rows are left out.
    pre: llama.cpp's name of the pre-tokenizer, None to recognise it.

  Raises:
    RequestError: there is no tokenizer, its vocabulary is larger than the
      embedding, or llama.cpp would give other ids.
  """
  # Not gguf.SpecialVocab: it takes ids that config.json names and the
  # tokenizer does not have, and knows BOS and EOS by tokenizer_config.json
  # where they depend on the class. What the loaded tokenizer does is exact.
  loaded = tokenization.load_tokenizer(directory)
  if not loaded.is_fast:
    raise RequestError(
      f'{directory}: its tokenizer, a {type(loaded).__name__}, is Python code; '
      'GGUF takes one with a tokenizer.json, use --format=hf or hf_dense'
    )
  content = json.loads(loaded.backend_tokenizer.to_str())
  bpe = content['model']
  if bpe['type'] != 'BPE':
    raise RequestError(
      f'{directory}: a tokenizer of kind {bpe["type"]} is not known, only BPE; '
      'use --format=hf or hf_dense'
    )
  tokens, types, dropped = _tokens(content, rows, directory)
  merges = [x.split(' ') if isinstance(x, str) else x for x in bpe['merges']]
  merges = [tuple(pair) for pair in merges]
  if bpe.get('byte_fallback'):
    kind, name, pairs = 'llama', 'default', None
    by_token = gguf_scores.of(bpe['vocab'], merges, directory)
    scores = [by_token.get(token, 0.0) for token in tokens]
  else:
    kind, scores = 'gpt2', None
    name = pre or _pre(content, directory)
    pairs = [' '.join(pair) for pair in merges]
  ids = loaded('a')['input_ids']
  roles = {
    role: getattr(loaded, f'{role}_token_id')
    for role in ('bos', 'eos', 'unk', 'pad')
  }
  template, others = _templates(loaded.chat_template)
  return Vocabulary(
    kind,
    name,
    tokens,
    types,
    pairs,
    scores,
    _has_prefix(content),
    {role: i for role, i in roles.items() if i is not None and i < rows},
    {'bos': ids[0] == roles['bos'], 'eos': ids[-1] == roles['eos']},
    template,
    _notes(dropped, others, rows),
  )


def _templates(stored) -> tuple[str | None, list[str]]:
  """The chat template of a tokenizer, and the names of further ones."""
  if not isinstance(stored, dict):
    return stored, []
  return stored.get('default'), sorted(stored.keys() - {'default'})


def _notes(dropped: list[str], templates: list[str], rows: int) -> list[str]:
  """What is left out, a line each."""
  notes = []
  if dropped:
    notes.append(
      f'left out, as the embedding has {rows} rows and so no model ever saw '
      f'them: the added tokens {", ".join(dropped)}'
    )
  if templates:
    notes.append(
      'left out: the chat templates that are not the default, '
      f'{", ".join(templates)}'
    )
  return notes


def _tokens(content, rows, directory) -> tuple[list[str], list[int], list[str]]:
  """Token and type of every row of the embedding, and added ones beyond it."""
  places = {i: token for token, i in content['model']['vocab'].items()}
  if max(places) >= rows:
    raise RequestError(
      f'{directory}: the tokenizer gives id {max(places)}, the embedding has '
      f'{rows} rows; the two do not belong together'
    )
  added = {x['id']: x for x in content['added_tokens']}
  places |= {i: x['content'] for i, x in added.items()}
  fallback, unknown = (content['model'].get(key) for key in _SPM_KEYS)

  def type_of(i) -> int:
    token = places.get(i)
    if token is None:
      return _Type.UNUSED
    if fallback and token == unknown:
      return _Type.UNKNOWN
    if i in added:
      return _Type.CONTROL if added[i]['special'] else _Type.USER_DEFINED
    if fallback and token in _BYTES:
      return _Type.BYTE
    return _Type.NORMAL

  names = [places.get(i, f'[UNUSED{i}]') for i in range(rows)]
  dropped = [places[i] for i in sorted(places) if i >= rows]
  return names, [int(type_of(i)) for i in range(rows)], dropped


_SPM_KEYS = ('byte_fallback', 'unk_token')
_BYTES = {f'<0x{i:02X}>' for i in range(256)}


_PLAIN = (None, {'type': 'NFC'}, {'type': 'Sequence', 'normalizers': []})


def _pre(content, directory) -> str:
  """llama.cpp's name for how the tokenizer cuts text."""
  whole = bool(content['model'].get('ignore_merges'))
  name = gguf_cuts.name_of(content['pre_tokenizer'], whole)
  # NFC changes no text that is composed already, as nearly all is.
  plain = content['normalizer'] in _PLAIN
  if name is None or not plain:
    raise RequestError(
      f'{directory}: llama.cpp has no known name for how its tokenizer cuts '
      'text; give one of those in src/llama-vocab.cpp with --pre=NAME'
    )
  return name


def _has_prefix(content) -> bool:
  """Whether a tokenizer of SentencePiece's kind begins text with a space."""
  text = json.dumps([content['normalizer'], content['pre_tokenizer']])
  return '"Prepend"' in text or (
    '"Metaspace"' in text and '"prepend_scheme": "never"' not in text
  )


def add(writer: gguf.GGUFWriter, vocabulary: Vocabulary):
  """Adds a vocabulary to a file's metadata."""
  v = vocabulary
  writer.add_tokenizer_model(v.kind)
  writer.add_tokenizer_pre(v.pre)
  writer.add_token_list(v.tokens)
  writer.add_token_types(v.types)
  if v.merges is not None:
    writer.add_token_merges(v.merges)
  if v.scores is not None:
    writer.add_token_scores(v.scores)
    writer.add_add_space_prefix(v.prefix)
  for role, place in v.roles.items():
    getattr(writer, f'add_{role}_token_id')(place)
  writer.add_add_bos_token(v.adds['bos'])
  writer.add_add_eos_token(v.adds['eos'])
  if v.template:
    writer.add_chat_template(v.template)
