"""The tokenizer that a GGUF file carries in its metadata."""

import json

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from ffp_jax.config import RequestError
from ffp_jax.formats.gguf_model import field

_GPT2 = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),)


def _by(pattern: str):
  """Splits by a pattern, then spells bytes as characters."""
  return (
    pre_tokenizers.Split(Regex(pattern), 'isolated'),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  )


# How text is cut before merges, by `tokenizer.ggml.pre`: what llama.cpp means
# by that name (src/llama-vocab.cpp). Of several names for the same, the first
# is the usual one.
_LLAMA3 = _by(
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_TEKKEN = _by(
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*'
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'
  r'|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+'
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'
  r'|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2 = _by(
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_DIGITS = (pre_tokenizers.Digits(individual_digits=True), *_GPT2)
_CUTS = {
  'gpt-2': _GPT2,
  'smollm': _DIGITS,
  'starcoder': _DIGITS,
  'refact': _DIGITS,
  'command-r': _DIGITS,
  'llama-bpe': _LLAMA3,
  'llama3': _LLAMA3,
  'llama-v3': _LLAMA3,
  'smaug-bpe': _LLAMA3,
  'tekken': _TEKKEN,
  'qwen2': _QWEN2,
}
# Of these a word that is itself a token is never built by merges, and text
# starts with BOS unless the file says otherwise.
_WHOLE = ('llama3', 'llama-v3', 'llama-bpe', 'tekken')


def tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
  """The file's tokenizer, BOS included where the model expects one.

  Raises:
    RequestError: it is of a kind that isn't known here, or damaged.
  """
  kind, path = field(reader, 'tokenizer.ggml.model'), reader.data.filename
  pre = field(reader, 'tokenizer.ggml.pre')
  instead = 'give the directory of the original model'
  if kind not in ('gpt2', 'llama'):
    raise RequestError(
      f'{path}: tokenizer {kind!r} is not known, only gpt2 and llama; {instead}'
    )
  if kind == 'gpt2' and pre not in _CUTS:
    raise RequestError(
      f'{path}: pre-tokenizer {pre!r} is not known, only '
      f'{", ".join(_CUTS)}; {instead}'
    )
  try:
    made = byte_level(reader, pre) if kind == 'gpt2' else _sentencepiece(reader)
    return _with_bos(made, reader) if _adds_bos(reader) else made
  except Exception as error:  # tokenizers has no narrower one
    raise RequestError(
      f'{path}: its tokenizer is damaged ({error}); {instead}'
    ) from error


def _with_bos(made, reader):
  bos = field(reader, 'tokenizer.ggml.bos_token_id')
  token = made.id_to_token(bos)
  made.post_processor = TemplateProcessing(
    single=[token, '$A'],
    pair=[token, '$A', token, '$B'],
    special_tokens=[(token, bos)],
  )
  return made


def _adds_bos(reader) -> bool:
  said = field(reader, 'tokenizer.ggml.add_bos_token')
  if said is None:
    kind = field(reader, 'tokenizer.ggml.model')
    said = kind == 'llama' or field(reader, 'tokenizer.ggml.pre') in _WHOLE
  return said and field(reader, 'tokenizer.ggml.bos_token_id') is not None


def tokenizer_config(reader: gguf.GGUFReader) -> dict:
  """tokenizer_config.json beside the tokenizer.json of `tokenizer`."""
  tokens = field(reader, 'tokenizer.ggml.tokens')

  def named(role: str) -> str | None:
    place = field(reader, f'tokenizer.ggml.{role}_token_id')
    return None if place is None else tokens[place]

  config = {
    # The class that takes tokenizer.json as it is, in transformers 4 and 5.
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': named('bos'),
    'eos_token': named('eos'),
    'unk_token': named('unknown'),
    'pad_token': named('padding'),
    'add_bos_token': _adds_bos(reader),
    'clean_up_tokenization_spaces': False,
    'model_max_length': field(reader, '{arch}.context_length'),
    'chat_template': field(reader, 'tokenizer.chat_template'),
  }
  return {key: value for key, value in config.items() if value is not None}


def byte_level(reader, pre: str) -> tokenizers.Tokenizer:
  """Byte-level BPE, text cut as `pre` says."""
  tokens = field(reader, 'tokenizer.ggml.tokens')
  merges = field(reader, 'tokenizer.ggml.merges')
  made = tokenizers.Tokenizer(
    BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(' ')) for merge in merges],
      ignore_merges=pre in _WHOLE,
    )
  )
  made.pre_tokenizer = _cut(pre)
  made.decoder = decoders.ByteLevel()
  return _with_added(made, reader)


def _cut(pre: str):
  cuts = _CUTS[pre]
  return cuts[0] if len(cuts) == 1 else pre_tokenizers.Sequence(list(cuts))


def pre_name(pre_tokenizer: dict, whole: bool) -> str | None:
  """`tokenizer.ggml.pre` of a tokenizer.json.

  Args:
    pre_tokenizer: its section of that name.
    whole: whether a word that is itself a token is taken without merges.

  Returns:
    None if no name is known for it.
  """
  for name in _CUTS:
    section = json.loads(_cut(name).__getstate__())
    if (name in _WHOLE) == whole and _same_cut(section, pre_tokenizer):
      return name
  return None


def _same_cut(one, other) -> bool:
  """Equal but for the offsets that tokens are said to have."""
  if isinstance(one, dict) and isinstance(other, dict):
    keys = (one.keys() | other.keys()) - {'trim_offsets'}
    return all(_same_cut(one.get(k), other.get(k)) for k in keys)
  if isinstance(one, list) and isinstance(other, list):
    return len(one) == len(other) and all(map(_same_cut, one, other))
  return one == other


def _sentencepiece(reader) -> tokenizers.Tokenizer:
  """SentencePiece BPE with bytes to fall back on, as of LLaMA 2."""
  tokens = field(reader, 'tokenizer.ggml.tokens')
  vocab = {token: i for i, token in enumerate(tokens)}
  unknown = field(reader, 'tokenizer.ggml.unknown_token_id')
  made = tokenizers.Tokenizer(
    BPE(
      vocab=vocab,
      merges=merges_of(vocab, field(reader, 'tokenizer.ggml.scores')),
      unk_token=tokens[0 if unknown is None else unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  spaces = [normalizers.Replace(' ', '▁')]
  strip = []
  if field(reader, 'tokenizer.ggml.add_space_prefix') in (None, True):
    spaces.insert(0, normalizers.Prepend('▁'))
    strip.append(decoders.Strip(' ', 1, 0))
  made.normalizer = normalizers.Sequence(spaces)
  made.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *strip,
    ]
  )
  return _with_added(made, reader)


def merges_of(vocab: dict, scores: list) -> list[tuple[str, str]]:
  """Every pair of tokens that makes a token, best score first.

  SentencePiece merges the pair whose result has the best score; of pairs
  with the same result the left-most in the text, so that their order among
  themselves doesn't matter.
  """
  found = []
  for token, i in vocab.items():
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in vocab and right in vocab:
        found.append((-scores[i], vocab[left], vocab[right], left, right))
  return [(left, right) for *_, left, right in sorted(found)]


def _with_added(made, reader):
  """Tokens that are matched whole: control tokens, and the user's own."""
  tokens = field(reader, 'tokenizer.ggml.tokens')
  types = field(reader, 'tokenizer.ggml.token_type') or [1] * len(tokens)
  for kind, special in (
    (gguf.TokenType.CONTROL, True),
    (gguf.TokenType.USER_DEFINED, False),
  ):
    added = [
      AddedToken(token, normalized=False, special=special)
      for token, its in zip(tokens, types, strict=True)
      if its == kind
    ]
    made.add_special_tokens(added) if special else made.add_tokens(added)
  return made
