"""Frequencies of rotary positions, plain or scaled to longer contexts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.json_fields import Fields

KINDS = ('default', 'linear', 'dynamic', 'llama3', 'yarn')
# transformers' default for each missing key.
_DEFAULTS = {'beta_slow': 1.0, 'beta_fast': 32.0, 'truncate': True}


@dataclasses.dataclass(frozen=True)
class Scaling:
  """Describes how frequencies differ from the plain ones, theta ** (-2 i / H).

  A frequency that is not kept is divided by `factor`. 'linear' keeps none,
  'default' all. 'dynamic' keeps all, with a theta that grows with the
  context. 'llama3' and 'yarn' keep frequencies that make at least `fast`
  turns over the trained positions, divide those that make `slow` or fewer,
  and interpolate in between.
  """

  kind: str = 'default'
  factor: float = 1.0
  trained: int = 1  # context in tokens before scaling
  slow: float = 1.0  # turns
  fast: float = 1.0  # turns
  whole: bool = True  # of 'yarn': interpolates between whole dimensions
  amplitude: float = 1.0  # factor of sine and cosine

  def max_context(self, positions: int) -> int:
    """Returns the longest context that these frequencies are meant for.

    Args:
      positions: `max_position_embeddings` of config.json, which is the
        context after scaling for 'llama3', and mostly before it for others.
    """
    match self.kind:
      case 'linear' | 'dynamic':
        return int(positions * self.factor)
      case 'yarn':
        return max(positions, int(self.trained * self.factor))
    return positions


def frequencies(
  scaling: Scaling, theta: float, head_size: int, time: int | np.ndarray
) -> np.ndarray:
  """Returns the radians per position of each pair of a head's dimensions.

  Args:
    scaling: how they differ from the plain ones.
    theta: base of the plain frequencies (arXiv 2104.09864).
    head_size: H, even.
    time: tokens of the context, an integer or [N,1]; only 'dynamic' depends
      on it.

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
  scaling: Scaling,
  theta: float,
  head_size: int,
  positions_BxT: jax.Array,
  longest: int,
) -> jax.Array:
  """Returns the angles in radians by which heads are rotated.

  Args:
    scaling, theta, head_size: as `frequencies` takes them.
    positions_BxT: of the tokens; the last of a row ends its context.
    longest: a bound that all positions are below.

  Returns:
    float32 [B, T, H / 2].
  """
  frequency = frequencies(
    scaling, theta, head_size, np.arange(longest + 1)[:, None]
  )
  if scaling.kind == 'dynamic':
    frequency = jnp.asarray(frequency)[positions_BxT[:, -1:] + 1]
  return positions_BxT[..., None].astype(jnp.float32) * frequency


def _kept_by_turns(s, plain):
  """Returns Llama 3.1's kept shares, linear in turns over trained positions."""
  turns = s.trained * plain / (2.0 * math.pi)
  return np.clip((turns - s.slow) / (s.fast - s.slow), 0.0, 1.0)


def _kept_by_index(s, theta, half):
  """Returns YaRN's kept shares, linear in the dimension.

  The source is arXiv 2309.00071, section 3.2.
  """

  def index(turns):
    """Returns the index whose frequency makes so many turns."""
    return half * math.log(s.trained / (2 * math.pi * turns)) / math.log(theta)

  first, last = index(s.fast), index(s.slow)
  if s.whole:
    first, last = math.floor(first), math.ceil(last)
  # transformers bounds it by the head size, not by half of it.
  first, last = max(first, 0), min(last, 2 * half - 1)
  if first == last:
    last += 0.001
  return 1.0 - np.clip((np.arange(half) - first) / (last - first), 0.0, 1.0)


def _yarn_amplitude(fields: Fields, factor: float) -> float:
  """Returns YaRN's factor of sine and cosine (its section 3.4)."""

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
  """Returns theta and the scaling of a config.json, in its old or new form.

  Args:
    top: the whole file. `rope_scaling` takes precedence over
      `rope_parameters`, and the values in them over `rope_theta` and
      `partial_rotary_factor` of the file.
    head_size: H.

  Raises:
    RequestError: the kind is unknown, or the numbers give no frequencies.
  """
  name = 'rope_scaling' if top.group('rope_scaling') else 'rope_parameters'
  stated = {k: v for k, v in top.group(name).items() if v is not None}
  outer = {k: top.values[k] for k in ('rope_theta', 'partial_rotary_factor')}
  fields = Fields(f'{top.where}: {name}', _DEFAULTS | outer | stated)
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
  smallest = 4 if kind == 'dynamic' else 2
  if head_size % 2 or head_size < smallest:
    raise fields.error(
      f'{kind} positions need an even head size from {smallest}, found '
      f'{head_size}'
    )
  return theta, _read_kind(kind, fields, top)


def _read_kind(kind: str, fields: Fields, top: Fields) -> Scaling:
  """Reads the numbers of one kind of scaling.

  Args:
    kind: one of KINDS.
    fields: the rope section of the file, with defaults.
    top: the whole file.
  """
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
    slow, fast = _read_turns(fields, 'low_freq_factor', 'high_freq_factor')
    return Scaling(kind, factor, trained, slow, fast)
  whole, amplitude = fields.flag('truncate'), _yarn_amplitude(fields, factor)
  slow, fast = _read_turns(fields, 'beta_slow', 'beta_fast')
  return Scaling(kind, factor, trained, slow, fast, whole, amplitude)


def _read_turns(fields, slow_key, fast_key) -> tuple[float, float]:
  slow, fast = fields.number(slow_key), fields.number(fast_key)
  if slow >= fast:
    raise fields.error(
      f'{slow_key} {slow} must be smaller than {fast_key} {fast}'
    )
  return slow, fast
