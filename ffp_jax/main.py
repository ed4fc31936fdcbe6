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
from ffp_jax.runtime import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'File of settings; each key can be overridden, see --help_config.',
)
cli.define_processes()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run, to make or to resume.'
)


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; refuses what doesn't go together."""
  if not any(x.startswith('--config=') or x == '--config' for x in argv):
    argv = [argv[0], f'--config={config_lib.__file__}', *argv[1:]]
  rest = cli.parse_flags(argv, workdir='the directory of the run')
  cli.check_processes()
  return rest


def main(argv: list[str]) -> None:
  del argv
  workdir, again = cli.begin_command('ffp_jax.main', flags.FLAGS.workdir)
  # Imported here, so that a wrong flag is refused at once.
  from ffp_jax import prune, report
  from ffp_jax.runtime import sharding

  with cli.report_errors(workdir, again):
    cli.join_processes()
    results = prune.prune_workdir(_CONFIG.value, workdir, command=again)
  if sharding.is_lead_process():
    report.print_run(workdir, results)


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
