"""Command line: flags, logging, one call.

python -m ffp_jax.main --config=configs/llama.py --workdir=DIR

Exit codes: 0 done, 2 refused, 74 disk full, 75 stopped by SIGTERM or SIGINT
or by the end of another process of the run; after the last two the same
command goes on.
"""

import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from ffp_jax import book, command, signals
from ffp_jax.config import RequestError, refuse

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Settings.')
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  "Of a run by several processes: 'auto' on TPU slices and Slurm, else the "
  'HOST:PORT of process 0.',
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many there are.')
_PROCESS = flags.DEFINE_integer('process', None, 'Which of them this is.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')


def parse(argv):
  """`command.parse`, and what the flags of several processes ask for."""
  rest = command.parse(
    argv,
    config='a file such as configs/llama.py',
    workdir='the directory of the run',
  )
  named = _COORDINATOR.value not in (None, 'auto')
  if {_PROCESSES.present > 0, _PROCESS.present > 0} != {named}:
    refuse('--coordinator=HOST:PORT goes with --processes=N and --process=I')
  return rest


def main(argv):
  del argv
  again = shlex.join(['python', '-m', 'ffp_jax.main', *sys.argv[1:]])
  signals.exit_on_signals(again)
  # Imported here, so that a wrong flag is refused at once.
  import jax

  from ffp_jax import prune, report, sharding

  logging.set_verbosity(logging.INFO)
  # Ours alone: orbax and others speak through absl too.
  logging.get_absl_handler().addFilter(lambda r: 'ffp_jax' in r.pathname)
  workdir = book.place(_WORKDIR.value)
  if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
    cache = str(workdir.resolve().parent / '.compiled')
    jax.config.update('jax_compilation_cache_dir', cache)
  try:
    if _COORDINATOR.value:
      sharding.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    results = prune.run(_CONFIG.value, workdir, command=again)
  except RequestError as error:
    refuse(error)
  except Exception as error:
    if reason := book.disk_full(error):
      refuse(f'{workdir}: {reason}; make room and go on with: {again}', 74)
    if sharding.lost_touch(error):
      signals.leave(
        f'another process of the run has ended ({error}); start all of them '
        f'again, they go on: {again}'
      )
    raise
  if not sharding.leads():
    return
  print(
    report.summary(results, book.Book(workdir).read_json('allocation.json'))
  )
  print(f'\nmodel       {workdir / "pruned"}')
  print(f'report      {workdir / "report.html"}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
