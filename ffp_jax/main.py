"""The command that prunes a model: flags, log, one call.

python -m ffp_jax.main --config=configs/llama.py --workdir=DIR

Without --config the settings are the defaults of config.py.

Exit codes: 0 done, 2 refused, 74 disk full, 75 stopped by SIGTERM or SIGINT
or by the end of another process of the run; after the last two the same
command goes on.
"""

from absl import app, flags
from ml_collections import config_flags

from ffp_jax import config as config_lib
from ffp_jax.errors import refuse
from ffp_jax.runtime import cli
from ffp_jax.runtime import workdir as workdir_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'File of settings; each key can be overridden, see --help_config.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  "Address of a run by several processes: 'auto' on TPU slices and Slurm, "
  'else the HOST:PORT of process 0.',
)
_PROCESSES = flags.DEFINE_integer(
  'processes', None, 'Number of processes, with --coordinator=HOST:PORT.'
)
_PROCESS = flags.DEFINE_integer(
  'process', None, 'Index of this process, from 0, with --processes.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run, to make or to resume.'
)


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; refuses what doesn't go together."""
  if not any(x.startswith('--config=') or x == '--config' for x in argv):
    argv = [argv[0], f'--config={config_lib.__file__}', *argv[1:]]
  rest = cli.parse_flags(argv, workdir='the directory of the run')
  named = _COORDINATOR.value not in (None, 'auto')
  if {_PROCESSES.present > 0, _PROCESS.present > 0} != {named}:
    refuse('--coordinator=HOST:PORT goes with --processes=N and --process=I')
  return rest


def main(argv: list[str]) -> None:
  del argv
  workdir, again = cli.begin_command('ffp_jax.main', flags.FLAGS.workdir)
  # Imported here, so that a wrong flag is refused at once.
  from ffp_jax import prune, report
  from ffp_jax.runtime import sharding

  with cli.report_errors(workdir, again):
    if _COORDINATOR.value:
      sharding.join_processes(
        _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
      )
    results = prune.prune_workdir(_CONFIG.value, workdir, command=again)
  if not sharding.is_lead_process():
    return
  print(
    report.summary(
      results, workdir_lib.Workdir(workdir).read_json('allocation.json')
    )
  )
  print(f'\nmodel       {workdir / "pruned"}')
  print(f'report      {workdir / "report.html"}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
