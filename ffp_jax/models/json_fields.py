"""A JSON object's values by type, or one line saying what is wrong."""

import dataclasses
import sys

from ffp_jax.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Fields:
  """Every method raises RequestError where the value is not what it says."""

  where: str  # the file, and where in it
  values: dict

  def error(self, problem: str) -> RequestError:
    return RequestError(f'{self.where}: {problem}')

  def given(self, key: str) -> bool:
    """Neither absent nor null."""
    return self.values.get(key) is not None

  def _value(self, key, kinds, wanted):
    if key not in self.values:
      raise self.error(f'{key!r} is missing')
    value = self.values[key]
    # JSON's true is no number, though Python's is.
    if not isinstance(value, kinds) or isinstance(value, bool) != (
      kinds is bool
    ):
      raise self.error(f'{key} must be {wanted}, found {value!r}')
    return value

  def integer(self, key: str) -> int:
    value = self._value(key, int, 'a positive integer')
    if not 1 <= value < 2**31:
      raise self.error(f'{key} must be a positive integer, found {value}')
    return value

  def optional(self, key: str, default) -> int:
    """A positive integer, or a default where it is absent or null."""
    return self.integer(key) if self.given(key) else default

  def number(self, key: str) -> float:
    value = self._value(key, (int, float), 'a positive number')
    if not 0 < value <= sys.float_info.max:
      raise self.error(f'{key} must be a positive number, found {value}')
    return float(value)

  def flag(self, key: str) -> bool:
    if key in self.values and self.values[key] is None:
      raise self.error(f'{key} is null; write true or false, or remove it')
    return self._value(key, bool, 'true or false')

  def choice(self, key: str, options) -> str:
    known = ', '.join(options)
    value = self._value(key, str, f'one of {known}')
    if value not in options:
      raise self.error(f'{key} {value!r} is not supported; use one of {known}')
    return value

  def group(self, key: str) -> dict:
    """An object within, empty where it is absent or null."""
    if not self.given(key):
      return {}
    return self._value(key, dict, 'an object')

  def integers(self, key: str, *, length: int, most: int) -> tuple[int, ...]:
    """A list of so many integers from 1 to `most`."""
    wanted = f'{length} integers from 1 to {most}'
    value = self._value(key, list, wanted)
    fit = all(type(x) is int and 1 <= x <= most for x in value)
    if len(value) != length or not fit:
      raise self.error(f'{key} must be {wanted}, found {value!r}')
    return tuple(value)
