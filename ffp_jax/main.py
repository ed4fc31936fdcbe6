"""Command line: flags, logging, one call.

python -m ffp_jax.main --config=configs/llama.py --workdir=DIR

Exit codes: 0 done, 2 refused, 74 disk full, 75 stopped by SIGTERM or SIGINT
or by the end of another process of the run; after the last two the same
command goes on.
"""

from absl import app, flags
from ml_collections import config_flags

from ffp_jax.errors import refuse
from ffp_jax.runtime import cli
from ffp_jax.runtime import workdir as workdir_lib

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
  """`cli.parse_flags`, and what the flags of several processes ask for."""
  rest = cli.parse_flags(
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
  workdir, again = cli.begin_command('ffp_jax.main', _WORKDIR.value)
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
