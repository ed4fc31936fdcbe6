"""Saves the state and exits promptly when a run is told to stop."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from typing import NoReturn

EXIT_CODE = 75  # EX_TEMPFAIL: the same command resumes the run
_saves: list[Callable[[], None]] = []


@contextlib.contextmanager
def save_on_signal(save: Callable[[], None]) -> Generator[None, None, None]:
  """Registers a function to call, in another thread, before a signal's exit."""
  _saves.append(save)
  try:
    yield
  finally:
    _saves.remove(save)


def exit_resumable(message: str) -> NoReturn:
  """Prints one line and exits with EXIT_CODE, without any clean-up."""
  line = f'ffp_jax: {" ".join(message.split())}'
  print(line, file=sys.stderr, flush=True)
  os._exit(EXIT_CODE)


def exit_on_signals(command: str) -> None:
  """Makes SIGTERM and SIGINT save, print one line and exit with EXIT_CODE.

  A thread does this, because Python runs no signal handler while the main
  thread waits for a device or a compiler, which may take minutes. The main
  thread is not stopped first, as if the process were killed.

  Args:
    command: the command that resumes the run, for the printed line.
  """
  reader, writer = socket.socketpair()
  # The thread's default arguments keep both ends open.
  writer.setblocking(False)
  signal.set_wakeup_fd(writer.fileno())
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)

  def wait(reader=reader, writer=writer):
    name = signal.Signals(reader.recv(1)[0]).name
    saved = 'saved'
    try:
      for save in _saves:
        save()
    except Exception as error:  # the checkpoint before it is still there
      saved = f'could not save ({" ".join(str(error).split())[:200]})'
    exit_resumable(f'{name}: {saved}; go on with: {command}')

  threading.Thread(target=wait, daemon=True).start()
