"""Runs that are killed, stopped, damaged or short of room, then gone on with.

In processes of their own wherever it is the process that ends.
"""

import functools
import json
import os
import pathlib
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from ffp_jax import prune
from ffp_jax.checkpoints import model_config, weights
from ffp_jax.errors import RequestError
from ffp_jax.pruning import search, sublayers
from ffp_jax.runtime import run_state, signals, storage
from ffp_jax.runtime import workdir as workdir_lib
from ffp_jax.runtime.workdir import Workdir
from tests import kill, tiny_run

_ROOT = pathlib.Path(__file__).parent.parent
_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_CONFIG = """
from tests import tiny_run


def get_config():
  return tiny_run.config(**tiny_run.RECOVERY)
"""


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


@functools.cache
def _inputs() -> dict:
  folder = pathlib.Path(_FOLDER.name)
  (folder / 'config.py').write_text(_CONFIG)
  return tiny_run.inputs(folder)


def _config(**overrides):
  return tiny_run.config(**(_inputs() | tiny_run.RECOVERY | overrides))


@functools.cache
def _finished() -> pathlib.Path:
  """Workdir of a run that nothing disturbed."""
  workdir = pathlib.Path(_FOLDER.name) / 'finished'
  kill.undisturbed(_config(), workdir)
  return workdir


def _run(workdir, **overrides):
  return prune.prune_workdir(_config(**overrides), workdir, command='')


def _wait(condition, process):
  """Until `condition()`; fails if the process ends before."""
  deadline = time.monotonic() + 300
  while not condition():
    if process() is not None or time.monotonic() > deadline:
      raise AssertionError('ended, or took too long')
    time.sleep(0.01)


class _Killed(Exception):
  pass


def _unexpected(*_, **__):
  raise AssertionError('weights were loaded')


class _TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.workdir = self.folder / 'run'

  def assert_as_undisturbed(self):
    got, expected = kill.outcome(self.workdir), kill.outcome(_finished())
    for name in got._fields:
      self.assertEqual(getattr(got, name), getattr(expected, name), name)

  def interrupt(self, step, **overrides):
    """A run that ends as soon as it has written a step's metrics."""
    real = Workdir.append

    def append(files, line, *args):
      real(files, line, *args)
      if line['step'] == step:
        raise _Killed

    with mock.patch.object(Workdir, 'append', append):
      with self.assertRaises(_Killed):
        _run(self.workdir, **overrides)


class KilledTest(_TestCase):
  def test_as_undisturbed(self):
    _finished()
    log = self.workdir.with_suffix('.log')
    source = np.random.default_rng()
    self.workdir.mkdir()
    metrics = self.workdir / 'metrics.jsonl'
    recovery = self.workdir / 'recovery.jsonl'

    def stage(name):
      return f'{name}: start' in log.read_text()

    for ready in (
      lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2,
      lambda: stage('calibrate'),
      lambda: stage('save'),
      lambda: recovery.exists() and recovery.read_text().count('\n') > 4,
    ):
      log.write_text('')
      process = kill.launch(_config(), self.workdir)
      _wait(ready, lambda process=process: process.exitcode)
      time.sleep(source.uniform(0.0, 0.1))
      process.kill()
      process.join()
    kill.undisturbed(_config(), self.workdir)
    self.assert_as_undisturbed()
    hidden = [p for p in self.workdir.iterdir() if p.name.startswith('.')]
    self.assertEmpty(hidden)


class CommandTest(_TestCase):
  """The whole command, as a shell sees it."""

  def start(self, *arguments, blocks='unlimited'):
    """The command, its files no larger than so many KiB."""
    _inputs()
    arguments = [
      '-m',
      'ffp_jax.main',
      f'--config={_FOLDER.name}/config.py',
      f'--workdir={self.workdir}',
      *(f'--config.{key}={value}' for key, value in _inputs().items()),
      *arguments,
    ]
    self.command = shlex.join(['python', *arguments])
    limit = 'ulimit -f "$0" && exec "$@"'
    process = subprocess.Popen(
      ['bash', '-c', limit, blocks, sys.executable, *arguments],
      cwd=_ROOT,
      env=os.environ | tiny_run.ENVIRONMENT,
      stderr=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.addCleanup(process.kill)
    return process

  def assert_stops(self, process):
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    self.assertEqual(process.returncode, signals.EXIT_CODE, said)
    self.assertNotIn('Traceback', said)
    self.assertEqual(
      said.splitlines()[-1],
      f'ffp_jax: SIGTERM: saved; go on with: {self.command}',
    )

  def assert_out_of_room(self, process):
    said = process.communicate(timeout=300)[1]
    self.assertEqual(process.returncode, 74, said)
    self.assertNotIn('Traceback', said)
    line = f'ffp_jax: {self.workdir}: File too large; make room and go on with'
    self.assertStartsWith(said.splitlines()[-1], line)

  def test_stopped_and_out_of_room(self):
    long = (
      '--config.search.steps=(2, 100000)',
      '--config.checkpoint.every=100000',
    )
    process = self.start(*long)
    metrics = self.workdir / 'metrics.jsonl'
    _wait(
      lambda: metrics.exists() and metrics.read_text().count('\n') > 3,
      process.poll,
    )
    # A second one is refused and does the first no harm.
    second = self.start(*long)
    said = second.communicate(timeout=300)[1]
    self.assertEqual(second.returncode, 2, said)
    self.assertIn(f'another process is at work in {self.workdir}', said)

    self.assert_stops(process)
    checkpoints = self.workdir / 'checkpoints'
    step = run_state.newest_state(checkpoints)['step']
    # Nothing is due between the end of the first stage and that of the second.
    self.assertGreater(step, 2)
    self.assertBetween(metrics.read_text().count('\n'), step, step + 2)

    room = metrics.stat().st_size // 1024 + 2
    self.assert_out_of_room(self.start(*long, blocks=str(room)))
    self.assertEqual(run_state.newest_state(checkpoints)['step'], step)

  def test_stopped_and_out_of_room_in_recovery(self):
    long = (
      '--config.recovery.tokens=32000000',
      '--config.recovery.every=6400',
      '--config.recovery.learning_rate=0.0',
    )
    process = self.start(*long)
    metrics = self.workdir / 'recovery.jsonl'
    _wait(
      lambda: metrics.exists() and metrics.read_text().count('\n') > 3,
      process.poll,
    )
    self.assert_stops(process)
    checkpoints = self.workdir / 'recovery' / 'checkpoints'
    step = run_state.steps_in(checkpoints)[-1]
    last = json.loads(metrics.read_text().splitlines()[-1])
    self.assertEqual(last['step'], step)

    room = metrics.stat().st_size // 1024 + 100  # no checkpoint has so little
    self.assert_out_of_room(self.start(*long, blocks=str(room)))
    self.assertEqual(run_state.steps_in(checkpoints)[-1], step)


class SignalTest(parameterized.TestCase):
  @parameterized.product(
    number=(signal.SIGTERM, signal.SIGINT), fails=(False, True)
  )
  def test_prompt_though_python_is_not_running(self, number, fails):
    code = """if True:
      import hashlib, sys
      from ffp_jax.runtime import signals

      def save():
        print('saves', flush=True)
        if FAILS:
          raise OSError('no room')

      signals.exit_on_signals('THE COMMAND')
      with signals.save_on_signal(save):
        print('ready', flush=True)
        hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)
    """.replace('FAILS', str(fails))
    process = subprocess.Popen(
      [sys.executable, '-c', code],
      cwd=_ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self.addCleanup(process.kill)
    self.assertEqual(process.stdout.readline(), 'ready\n')
    process.send_signal(number)
    out, said = process.communicate(timeout=30)
    self.assertEqual(process.returncode, 75)
    self.assertEqual(out, 'saves\n')
    saved = 'could not save (no room)' if fails else 'saved'
    self.assertEqual(
      said, f'ffp_jax: {number.name}: {saved}; go on with: THE COMMAND\n'
    )


class DamagedTest(_TestCase):
  def test_newest_checkpoint(self):
    self.interrupt(4)
    before = workdir_lib.Workdir(self.workdir).seconds
    newest = self.workdir / 'checkpoints' / '4'
    largest = max(newest.rglob('*'), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with self.assertLogs('absl', 'WARNING') as logs:
      results = _run(self.workdir, **{'checkpoint.keep': 5})
    said = [line for line in logs.output if 'damaged' in line]
    self.assertLen(said, 1)
    self.assertIn(str(newest), said[0])
    self.assert_as_undisturbed()
    # A setting that may change, and has.
    kept = sorted(p.name for p in (self.workdir / 'checkpoints').iterdir())
    self.assertEqual(kept, ['2', '4', '6'])
    written = json.loads((self.workdir / 'config.json').read_text())
    self.assertEqual(written['checkpoint']['keep'], 5)
    # The time of both processes.
    self.assertContainsSubset(['load', 'search'], before)
    for stage, seconds in before.items():
      self.assertGreater(results['seconds'][stage], seconds)

  @parameterized.parameters('all', 'content')
  def test_no_checkpoint_left(self, gone):
    self.interrupt(0)
    metrics = (self.workdir / 'metrics.jsonl').read_bytes()
    checkpoints = self.workdir / 'checkpoints'
    shutil.rmtree(checkpoints)
    if gone == 'content':
      (checkpoints / '0').mkdir(parents=True)
    with mock.patch.object(weights, 'load_params', _unexpected):
      with self.assertRaisesRegex(
        RequestError, rf'\Aworkdir: .*{self.workdir}'
      ):
        _run(self.workdir)
    self.assertEqual((self.workdir / 'metrics.jsonl').read_bytes(), metrics)


class FullDiskTest(_TestCase):
  def test_weights(self):
    path = self.folder / 'x.safetensors'
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
      with self.assertRaises(Exception) as caught:
        safetensors.numpy.save_file({'x': np.zeros(100)}, path)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
    self.assertEqual(storage.disk_full(caught.exception), 'File too large')

  def test_by_cause(self):
    error = ValueError('a library')
    error.__cause__ = OSError(28, os.strerror(28))
    self.assertEqual(storage.disk_full(error), 'No space left on device')
    self.assertIsNone(storage.disk_full(OSError(2, os.strerror(2))))


class InitFromTest(_TestCase):
  def test_begins_with_the_policy_of_the_other(self):
    other, goal = _finished(), {'budget.sparsity': 0.4}
    config = {**goal, 'search.init_from': str(other), 'search.steps': (0, 1)}
    real = search.steps

    def steps(*args):
      self.state = args[6]
      return real(*args)

    with mock.patch.object(search, 'steps', steps):
      _run(self.workdir, **config)
    saved = run_state.newest_state(other / 'checkpoints')
    for name in ('mean', 'log_std'):
      np.testing.assert_array_equal(
        self.state.params[name], saved['params'][name]
      )
    self.assertEqual(int(self.state.step), 0)
    self.assertFalse(np.isfinite(self.state.elites.reward_M).any())
    # Its mean is what is proposed, at the new sparsity.
    model = model_config.read_model_config(pathlib.Path(_inputs()['model']))
    table = sublayers.find_sublayers(model, round_heads=1, round_ffn=2, floor=1)
    net, _ = search.make_policy(_config(**config), table)
    at = jnp.float32(0.4)
    mean_S = net.apply({'params': self.state.params}, at).mean_S
    prior_S = search.initial_priorities(table, 4.0)
    self.assertGreater(np.abs(mean_S - prior_S).max(), 0.01)

  def test_a_begun_search_does_without_the_other(self):
    other = self.folder / 'other'
    shutil.copytree(_finished(), other)
    changes = {'search.init_from': str(other), 'budget.sparsity': 0.3}
    self.interrupt(0, **changes)
    shutil.rmtree(other)
    self.interrupt(1, **changes)
    self.assertLen(storage.read_json_lines(self.workdir / 'metrics.jsonl'), 2)

  def test_refused(self):
    small = self.folder / 'model'
    tiny_run.write_model(small, num_hidden_layers=2)
    for pattern, changes in (
      ('6 sublayers.* 4', {'model': str(small)}),
      ('policy.hidden', {'policy.hidden': (9,)}),
      ('no checkpoint', {'search.init_from': str(small)}),
    ):
      changes = {'search.init_from': str(_finished())} | changes
      with (
        mock.patch.object(weights, 'load_params', _unexpected),
        self.assertRaisesRegex(
          RequestError, rf'\Asearch.init_from: [^\n]*{pattern}[^\n]*\Z'
        ),
      ):
        _run(self.workdir, **changes)
      self.assertFalse(self.workdir.exists())


if __name__ == '__main__':
  absltest.main()
