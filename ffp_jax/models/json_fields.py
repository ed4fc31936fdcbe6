"""Typed access to a JSON object, with one-line errors."""

import dataclasses
import sys
from collections.abc import Iterable
from typing import TypeVar

from ffp_jax.errors import RequestError

_Default = TypeVar('_Default', int, None)


@dataclasses.dataclass(frozen=True)
class Fields:
  """Reads the values of a JSON object by type.

  Every getter raises RequestError if the key is missing (but for `optional`
  and `group`) or the value is not of the type.
  """

  where: str  # the file and the place in it, for messages
  values: dict

  def error(self, problem: str) -> RequestError:
    """Returns the error that names the file and the problem."""
    return RequestError(f'{self.where}: {problem}')

  def given(self, key: str) -> bool:
    """Returns whether a key is neither absent nor null."""
    return self.values.get(key) is not None

  def _value(self, key, types, expected):
    if key not in self.values:
      raise self.error(f'{key!r} is missing')
    value = self.values[key]
    # Python counts a bool as an integer, JSON does not.
    if not isinstance(value, types) or isinstance(value, bool) != (
      types is bool
    ):
      raise self.error(f'{key} must be {expected}, found {value!r}')
    return value

  def integer(self, key: str) -> int:
    """Returns a positive integer below 2**31."""
    value = self._value(key, int, 'a positive integer')
    if not 1 <= value < 2**31:
      raise self.error(f'{key} must be a positive integer, found {value}')
    return value

  def optional(self, key: str, default: _Default) -> int | _Default:
    """Returns a positive integer, or the default if it is absent or null."""
    return self.integer(key) if self.given(key) else default

  def number(self, key: str) -> float:
    """Returns a positive finite number."""
    value = self._value(key, (int, float), 'a positive number')
    if not 0 < value <= sys.float_info.max:
      raise self.error(f'{key} must be a positive number, found {value}')
    return float(value)

  def flag(self, key: str) -> bool:
    """Returns a boolean."""
    if key in self.values and self.values[key] is None:
      raise self.error(f'{key} is null; write true or false, or remove it')
    return self._value(key, bool, 'true or false')

  def choice(self, key: str, options: Iterable[str]) -> str:
    """Returns a string that is one of the options."""
    known = ', '.join(options)
    value = self._value(key, str, f'one of {known}')
    if value not in options:
      raise self.error(f'{key} {value!r} is not supported; use one of {known}')
    return value

  def group(self, key: str) -> dict:
    """Returns an inner object, empty if it is absent or null."""
    if not self.given(key):
      return {}
    return self._value(key, dict, 'an object')

  def integers(self, key: str, *, length: int, most: int) -> tuple[int, ...]:
    """Returns a list of `length` integers from 0 to `most`."""
    expected = f'{length} integers from 0 to {most}'
    value = self._value(key, list, expected)
    valid = all(type(x) is int and 0 <= x <= most for x in value)
    if len(value) != length or not valid:
      raise self.error(f'{key} must be {expected}, found {value!r}')
    return tuple(value)
