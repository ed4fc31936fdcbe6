"""Perplexity protocols, and the record of the one that a figure is of."""

from typing import NamedTuple

import numpy as np

from ffp_jax.errors import RequestError
from ffp_jax.text import windows as windows_lib

NAMES = ('gptq', 'sliding')


class Protocol(NamedTuple):
  """The text and the method that a perplexity was computed with."""

  name: str  # one of NAMES
  text: str
  split: str  # the part of the text
  context: int  # tokens per window
  stride: int  # tokens between the starts of neighbouring windows
  bos: bool  # whether the first window begins with the BOS token
  windows: int  # number of windows
  tokens: int  # number of tokens scored


def resolve_stride(name: str, context: int, wanted: int | None) -> int:
  """Returns the stride of a protocol, in tokens.

  Args:
    name: of the protocol.
    context: tokens per window.
    wanted: the stride that was asked for; None for the protocol's own, which is
      the context for gptq and half of it for sliding.

  Raises:
    RequestError: the protocol does not allow the wanted stride.
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


def full_spans(windows_WxT: np.ndarray) -> np.ndarray:
  """Returns spans that score all tokens of a window but its first, [W,2]."""
  count, context = windows_WxT.shape
  return np.tile(np.array([1, context], np.int32), (count, 1))


def arrange_windows(
  name: str, tokens: np.ndarray, context: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts a text into windows, and returns the positions to score in each.

  gptq: as in the scripts of GPTQ, SparseGPT, Wanda and FLAP. The text is
  tokenised once and cut into adjacent windows, without the remainder at its
  end; context - 1 tokens of each are scored. Those scripts multiply the mean
  loss of a window by the context, and divide the sum by windows x context,
  which is the mean over windows.

  sliding: as in Hugging Face's "Perplexity of fixed-length models", see
  `windows.overlapping`. The mean is over tokens; there a window has the weight
  of one token less than is scored in it, which makes hardly any difference.

  Args:
    name: of the protocol.
    tokens: token ids of the text, [N].
    context: tokens per window.
    stride: from `resolve_stride`.

  Returns:
    (token ids [W,T], spans [W,2]). A span is the first position scored, and the
    one after the last.

  Raises:
    RequestError: the text is too short.
  """
  minimum = context if name == 'gptq' else 2
  if len(tokens) < minimum:
    raise RequestError(
      f'data: {len(tokens)} tokens are too few to score, {minimum} are needed; '
      'give more text or a smaller --context'
    )
  if name == 'gptq':
    windows = windows_lib.windows(tokens, context)
    return windows, full_spans(windows)
  return windows_lib.overlapping(tokens, context, stride)


def describe_protocol(
  name: str,
  text: str,
  split: str,
  windows: np.ndarray,
  spans: np.ndarray,
  *,
  stride: int,
  bos: int | None,
) -> Protocol:
  """Returns the record of the protocol that a figure is computed with.

  Args:
    name: of the protocol.
    text, split: names of the text and of the part of it.
    windows: token ids [W,T].
    spans: positions scored in each window, [W,2].
    stride: tokens between the starts of neighbouring windows.
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
