"""Processes that take turns, so that a drift of the machine's speed hits all.

Each process does one task, so that its peak of memory is its own. This module
imports neither JAX nor PyTorch, for the same reason.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ffp_jax.errors import RequestError, refuse


class Answers(NamedTuple):
  """What one process has answered."""

  facts: dict
  turns: list  # the first one compiles
  last: dict


def serve(
  make: Callable[[], tuple[Callable[[], object], dict]],
  finish: Callable[[], dict],
):
  """Takes a turn in this process for each line of standard input.

  Prints lines of JSON: the facts, what each turn returns, the last words.

  Args:
    make: returns (function that takes one turn, dict of facts).
    finish: returns the last words.
  """
  # Libraries print to standard error, so that answers stay whole.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def answer(value):
    print(json.dumps(value), file=answers, flush=True)

  try:
    run, facts = make()
  except (RequestError, OSError) as error:
    refuse(error)
  answer(facts)
  for _ in sys.stdin:
    answer(run())
  answer(finish())


def take(commands: Sequence[Sequence[str]], repeats: int) -> list[Answers]:
  """Starts processes of `serve`, which take turns, and ends them.

  Args:
    commands: what follows `python -m` for each process.
    repeats: turns of each process after the first.

  Raises:
    RequestError: a process has failed, after printing why.
  """
  workers = [_start(command) for command in commands]
  try:
    facts = [_read(worker) for worker in workers]
    turns = [[] for _ in workers]
    for _ in range(1 + repeats):
      for worker, answers in zip(workers, turns, strict=True):
        worker.stdin.write('\n')
        worker.stdin.flush()
        answers.append(_read(worker))
    last = []
    for worker in workers:
      worker.stdin.close()
      last.append(_read(worker))
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()
  return [Answers(*x) for x in zip(facts, turns, last, strict=True)]


def _start(command):
  """Starts a process of `serve`."""
  return subprocess.Popen(
    (sys.executable, '-m', *command),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    # The processes may share an accelerator.
    env=os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
  )


def _read(worker):
  """Returns the next answer of a process of `serve`."""
  if line := worker.stdout.readline():
    return json.loads(line)
  raise RequestError('a process of the benchmark has failed; see above')


def peak_memory() -> int:
  """Returns the largest resident memory of this process so far, in bytes."""
  scale = 1 if sys.platform == 'darwin' else 1024
  return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
