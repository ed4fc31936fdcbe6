"""Perplexity of a model on a text, by a protocol that is written down."""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ffp_jax.checkpoints.model import Model, ModelFiles
from ffp_jax.evaluation import protocols, scoring
from ffp_jax.text import tokenization


class Windows(NamedTuple):
  """The tokens that a perplexity is of."""

  tokens_WxT: np.ndarray
  spans_Wx2: np.ndarray  # the positions scored of each window
  protocol: protocols.Protocol


def make_windows(
  files: ModelFiles,
  text: tokenization.TokenText,
  *,
  context: int,
  protocol: str = 'gptq',
  stride: int | None = None,
  max_windows: int | None = None,
) -> Windows:
  """Cuts a text into windows by a protocol.

  Args:
    files: of the model; no weight is read.
    text: the text in tokens.
    context: tokens per window.
    protocol: see `protocols.arrange_windows`.
    stride: tokens; None for the protocol's own.
    max_windows: use the first `max_windows * context` tokens only; None for
      all that the text's own protocol has.

  Raises:
    RequestError: the text is too short, or of another tokenizer; or the
      context is beyond the model's positions.
  """
  stride = protocols.resolve_stride(protocol, context, stride)
  tokenization.check_tokens(files.config, text.ids, context)
  limits = [n * context for n in (max_windows, text.windows) if n]
  ids = text.ids[: min(limits, default=None)]
  windows, spans = protocols.arrange_windows(protocol, ids, context, stride)
  cut = len(ids) < len(text.ids)
  part = f'first {len(ids):,} tokens' if cut else 'all'
  used = protocols.describe_protocol(
    protocol,
    text.name,
    f'{part} of {text.extent}',
    windows,
    spans,
    stride=stride,
    bos=text.bos,
  )
  return Windows(windows, spans, used)


def measure(model: Model, texts: Iterable[Windows]) -> Iterator[dict]:
  """Yields perplexity, protocol, seconds and tokens scored a second by text."""
  scorer = scoring.Scorer(model.config)
  for tokens, spans, used in texts:
    scorer(model.params, tokens[:1], spans_Wx2=spans[:1])  # compiles
    start = time.perf_counter()
    mean = scorer(model.params, tokens, spans_Wx2=spans, label='perplexity')
    seconds = time.perf_counter() - start
    yield {
      'ppl': float(np.exp(mean)),
      'protocol': used._asdict(),
      'seconds': round(seconds, 3),
      'tokens_per_second': round(used.tokens / seconds, 1),
    }
