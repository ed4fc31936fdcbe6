"""Rotary position frequencies, plain or stretched to longer contexts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.json_fields import Fields

KINDS = ('default', 'linear', 'dynamic', 'llama3', 'yarn')
# What transformers takes for a key that is not stated.
_ABSENT = {'beta_slow': 1.0, 'beta_fast': 32.0, 'truncate': True}


@dataclasses.dataclass(frozen=True)
class Scaling:
  """How frequencies depart from the plain ones, theta ** (-2 i / H).

  A frequency that is not kept is divided by `factor`. 'linear' keeps none,
  'default' all; 'dynamic' keeps all of a theta that grows with the context.
  'llama3' and 'yarn' keep those that make at least `fast` turns over the
  trained positions, none that make `slow` or fewer, and blend in between.
  """

  kind: str = 'default'
  factor: float = 1.0
  trained: int = 1  # positions before stretching
  slow: float = 1.0
  fast: float = 1.0
  whole: bool = True  # yarn: blend between whole dimensions
  amplitude: float = 1.0  # of sine and cosine

  def reach(self, positions: int) -> int:
    """Returns how many positions these frequencies are meant for.

    Args:
      positions: `max_position_embeddings` of config.json. Those of 'llama3'
        count the stretched ones; others mostly the trained ones.
    """
    match self.kind:
      case 'linear' | 'dynamic':
        return int(positions * self.factor)
      case 'yarn':
        return max(positions, int(self.trained * self.factor))
    return positions


def frequencies(
  scaling: Scaling, theta: float, head_size: int, time
) -> np.ndarray:
  """Radians a position, of each pair of a head's dimensions.

  Args:
    scaling: which kind, with its numbers.
    theta: base of the plain frequencies (arXiv 2104.09864).
    head_size: H, even.
    time: tokens of the context, an integer or [N,1]; only 'dynamic' looks at
      it.

  Returns:
    float32 [H / 2], or [N, H / 2] for each of N contexts.
  """
  s = scaling
  if s.kind == 'dynamic':
    stretch = 1.0 + s.factor * np.maximum(time / s.trained - 1.0, 0.0)
    theta = theta * stretch ** (head_size / (head_size - 2))
  plain = theta ** (-np.arange(0, head_size, 2) / head_size)
  match s.kind:
    case 'linear':
      kept = 0.0
    case 'llama3':
      kept = _kept_by_turns(s, plain)
    case 'yarn':
      kept = _kept_by_index(s, theta, head_size // 2)
    case _:
      kept = 1.0
  return (plain * (kept + (1.0 - kept) / s.factor)).astype(np.float32)


def angles(
  scaling: Scaling, theta: float, head_size: int, at_BxT, longest: int
) -> jax.Array:
  """Radians by which heads at these positions are turned.

  Args:
    scaling, theta, head_size: as `frequencies` takes them.
    at_BxT: positions of the tokens; the last of a row ends its context.
    longest: the last position is smaller than this.

  Returns:
    float32 [B, T, H / 2].
  """
  turns = frequencies(
    scaling, theta, head_size, np.arange(longest + 1)[:, None]
  )
  if scaling.kind == 'dynamic':
    turns = jnp.asarray(turns)[at_BxT[:, -1:] + 1]
  return at_BxT[..., None].astype(jnp.float32) * turns


def _kept_by_turns(s, plain):
  """Llama 3.1's blend, linear in the turns over the trained positions."""
  turns = s.trained * plain / (2.0 * math.pi)
  return np.clip((turns - s.slow) / (s.fast - s.slow), 0.0, 1.0)


def _kept_by_index(s, theta, half):
  """YaRN's blend, linear in the dimension (arXiv 2309.00071, section 3.2)."""

  def index(turns):
    """Where a frequency makes so many turns over the trained positions."""
    return half * math.log(s.trained / (2 * math.pi * turns)) / math.log(theta)

  first, last = index(s.fast), index(s.slow)
  if s.whole:
    first, last = math.floor(first), math.ceil(last)
  # The upper bound is the head size, not half of it, in every checkpoint.
  first, last = max(first, 0), min(last, 2 * half - 1)
  if first == last:
    last += 0.001
  return 1.0 - np.clip((np.arange(half) - first) / (last - first), 0.0, 1.0)


def _yarn_amplitude(fields: Fields, factor: float) -> float:
  """What keeps attention as sharp as before (section 3.4)."""

  def amplitude(scale):
    return 1.0 + 0.1 * scale * math.log(max(factor, 1.0))

  if fields.given('attention_factor'):
    return fields.number('attention_factor')
  if fields.given('mscale') and fields.given('mscale_all_dim'):
    return amplitude(fields.number('mscale')) / amplitude(
      fields.number('mscale_all_dim')
    )
  return amplitude(1.0)


def read_scaling(top: Fields, head_size: int) -> tuple[float, Scaling]:
  """theta and scaling of a config.json, in its new form or its older one.

  Args:
    top: the file; `rope_scaling` wins over `rope_parameters`, and what they
      hold over `rope_theta` and `partial_rotary_factor` beside them.
    head_size: H.

  Raises:
    RequestError: an unknown kind, or numbers that give no frequencies.
  """
  name = 'rope_scaling' if top.group('rope_scaling') else 'rope_parameters'
  stated = {k: v for k, v in top.group(name).items() if v is not None}
  outer = {k: top.values[k] for k in ('rope_theta', 'partial_rotary_factor')}
  fields = Fields(f'{top.where}: {name}', _ABSENT | outer | stated)
  kind = stated.get('rope_type', stated.get('type', 'default'))
  if kind not in KINDS:
    raise fields.error(
      f'rope kind {kind!r} is not supported; use one of {", ".join(KINDS)}'
    )
  if any(isinstance(value, dict) for value in stated.values()):
    raise fields.error('positions that differ by layer are not supported')
  if fields.number('partial_rotary_factor') != 1.0:
    raise fields.error('heads that rotate only in part are not supported')
  theta = fields.number('rope_theta')
  if theta <= 1.0:
    raise fields.error(f'rope_theta must be above 1, found {theta}')
  least = 4 if kind == 'dynamic' else 2
  if head_size % 2 or head_size < least:
    raise fields.error(
      f'{kind} positions need an even head size from {least}, found {head_size}'
    )
  return theta, _scaling(kind, fields, top)


def _scaling(kind: str, fields: Fields, top: Fields) -> Scaling:
  positions = top.integer('max_position_embeddings')
  if kind == 'default':
    return Scaling()
  key = 'original_max_position_embeddings'
  trained = top.optional(key, fields.optional(key, positions))
  if kind == 'yarn' and trained != positions and not fields.given('factor'):
    factor = positions / trained
  else:
    factor = fields.number('factor')
  if kind == 'linear':
    return Scaling(kind, factor)
  if kind == 'dynamic':
    return Scaling(kind, factor, positions)
  if kind == 'llama3':
    slow, fast, rest = 'low_freq_factor', 'high_freq_factor', {}
  else:
    slow, fast = 'beta_slow', 'beta_fast'
    rest = {
      'whole': fields.flag('truncate'),
      'amplitude': _yarn_amplitude(fields, factor),
    }
  slowest, fastest = fields.number(slow), fields.number(fast)
  if slowest >= fastest:
    raise fields.error(
      f'{slow} {slowest} must be smaller than {fast} {fastest}'
    )
  return Scaling(kind, factor, trained, slowest, fastest, **rest)
