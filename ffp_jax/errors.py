"""The error that the user can fix, and the exit of a command that meets it."""

import sys
from typing import NoReturn


class RequestError(ValueError):
  """The request cannot be met; its message is one line for the user.

  Raised before heavy work wherever possible. Commands exit with code 2.
  """


def refuse(problem: object, code: int = 2) -> NoReturn:
  """Prints a problem on stderr, on one line, and exits.

  Args:
    problem: an error or a text.
    code: the exit code; 2 says that the request is at fault.
  """
  print(f'ffp_jax: {" ".join(str(problem).split())}', file=sys.stderr)
  sys.exit(code)
