"""Tokens to windows; deterministic, disjoint splits."""

from typing import NamedTuple

import numpy as np

from ffp_jax.errors import RequestError


class Splits(NamedTuple):
  """Disjoint windows of tokens, int32 [windows, context]."""

  calibration: np.ndarray
  reward: np.ndarray
  validation: np.ndarray  # chooses the calibration's strength
  heldout: np.ndarray  # only for the final figures


def windows(tokens, context: int) -> np.ndarray:
  """Consecutive windows, int32 [windows, context]; the rest is dropped."""
  count = len(tokens) // context
  tokens = np.asarray(tokens[: count * context], np.int32)
  return tokens.reshape(count, context)


def overlapping(tokens, context: int, stride: int):
  """Windows that start every `stride` tokens, and what to score in each.

  Every token but the first is scored once, with at least context - stride
  tokens before it (or all there are, if fewer). With stride = context the
  first token of each window has none, and isn't scored.

  Args:
    tokens: [N], 2 or more.
    context: tokens a window.
    stride: from 1 to context.

  Returns:
    (int32 windows [W,context], the last one filled up with zeros; int32
    spans [W,2], the first position scored in each and the one past the last).
  """
  count = 1 + -(-max(len(tokens) - context, 0) // stride)
  starts = stride * np.arange(count)
  padded = np.zeros(starts[-1] + context, np.int32)
  padded[: len(tokens)] = tokens
  # A view: copies of long windows at a short stride may not fit.
  windows = np.lib.stride_tricks.sliding_window_view(padded, context)[::stride]
  first = np.where(starts, max(context - stride, 1), 1)
  last = np.minimum(len(tokens) - starts, context)
  return windows, np.stack([first, last], axis=1).astype(np.int32)


def split(all_WxT, *, calibration, reward, validation, heldout, seed) -> Splits:
  """Deals windows out: held-out from the end, the rest shuffled by seed.

  Held-out windows are the same for every seed, and not neighbours of the
  others except at one edge.

  Args:
    all_WxT: from `windows`.
    calibration, reward, validation, heldout: windows wanted.
    seed: of the shuffle.

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
  parts = np.split(order[: ends[-1]], ends[:-1])
  return Splits(*(all_WxT[np.sort(part)] for part in parts), held)
