"""Rotary positions of a GGUF file, in the terms of config.json."""

import math

import gguf
import numpy as np

from ffp_jax.checkpoints.gguf_metadata import field
from ffp_jax.errors import RequestError

FACTORS = 'rope_freqs.weight'  # the tensor that frequencies are divided by
# LLaMA 3.1's numbers, which a GGUF file does not state.
_LLAMA3_CONTEXT, _LLAMA3_SLOW, _LLAMA3_FAST = 8192, 1.0, 4.0


def theta(reader: gguf.GGUFReader) -> float:
  """Returns the base of the frequencies."""
  return field(reader, '{arch}.rope.freq_base') or 10000.0


def rope_parameters(reader: gguf.GGUFReader) -> dict:
  """Returns `rope_parameters` of config.json, but for theta.

  Raises:
    RequestError: the file has factors, and they are not LLaMA 3.1's.
  """
  for tensor in reader.tensors:
    if tensor.name == FACTORS:
      return _llama3(theta(reader), tensor.data, reader.data.filename)
  # Without a type, llama.cpp scales linearly, as the oldest files mean it.
  kind = field(reader, '{arch}.rope.scaling.type') or 'linear'
  factor = (
    field(reader, '{arch}.rope.scaling.factor')
    or field(reader, '{arch}.rope.scale_linear')
    or 1.0
  )
  if kind == 'none' or (kind == 'linear' and factor == 1.0):
    return {'rope_type': 'default'}
  rope = {'rope_type': kind, 'factor': factor}
  length = field(reader, '{arch}.rope.scaling.original_context_length')
  if length is not None:
    rope['original_max_position_embeddings'] = length
  attention_factor = field(reader, '{arch}.rope.scaling.attn_factor')
  if kind == 'yarn' and attention_factor is not None:
    rope['attention_factor'] = attention_factor * yarn_amplitude(factor)
  return rope


def yarn_amplitude(factor: float) -> float:
  """Returns YaRN's amplitude, which llama.cpp multiplies by `attn_factor`."""
  return 1.0 + 0.1 * math.log(factor)


def _llama3(theta: float, factors: np.ndarray, path) -> dict:
  """Returns LLaMA 3.1's scaling, if it gives the factors.

  Args:
    theta: base of the frequencies.
    factors: what each frequency is divided by, [H / 2].
    path: of the file, for messages.
  """
  if np.all(factors == 1):
    return {'rope_type': 'default'}
  slow, fast = _LLAMA3_SLOW, _LLAMA3_FAST
  largest = round(float(factors.max()), 3)
  frequency = theta ** (-np.arange(len(factors)) / len(factors))
  turns = _LLAMA3_CONTEXT * frequency / (2 * np.pi)
  kept = np.clip((turns - slow) / (fast - slow), 0, 1)
  expected = 1 / ((1 - kept) / largest + kept)
  if not np.allclose(factors, expected, rtol=1e-3):
    raise RequestError(
      f'{path}: {FACTORS} scales rotary positions '
      'unlike LLaMA 3.1; use the original checkpoint'
    )
  return {
    'rope_type': 'llama3',
    'factor': largest,
    'low_freq_factor': slow,
    'high_freq_factor': fast,
    'original_max_position_embeddings': _LLAMA3_CONTEXT,
  }
