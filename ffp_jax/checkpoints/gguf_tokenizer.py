"""The tokenizer that a GGUF file carries in its metadata."""

import gguf
import tokenizers
from absl import logging
from tokenizers import AddedToken, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from ffp_jax.checkpoints import gguf_cuts
from ffp_jax.checkpoints.gguf_model import field, special_id
from ffp_jax.errors import RequestError

# The scores of a SentencePiece vocabulary, a list, beside tokenizer.json: its
# merges do not say which of them share a score.
SCORES = 'tokenizer_scores.json'


def tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
  """The file's tokenizer, with BOS and EOS where the model expects them.

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
  if kind == 'gpt2' and pre not in gguf_cuts.NAMES:
    raise RequestError(
      f'{path}: pre-tokenizer {pre!r} is not known, only '
      f'{", ".join(gguf_cuts.NAMES)}; {instead}'
    )
  try:
    made = byte_level(reader, pre) if kind == 'gpt2' else _sentencepiece(reader)
    made.post_processor = _around(made, reader)
    return made
  except Exception as error:  # tokenizers has no narrower one
    raise RequestError(
      f'{path}: its tokenizer is damaged ({error}); {instead}'
    ) from error


def _around(made, reader) -> TemplateProcessing | None:
  """Puts BOS before and EOS after a text, as far as the file says so."""
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
  """Whether a text gets its 'bos' or 'eos'; where unsaid, as in llama.cpp."""
  said = field(reader, f'tokenizer.ggml.add_{role}_token')
  if said is None:
    kind = field(reader, 'tokenizer.ggml.model')
    pre = field(reader, 'tokenizer.ggml.pre')
    said = role == 'bos' and (kind == 'llama' or pre in gguf_cuts.WHOLE)
  return said and special_id(reader, role) is not None


def tokenizer_config(reader: gguf.GGUFReader) -> dict:
  """tokenizer_config.json beside the tokenizer.json of `tokenizer`."""
  tokens = field(reader, 'tokenizer.ggml.tokens')

  def named(role: str) -> str | None:
    place = special_id(reader, role)
    return None if place is None else tokens[place]

  config = {
    # The class that takes tokenizer.json as it is, in transformers 4 and 5.
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': named('bos'),
    'eos_token': named('eos'),
    'unk_token': named('unknown'),
    'pad_token': named('padding'),
    'add_bos_token': _adds(reader, 'bos'),
    'add_eos_token': _adds(reader, 'eos') or None,
    'clean_up_tokenization_spaces': False,
    'model_max_length': field(reader, '{arch}.context_length'),
    'chat_template': _template(reader),
  }
  return {key: value for key, value in config.items() if value is not None}


def _template(reader) -> str | None:
  """The default chat template; says which others are left out."""
  if others := field(reader, 'tokenizer.chat_templates'):
    logging.warning(
      '%s: chat templates but the default are left out: %s',
      reader.data.filename,
      ', '.join(sorted(others)),
    )
  return field(reader, 'tokenizer.chat_template')


def byte_level(reader, pre: str) -> tokenizers.Tokenizer:
  """Byte-level BPE, text cut as `pre` says."""
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
  return _with_added(made, reader)


def _sentencepiece(reader) -> tokenizers.Tokenizer:
  """SentencePiece BPE with bytes to fall back on, as of LLaMA 2."""
  tokens = field(reader, 'tokenizer.ggml.tokens')
  vocab = {token: i for i, token in enumerate(tokens)}
  made = tokenizers.Tokenizer(
    BPE(
      vocab=vocab,
      merges=merges_of(vocab, scores(reader)),
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
  return _with_added(made, reader)


def scores(reader) -> list[float] | None:
  """SentencePiece's score of every token, None of other vocabularies."""
  if field(reader, 'tokenizer.ggml.model') != 'llama':
    return None
  tokens = field(reader, 'tokenizer.ggml.tokens')
  return field(reader, 'tokenizer.ggml.scores') or [0.0] * len(tokens)


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
