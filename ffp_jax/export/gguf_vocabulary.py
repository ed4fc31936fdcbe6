"""Conversion of a Hugging Face tokenizer to the metadata of a GGUF file."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import gguf

from ffp_jax.checkpoints import gguf_cuts
from ffp_jax.errors import RequestError
from ffp_jax.export import gguf_scores
from ffp_jax.text import tokenization

_Type = gguf.TokenType
_BYTES = {f'<0x{i:02X}>' for i in range(256)}
_NO_NORMALIZER = (
  None,
  {'type': 'NFC'},  # leaves composed text as it is, and nearly all text is
  {'type': 'Sequence', 'normalizers': []},
)


class Vocabulary(NamedTuple):
  """Everything that llama.cpp tokenizes with.

  Attributes:
    kind: 'gpt2' for byte-level BPE, 'llama' for SentencePiece.
    pre: llama.cpp's name of the pre-tokenizer.
    tokens: text of each id.
    types: `gguf.TokenType` of each id.
    merges: of 'gpt2', else None; the two tokens with a space between.
    scores: of 'llama', else None; one for each id.
    prefix: of 'llama', whether a space is put before the text.
    roles: ids of 'bos', 'eos', 'unk' and 'pad', where there are such.
    adds: 'bos' and 'eos' to whether text gets that token.
    template: the default chat template, if any.
    notes: what the user should know, one line each.
  """

  kind: str
  pre: str
  tokens: list[str]
  types: list[int]
  merges: list[str] | None
  scores: list[float] | None
  prefix: bool
  roles: dict[str, int]
  adds: dict[str, bool]
  template: str | None
  notes: list[str]


def read(directory: pathlib.Path, rows: int, pre: str | None) -> Vocabulary:
  """Reads the vocabulary of a model directory.

  Args:
    directory: with a tokenizer that transformers can load.
    rows: number of rows of the embedding. Rows without a token become unused
      tokens, and added tokens without a row are left out.
    pre: llama.cpp's name of the pre-tokenizer, None to recognise it.

  Raises:
    RequestError: there is no tokenizer, its vocabulary is larger than the
      embedding, or llama.cpp would give other ids.
  """
  # gguf.SpecialVocab would take ids that config.json names but the tokenizer
  # lacks, and whether BOS and EOS are added from tokenizer_config.json, though
  # that depends on the tokenizer's class. The loaded tokenizer is exact.
  loaded = tokenization.load_tokenizer(directory)
  content = _bpe_content(loaded, directory)
  bpe = content['model']
  tokens, types, dropped = _tokens(content, rows, directory)
  merges = [x.split(' ') if isinstance(x, str) else x for x in bpe['merges']]
  merges = [tuple(pair) for pair in merges]
  if bpe.get('byte_fallback'):
    kind, name, pairs = 'llama', 'default', None
    by_token = gguf_scores.find_scores(bpe['vocab'], merges, directory)
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
    kind=kind,
    pre=name,
    tokens=tokens,
    types=types,
    merges=pairs,
    scores=scores,
    prefix=_has_prefix(content),
    roles={role: i for role, i in roles.items() if i is not None and i < rows},
    adds={'bos': ids[0] == roles['bos'], 'eos': ids[-1] == roles['eos']},
    template=template,
    notes=_notes(dropped, others, rows),
  )


def _bpe_content(loaded: Any, directory: pathlib.Path) -> dict[str, Any]:
  """Returns the content of tokenizer.json; refuses what is not BPE."""
  if not loaded.is_fast:
    raise RequestError(
      f'{directory}: its tokenizer, a {type(loaded).__name__}, is Python code; '
      'GGUF takes one with a tokenizer.json, use --format=hf or hf_dense'
    )
  content = json.loads(loaded.backend_tokenizer.to_str())
  kind = content['model']['type']
  if kind != 'BPE':
    raise RequestError(
      f'{directory}: a tokenizer of kind {kind} is not known, only BPE; '
      'use --format=hf or hf_dense'
    )
  return content


def _templates(
  stored: str | Mapping[str, str] | None,
) -> tuple[str | None, list[str]]:
  """Returns the default chat template, and the names of the others."""
  if stored is None or isinstance(stored, str):
    return stored, []
  return stored.get('default'), sorted(stored.keys() - {'default'})


def _notes(dropped: list[str], templates: list[str], rows: int) -> list[str]:
  """Returns a line on each thing that the file leaves out."""
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


def _tokens(
  content: Mapping[str, Any], rows: int, directory: pathlib.Path
) -> tuple[list[str], list[int], list[str]]:
  """Returns token and type of each row, and the added tokens without a row."""
  by_id = {i: token for token, i in content['model']['vocab'].items()}
  if max(by_id) >= rows:
    raise RequestError(
      f'{directory}: the tokenizer gives id {max(by_id)}, the embedding has '
      f'{rows} rows; the two do not belong together'
    )
  added = {x['id']: x for x in content['added_tokens']}
  by_id |= {i: x['content'] for i, x in added.items()}
  fallback = content['model'].get('byte_fallback')
  unknown = content['model'].get('unk_token')

  def type_of(i: int) -> int:
    token = by_id.get(i)
    if token is None:
      return _Type.UNUSED
    if fallback and token == unknown:
      return _Type.UNKNOWN
    if i in added:
      return _Type.CONTROL if added[i]['special'] else _Type.USER_DEFINED
    if fallback and token in _BYTES:
      return _Type.BYTE
    return _Type.NORMAL

  names = [by_id.get(i, f'[UNUSED{i}]') for i in range(rows)]
  dropped = [by_id[i] for i in sorted(by_id) if i >= rows]
  return names, [int(type_of(i)) for i in range(rows)], dropped


def _pre(content: Mapping[str, Any], directory: pathlib.Path) -> str:
  """Returns llama.cpp's name of the pre-tokenizer."""
  whole = bool(content['model'].get('ignore_merges'))
  name = gguf_cuts.name_of(content['pre_tokenizer'], whole)
  if name is None or content['normalizer'] not in _NO_NORMALIZER:
    raise RequestError(
      f'{directory}: llama.cpp has no known name for how its tokenizer cuts '
      'text; give one of those in src/llama-vocab.cpp with --pre=NAME'
    )
  return name


def _has_prefix(content: Mapping[str, Any]) -> bool:
  """Returns whether a SentencePiece tokenizer puts a space before the text."""
  text = json.dumps([content['normalizer'], content['pre_tokenizer']])
  return '"Prepend"' in text or (
    '"Metaspace"' in text and '"prepend_scheme": "never"' not in text
  )


def add(writer: gguf.GGUFWriter, vocabulary: Vocabulary):
  """Adds a vocabulary to the metadata of a file."""
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
  for role, i in v.roles.items():
    getattr(writer, f'add_{role}_token_id')(i)
  writer.add_add_bos_token(v.adds['bos'])
  writer.add_add_eos_token(v.adds['eos'])
  if v.template:
    writer.add_chat_template(v.template)
