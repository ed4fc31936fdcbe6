"""Every default, and the checks that need no model."""


class RequestError(ValueError):
  """What was asked for can't be done; one line for the user, exit code 2."""
