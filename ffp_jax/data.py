"""Text to tokens; deterministic, disjoint splits."""

import json
import pathlib
import pydoc_data.topics
from typing import NamedTuple

import numpy as np

from ffp_jax.config import RequestError


class Splits(NamedTuple):
  """Disjoint windows of tokens, int32 [windows, context]."""

  calibration: np.ndarray
  reward: np.ndarray
  validation: np.ndarray  # chooses the calibration's strength
  heldout: np.ndarray  # only for the final figures


def _pydoc() -> str:
  """Python's own language reference, in English."""
  topics = pydoc_data.topics.topics
  return '\n\n'.join(topics[key] for key in sorted(topics))


def _parquet(path) -> str:
  import pyarrow.parquet  # heavy, and only here

  return '\n\n'.join(pyarrow.parquet.read_table(path)['text'].to_pylist())


def _jsonl(path) -> str:
  lines = path.read_text(encoding='utf-8').split('\n')
  return '\n\n'.join(json.loads(x)['text'] for x in lines if x.strip())


_READERS = {
  '.txt': lambda path: path.read_text(encoding='utf-8'),
  '.jsonl': _jsonl,
  '.parquet': _parquet,
}
BUILTIN = {'pydoc': _pydoc}


def read_text(source: str) -> str:
  """A built-in text or a .txt, .jsonl or .parquet ('text' field) file.

  Raises:
    RequestError: missing, empty or unreadable text.
  """
  if source in BUILTIN:
    return BUILTIN[source]()
  path = pathlib.Path(source).expanduser()
  if path.suffix not in _READERS:
    raise RequestError(
      f'data: {source!r} is neither a built-in text ({", ".join(BUILTIN)}) '
      f'nor a {", ".join(_READERS)} file'
    )
  try:
    text = _READERS[path.suffix](path)
  except FileNotFoundError as error:
    raise RequestError(f'data: no file {source!r}; check the path') from error
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise RequestError(
      f'data: {source!r} is not readable {path.suffix} text ({error})'
    ) from error
  if not text.strip():
    raise RequestError(f'data: {source!r} is empty')
  return text


def windows(tokens, context: int) -> np.ndarray:
  """Consecutive windows, int32 [windows, context]; the rest is dropped."""
  count = len(tokens) // context
  tokens = np.asarray(tokens[: count * context], np.int32)
  return tokens.reshape(count, context)


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
