"""How commands read their flags."""

from absl import flags

from ffp_jax.config import refuse


def parse(argv, **required):
  """Reads the flags; refuses what isn't one, before any heavy import.

  Args:
    argv: of the process.
    **required: flag to what to give, for those that can't be left out.

  Returns:
    The name of the program, alone in a list.
  """
  try:
    rest = flags.FLAGS(argv)
    if 'config' in flags.FLAGS and flags.FLAGS['config'].present:
      _ = flags.FLAGS.config.model  # a file that didn't load fails here
  except (AttributeError, KeyError) as error:
    key = str(error).strip('"\'')
    refuse(f'--config: no key {key!r}; see ffp_jax/config.py')
  except (flags.Error, OSError, TypeError, ValueError) as error:
    refuse(error)
  for name, give in required.items():
    if not (flags.FLAGS[name].present and flags.FLAGS[name].value):
      refuse(f'--{name} is missing; give {give}')
  if len(rest) > 1:
    refuse(f'unknown argument {rest[1]!r}; options are --NAME=VALUE')
  return rest
