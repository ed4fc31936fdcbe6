"""The one error that a user can mend, and how a command reports it."""

import sys


class RequestError(ValueError):
  """What was asked for can't be done; one line for the user, exit code 2."""


def refuse(problem, code=2):
  """One line on stderr, exit code 2 unless it is no fault of the request."""
  print(f'ffp_jax: {" ".join(str(problem).split())}', file=sys.stderr)
  sys.exit(code)
