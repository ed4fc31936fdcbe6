"""The console command: `ffp-jax prune --workdir=DIR` is `ffp_jax.main`."""

import runpy
import sys

from ffp_jax.errors import refuse

COMMANDS = {
  'prune': 'ffp_jax.main',
  'recover': 'ffp_jax.recover',
  'frontier': 'ffp_jax.frontier',
  'evaluate': 'ffp_jax.evaluate',
  'generate': 'ffp_jax.generate',
  'export': 'ffp_jax.export',
  'report': 'ffp_jax.report',
  'compare': 'ffp_jax.compare',
  'plan': 'ffp_jax.plan',
}


def main() -> None:
  """Runs the command that the first argument names, with the others."""
  _, *arguments = sys.argv
  if not arguments or arguments[0] not in COMMANDS:
    refuse(f'usage: ffp-jax {"|".join(COMMANDS)} [--help] --NAME=VALUE ...')
  command, *rest = arguments
  sys.argv = [f'ffp-jax {command}', *rest]
  runpy.run_module(COMMANDS[command], run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
