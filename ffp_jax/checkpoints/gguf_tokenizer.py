"""The tokenizer in the metadata of a GGUF file, as one of `tokenizers`."""

from collections.abc import Sequence

import gguf
import tokenizers
from absl import logging
from tokenizers import AddedToken, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from ffp_jax.checkpoints import gguf_cuts
from ffp_jax.checkpoints.gguf_metadata import field, special_id
from ffp_jax.errors import RequestError

# The file with the scores of a SentencePiece vocabulary, a list, which the
# merges of tokenizer.json do not determine: some share a score.
SCORES = 'tokenizer_scores.json'


def tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
  """Returns the file's tokenizer, which adds BOS and EOS as the file says.

  Raises:
    RequestError: it is of an unsupported kind, or damaged.
  """
  kind, path = field(reader, 'tokenizer.ggml.model'), reader.data.filename
  pre = field(reader, 'tokenizer.ggml.pre')
  instead = 'give the directory of the original model'
  if kind not in ('gpt2', 'llama'):
    raise RequestError(
      f'{path}: tokenizer {kind!r} is not known, only gpt2 and llama; {instead}'
    )
  if kind == 'gpt2' and pre not in gguf_cuts.NAMES:
    raise RequestError(
      f'{path}: pre-tokenizer {pre!r} is not known, only '
      f'{", ".join(gguf_cuts.NAMES)}; {instead}'
    )
  try:
    made = byte_level(reader, pre) if kind == 'gpt2' else _sentencepiece(reader)
    made.post_processor = _bos_eos_template(made, reader)
    return made
  except Exception as error:  # tokenizers raises no narrower class
    raise RequestError(
      f'{path}: its tokenizer is damaged ({error}); {instead}'
    ) from error


def _bos_eos_template(made, reader) -> TemplateProcessing | None:
  """Returns what adds BOS and EOS to a text, None if neither is added."""
  ids = {
    role: special_id(reader, role)
    for role in ('bos', 'eos')
    if _adds(reader, role)
  }
  if not ids:
    return None
  tokens = {role: made.id_to_token(i) for role, i in ids.items()}
  before, after = ([tokens[x]] if x in tokens else [] for x in ('bos', 'eos'))
  return TemplateProcessing(
    single=[*before, '$A', *after],
    pair=[*before, '$A', *after, *before, '$B', *after],
    special_tokens=[(tokens[role], ids[role]) for role in ids],
  )


def _adds(reader, role: str) -> bool:
  """Returns whether a text gets its 'bos' or 'eos'.

  If the file does not say, llama.cpp's default holds.
  """
  stated = field(reader, f'tokenizer.ggml.add_{role}_token')
  if stated is None:
    kind = field(reader, 'tokenizer.ggml.model')
    pre = field(reader, 'tokenizer.ggml.pre')
    stated = role == 'bos' and (kind == 'llama' or pre in gguf_cuts.WHOLE)
  return stated and special_id(reader, role) is not None


def tokenizer_config(reader: gguf.GGUFReader) -> dict:
  """Returns the tokenizer_config.json that goes with `tokenizer`."""
  tokens = field(reader, 'tokenizer.ggml.tokens')

  def token(role: str) -> str | None:
    place = special_id(reader, role)
    return None if place is None else tokens[place]

  config = {
    # transformers 4 and 5 take tokenizer.json unchanged for this class.
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': token('bos'),
    'eos_token': token('eos'),
    'unk_token': token('unknown'),
    'pad_token': token('padding'),
    'add_bos_token': _adds(reader, 'bos'),
    'add_eos_token': _adds(reader, 'eos') or None,
    'clean_up_tokenization_spaces': False,
    'model_max_length': field(reader, '{arch}.context_length'),
    'chat_template': _chat_template(reader),
  }
  return {key: value for key, value in config.items() if value is not None}


def _chat_template(reader) -> str | None:
  """Returns the default chat template, and logs which others are dropped."""
  if others := field(reader, 'tokenizer.chat_templates'):
    logging.warning(
      '%s: chat templates but the default are left out: %s',
      reader.data.filename,
      ', '.join(sorted(others)),
    )
  return field(reader, 'tokenizer.chat_template')


def byte_level(reader: gguf.GGUFReader, pre: str) -> tokenizers.Tokenizer:
  """Returns byte-level BPE.

  Args:
    reader: of the file.
    pre: the pre-tokenizer, a key of `gguf_cuts.NAMES`.
  """
  tokens = field(reader, 'tokenizer.ggml.tokens')
  merges = field(reader, 'tokenizer.ggml.merges')
  made = tokenizers.Tokenizer(
    BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(' ')) for merge in merges],
      ignore_merges=pre in gguf_cuts.WHOLE,
    )
  )
  made.pre_tokenizer = gguf_cuts.sequence(gguf_cuts.NAMES[pre])
  made.decoder = decoders.ByteLevel()
  return _add_whole_tokens(made, reader)


def _sentencepiece(reader) -> tokenizers.Tokenizer:
  """Returns SentencePiece BPE with byte fallback, as LLaMA 2 has it."""
  tokens = field(reader, 'tokenizer.ggml.tokens')
  vocab = {token: i for i, token in enumerate(tokens)}
  made = tokenizers.Tokenizer(
    BPE(
      vocab=vocab,
      merges=merges_of(vocab, _scores(reader)),
      unk_token=tokens[special_id(reader, 'unknown')],
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
  return _add_whole_tokens(made, reader)


def scores(reader: gguf.GGUFReader) -> list[float] | None:
  """Returns SentencePiece's score of every token, None for byte-level BPE."""
  is_sentencepiece = field(reader, 'tokenizer.ggml.model') == 'llama'
  return _scores(reader) if is_sentencepiece else None


def _scores(reader) -> list[float]:
  tokens = field(reader, 'tokenizer.ggml.tokens')
  return field(reader, 'tokenizer.ggml.scores') or [0.0] * len(tokens)


def merges_of(
  vocab: dict[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
  """Returns every pair of tokens that makes a token, best score first.

  SentencePiece merges the pair whose result has the best score; of pairs
  with the same result the left-most in the text, so that their order among
  themselves does not matter.

  Args:
    vocab: ids by token.
    scores: by id.
  """
  found = []
  for token, i in vocab.items():
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in vocab and right in vocab:
        found.append((-scores[i], vocab[left], vocab[right], left, right))
  return [(left, right) for *_, left, right in sorted(found)]


def _add_whole_tokens(made, reader):
  """Adds the tokens that are never split: control and user-defined ones."""
  tokens = field(reader, 'tokenizer.ggml.tokens')
  types = field(reader, 'tokenizer.ggml.token_type') or [1] * len(tokens)
  for kind, special in (
    (gguf.TokenType.CONTROL, True),
    (gguf.TokenType.USER_DEFINED, False),
  ):
    added = [
      AddedToken(token, normalized=False, special=special)
      for token, its_kind in zip(tokens, types, strict=True)
      if its_kind == kind
    ]
    made.add_special_tokens(added) if special else made.add_tokens(added)
  return made
