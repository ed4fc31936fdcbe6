"""What the commands share: flags, log, exit codes, compiled programs."""

import contextlib
import shlex
import sys

import ml_collections
from absl import flags, logging

from ffp_jax import config as config_lib
from ffp_jax.errors import RequestError, refuse
from ffp_jax.runtime import signals, storage

_COMPILED = '/jax/core/compile/backend_compile_duration'  # event of JAX

_HELP_CONFIG = flags.DEFINE_boolean(
  'help_config', False, 'Print every key of --config with its value and stop.'
)


def parse_flags(argv: list[str], **required: str) -> list[str]:
  """Reads the flags and refuses what isn't one, before any heavy import.

  Args:
    argv: of the process.
    **required: for each flag that can't be left out, what to give for it.

  Returns:
    The name of the program, alone in a list.
  """
  try:
    rest = flags.FLAGS(argv)
    if _HELP_CONFIG.value:
      _print_config()
    if 'config' in flags.FLAGS and flags.FLAGS['config'].present:
      _ = flags.FLAGS.config.model  # a file that didn't load fails here
  except (AttributeError, KeyError) as error:
    key = str(error).strip('"\'')
    refuse(f'--config: no key {key!r}; see --help_config')
  except (flags.Error, OSError, TypeError, ValueError) as error:
    refuse(error)
  for name, give in required.items():
    if not (flags.FLAGS[name].present and flags.FLAGS[name].value):
      refuse(f'--{name} is missing; give {give}')
  if len(rest) > 1:
    refuse(f'unknown argument {rest[1]!r}; options are --NAME=VALUE')
  return rest


def overrides() -> dict:
  """Returns the keys of --config that the command line gives, and values."""
  # ty: ignore[missing-attribute]
  return dict(flags.FLAGS['config'].override_values)


def define_processes() -> None:
  """Defines the flags of a run by several processes."""
  flags.DEFINE_string(
    'coordinator',
    None,
    "Address of a run by several processes: 'auto' on TPU slices and Slurm, "
    'else the HOST:PORT of process 0.',
  )
  flags.DEFINE_integer(
    'processes', None, 'Number of processes, with --coordinator=HOST:PORT.'
  )
  flags.DEFINE_integer(
    'process', None, 'Index of this process, from 0, with --processes.'
  )


def check_processes() -> None:
  """Refuses flags of processes that don't go together."""
  found = flags.FLAGS
  named = found.coordinator not in (None, 'auto')
  if {found['processes'].present > 0, found['process'].present > 0} != {named}:
    refuse('--coordinator=HOST:PORT goes with --processes=N and --process=I')


def join_processes() -> None:
  """Joins the other processes of a run, if the flags say that there are."""
  from ffp_jax.runtime import sharding  # slow to import

  found = flags.FLAGS
  if found.coordinator:
    sharding.join_processes(found.coordinator, found.processes, found.process)


def _print_config():
  """Prints the keys of --config, or the defaults, and ends the process."""
  config = None
  if 'config' in flags.FLAGS:
    config = flags.FLAGS['config'].value
  if not isinstance(config, ml_collections.ConfigDict):
    config = config_lib.defaults()
  print(config_lib.describe_keys(config))
  sys.exit(0)


def begin_command(module: str, workdir: str):
  """What a command that works in a directory and can go on does first.

  Signals end it in order; only this package is logged, as orbax and others
  speak through absl too; what takes long to compile is named there; and
  programs are kept beside the workdir, unless JAX_COMPILATION_CACHE_DIR names
  another place.

  Args:
    module: that was run.
    workdir: its flag.

  Returns:
    (path of the workdir, the command that goes on).
  """
  again = shlex.join(['python', '-m', module, *sys.argv[1:]])
  signals.exit_on_signals(again)
  import jax  # here, so that a wrong flag is refused at once

  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(lambda r: 'ffp_jax' in r.pathname)
  # What has failed is raised; the threads that orbax leaves behind a failed
  # write only say that nobody waits for them.
  sys.unraisablehook = lambda x: logging.debug('%s', x.exc_value)
  jax.monitoring.register_event_duration_secs_listener(log_compilation)
  path = storage.as_path(workdir)
  # ty: ignore[missing-attribute]
  if not jax.config.jax_compilation_cache_dir:
    cache = str(path.resolve().parent / '.compiled')
    jax.config.update('jax_compilation_cache_dir', cache)
  return path, again


def log_compilation(event: str, duration_secs: float, **about) -> None:
  """Logs a program that took a second or more to compile, or to load.

  Args:
    event: of `jax.monitoring`.
    duration_secs: that it took.
    **about: its `fun_name`, the name of the jitted function.
  """
  if event == _COMPILED and duration_secs >= 1.0:
    name = about.get('fun_name', '').removeprefix('jit(').removesuffix(')')
    logging.info('compiled %s in %.1f s', name, duration_secs)


@contextlib.contextmanager
def report_errors(workdir, again: str):
  """One line and an exit code for what is no defect; see main.py for codes.

  Args:
    workdir: of a run that can go on.
    again: the command that goes on.
  """
  try:
    yield
  except RequestError as error:
    refuse(error)
  except Exception as error:
    from ffp_jax.runtime import sharding

    if reason := storage.disk_full(error):
      refuse(f'{workdir}: {reason}; make room and go on with: {again}', 74)
    if sharding.is_peer_failure(error):
      signals.exit_resumable(
        f'another process of the run has ended ({error}); start all of them '
        f'again, they go on: {again}'
      )
    raise
