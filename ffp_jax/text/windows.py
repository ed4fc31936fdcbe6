"""Windows of tokens, and their disjoint, deterministic splits."""

from typing import NamedTuple

import numpy as np

from ffp_jax.errors import RequestError


class Splits(NamedTuple):
  """Holds disjoint windows of tokens, int32 [W,T] each."""

  calibration: np.ndarray
  reward: np.ndarray
  validation: np.ndarray  # to choose the strength of calibration
  heldout: np.ndarray  # for the final perplexities only
  rest: np.ndarray  # in none of the others


def windows(tokens: np.ndarray, context: int) -> np.ndarray:
  """Returns consecutive windows, int32 [W,T]; the rest is dropped.

  Args:
    tokens: [N].
    context: T.
  """
  count = len(tokens) // context
  tokens = np.asarray(tokens[: count * context], np.int32)
  return tokens.reshape(count, context)


def overlapping(
  tokens: np.ndarray, context: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns windows that start every `stride` tokens, and the spans to score.

  Every token but the first is scored once, with at least context - stride
  tokens before it, or all that there are. With stride = context the first
  token of each window has none before it, and is not scored.

  Args:
    tokens: [N], 2 or more.
    context: T.
    stride: from 1 to context.

  Returns:
    (int32 windows [W,T], the last one padded with zeros; int32 spans [W,2],
    the first position to score in each window, and the one after the last).
  """
  count = 1 + -(-max(len(tokens) - context, 0) // stride)
  starts = stride * np.arange(count)
  padded = np.zeros(starts[-1] + context, np.int32)
  padded[: len(tokens)] = tokens
  # A view, as copies of long windows at a short stride may not fit in memory.
  windows = np.lib.stride_tricks.sliding_window_view(padded, context)[::stride]
  first = np.where(starts, max(context - stride, 1), 1)
  last = np.minimum(len(tokens) - starts, context)
  return windows, np.stack([first, last], axis=1).astype(np.int32)


def split(
  all_WxT: np.ndarray,
  *,
  calibration: int,
  reward: int,
  validation: int,
  heldout: int,
  seed: int,
) -> Splits:
  """Splits windows: held-out ones from the end, the others at random.

  Held-out windows are the same for every seed, and adjoin the others at one
  edge only.

  Args:
    all_WxT: from `windows`.
    calibration, reward, validation, heldout: number of windows of each split.
    seed: of the random choice.

  Raises:
    RequestError: there are too few windows.
  """
  wanted = calibration + reward + validation + heldout
  if len(all_WxT) < wanted:
    raise RequestError(
      f'data: the text has {len(all_WxT)} windows of {all_WxT.shape[1]} '
      f'tokens, the splits ask for {wanted}; give more text, a shorter '
      'text.context or fewer text.*_windows'
    )
  held = all_WxT[len(all_WxT) - heldout :]
  order = np.random.default_rng(seed).permutation(len(all_WxT) - heldout)
  ends = np.cumsum([calibration, reward, validation])
  *parts, rest = (all_WxT[np.sort(x)] for x in np.split(order, ends))
  return Splits(*parts, held, rest)
