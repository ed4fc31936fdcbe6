"""Command line: flags, logging, one call.

python -m ffp_jax.main --config=configs/llama.py --workdir=DIR
"""

import pathlib
import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file('config')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')


def parse(argv):
  """Flags, or one line and exit code 2."""
  try:
    flags.FLAGS(argv)
    flags.mark_flags_as_required(['config', 'workdir'])
  except (
    flags.Error,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    OSError,
  ) as error:
    refuse(error)
  return argv[:1]


def refuse(error):
  line = ' '.join(str(error).split())
  print(f'ffp_jax: {line}', file=sys.stderr)
  sys.exit(2)


def main(argv):
  del argv
  # Imported here, so that a wrong flag is refused at once.
  from ffp_jax import prune, report
  from ffp_jax.book import Book
  from ffp_jax.config import RequestError

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


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
