"""A clean and prompt end when a run is told to stop."""

import contextlib
import os
import signal
import socket
import sys
import threading

EXIT_CODE = 75  # EX_TEMPFAIL: the same command goes on
_saves = []


@contextlib.contextmanager
def save_on_signal(save):
  """Has `save()` called, from another thread, before a signal ends this."""
  _saves.append(save)
  try:
    yield
  finally:
    _saves.remove(save)


def exit_resumable(message: str):
  """Prints one line and exits with EXIT_CODE, waiting for nobody."""
  line = f'ffp_jax: {" ".join(message.split())}'
  print(line, file=sys.stderr, flush=True)
  os._exit(EXIT_CODE)


def exit_on_signals(command: str):
  """Makes SIGTERM and SIGINT save, print one line and exit with EXIT_CODE.

  A thread does it, as Python runs no handler while the main thread waits for
  a device or a compiler, which may take minutes. Whatever that thread was
  doing is dropped, just as if the process were killed.

  Args:
    command: how to go on, for the line.
  """
  reader, writer = socket.socketpair()
  # Both ends stay open for as long as the thread that holds them.
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
    except Exception as error:  # the checkpoint before is as good as ever
      saved = f'could not save ({" ".join(str(error).split())[:200]})'
    exit_resumable(f'{name}: {saved}; go on with: {command}')

  threading.Thread(target=wait, daemon=True).start()
