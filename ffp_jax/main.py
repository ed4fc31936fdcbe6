"""Command line: flags, logging, one call.

python -m ffp_jax.main --config=configs/llama.py --workdir=DIR
"""

import pathlib
import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from ffp_jax.config import RequestError, refuse

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Settings.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')


def parse(argv):
  """Reads the flags; refuses what isn't one, before any heavy import."""
  try:
    rest = flags.FLAGS(argv)
    if flags.FLAGS['config'].present:
      _ = _CONFIG.value.model  # a file that didn't load fails here
  except (AttributeError, KeyError) as error:
    key = str(error).strip('"\'')
    refuse(f'--config: no key {key!r}; see ffp_jax/config.py')
  except (flags.Error, OSError, TypeError, ValueError) as error:
    refuse(error)
  if not flags.FLAGS['config'].present:
    refuse('--config is missing; give a file such as configs/llama.py')
  if not _WORKDIR.value:
    refuse('--workdir is missing; give the directory of the run')
  if len(rest) > 1:
    refuse(f'unknown argument {rest[1]!r}; options are --NAME=VALUE')
  return rest


def main(argv):
  del argv
  # Imported here, so that a wrong flag is refused at once.
  from ffp_jax import prune, report
  from ffp_jax.book import Book

  logging.set_verbosity(logging.INFO)
  # Ours alone: orbax and others speak through absl too.
  logging.get_absl_handler().addFilter(lambda r: 'ffp_jax' in r.pathname)
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  command = shlex.join(['python', '-m', 'ffp_jax.main', *sys.argv[1:]])
  try:
    results = prune.run(_CONFIG.value, workdir, command=command)
  except RequestError as error:
    refuse(error)
  print(report.summary(results, Book(workdir).read_json('allocation.json')))
  print(f'\nmodel       {workdir / "pruned"}')
  print(f'report      {workdir / "report.html"}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
