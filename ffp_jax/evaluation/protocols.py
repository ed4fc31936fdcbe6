"""Named ways to compute a perplexity, and what a figure says of its own."""

from typing import NamedTuple

import numpy as np

from ffp_jax.errors import RequestError
from ffp_jax.text import windows as windows_lib

NAMES = ('gptq', 'sliding')


class Protocol(NamedTuple):
  """What a perplexity was computed on, and how."""

  name: str  # one of NAMES
  text: str
  split: str  # the part of the text
  context: int  # tokens a window
  stride: int  # tokens from the start of a window to that of the next
  bos: bool  # whether the first window begins with that token
  windows: int
  tokens: int  # scored


def resolve_stride(name: str, context: int, wanted: int | None) -> int:
  """The stride of a protocol: the context (gptq), or half of it (sliding).

  Raises:
    RequestError: `wanted` is another one, and not possible.
  """
  if name == 'gptq':
    if wanted not in (None, context):
      raise RequestError('--stride: only for --protocol=sliding')
    return context
  if wanted is not None and not 1 <= wanted <= context:
    raise RequestError(
      f'--stride: {wanted} is not from 1 to --context, {context}'
    )
  return wanted or context // 2


def full_spans(windows_WxT) -> np.ndarray:
  """Spans [W,2] that score all tokens of each window but the first."""
  count, context = windows_WxT.shape
  return np.tile(np.array([1, context], np.int32), (count, 1))


def arrange_windows(name: str, tokens, context: int, stride: int):
  """Windows of a text, and the span of positions to score in each.

  gptq: as in the scripts of GPTQ, SparseGPT, Wanda and FLAP. The text is
  tokenised once and cut into windows side by side, the ragged end dropped;
  context - 1 tokens of each are scored. There the mean loss of a window is
  multiplied by the context, and the sum divided by windows x context: the
  mean over windows.

  sliding: as in Hugging Face's "Perplexity of fixed-length models", see
  `windows.overlapping`. The mean is over tokens; there a window counts as one
  token less than is scored in it, which hardly differs.

  Args:
    name: of the protocol.
    tokens: [N].
    context: tokens a window.
    stride: from `stride`.

  Returns:
    (token ids [W,T], spans [W,2]); the span's end is one past the last.

  Raises:
    RequestError: there is nothing to score.
  """
  least = context if name == 'gptq' else 2
  if len(tokens) < least:
    raise RequestError(
      f'data: {len(tokens)} tokens are too few to score, {least} are needed; '
      'give more text or a smaller --context'
    )
  if name == 'gptq':
    windows = windows_lib.windows(tokens, context)
    return windows, full_spans(windows)
  return windows_lib.overlapping(tokens, context, stride)


def describe_protocol(
  name, text, split, windows, spans, *, stride, bos
) -> Protocol:
  """The protocol of a figure.

  Args:
    name: of the protocol.
    text, split: in words.
    windows: token ids [W,T].
    spans: what is scored in each, [W,2].
    stride: tokens.
    bos: the tokenizer's beginning-of-sequence id, or None.
  """
  return Protocol(
    name=name,
    text=text,
    split=split,
    context=windows.shape[1],
    stride=stride,
    bos=bool(windows[0, 0] == bos),
    windows=len(windows),
    tokens=int(np.sum(spans @ (-1, 1))),
  )
