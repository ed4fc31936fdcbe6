import pathlib
import resource
import shutil
import tempfile
import threading
import time
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.errors import RequestError
from ffp_jax.runtime import run_state, storage


class _Inner(NamedTuple):
  count: jax.Array
  nothing: tuple


class _State(NamedTuple):
  params: dict  # not in the order of their names
  inner: _Inner
  key: jax.Array
  step: jax.Array


def _state(step, device_sublayers=6, hidden=3):
  source = np.random.default_rng(step)

  def draw(*shape):
    return jnp.asarray(source.standard_normal(shape), jnp.float32)

  params = {'mean': draw(device_sublayers), 'add': {'kernel': draw(hidden, 4)}}
  inner = _Inner(jnp.int32(step), ())
  key = jax.random.key_data(jax.random.key(step))
  return _State(params, inner, key, jnp.int32(step))


class _TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.directory = self.folder / 'checkpoints'

  def open(self, every=1, keep=2, ends=(), large=False):
    return run_state.Checkpoints(
      self.directory, every=every, keep=keep, ends=ends, large=large
    )

  def save(self, steps, **options):
    with self.open(**options) as saved:
      for step in steps:
        saved.save(step, _state(step))

  def steps(self):
    return sorted(int(path.name) for path in self.directory.iterdir())

  def assert_restored(self, step):
    got = run_state.restore_state(self.directory, _state(0))
    jax.tree.map(np.testing.assert_array_equal, got, _state(step))
    types = jax.tree.map(lambda x: (type(x), x.dtype), _state(step))
    self.assertEqual(jax.tree.map(lambda x: (type(x), x.dtype), got), types)


class SaveTest(_TestCase):
  def test_what_is_kept(self):
    self.save(range(8), every=3, keep=1, ends=[2, 5])
    self.assertEqual(self.steps(), [2, 5, 6])
    self.assert_restored(6)

  def test_none(self):
    self.assertIsNone(run_state.restore_state(self.directory, _state(0)))
    self.directory.mkdir()
    # Of a process killed while it saved.
    (self.directory / '4.orbax-checkpoint-tmp').mkdir()
    self.assertIsNone(run_state.restore_state(self.directory, _state(0)))
    self.save([1])
    self.assertEqual(self.steps(), [1])

  def test_flush(self):
    with self.open(every=10) as saved:
      saved.flush()
      self.assertEqual(self.steps(), [])
      for step in range(4):
        saved.save(step, _state(step))
      saved.flush()
      saved.flush()
      self.assertEqual(self.steps(), [0, 3])
      self.assert_restored(3)

  def test_a_state_may_be_overwritten_after_it_was_given(self):
    state = _state(1)
    with self.open() as saved:
      saved.save(1, state)
      jax.tree.map(lambda x: x.delete(), state)
      saved.flush()
    self.assert_restored(1)

  def test_full_disk(self):
    self.save([1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
      with self.assertRaises(Exception) as caught:
        self.save([2])
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
    self.assertEqual(storage.disk_full(caught.exception), 'File too large')
    self.assert_restored(1)
    self.save([2])
    self.assertEqual(self.steps(), [1, 2])
    self.assert_restored(2)


class DamageTest(_TestCase):
  @parameterized.parameters('flipped', 'truncated', 'gone')
  def test_any_file(self, kind):
    self.save([1, 2])
    whole = self.folder / 'whole'
    self.directory.rename(whole)
    source, older = np.random.default_rng(0), 0
    files = [path for path in sorted((whole / '2').rglob('*'))]
    for path in filter(pathlib.Path.is_file, files):
      shutil.copytree(whole, self.directory)
      self._damage(self.directory / path.relative_to(whole), kind, source)
      with self.subTest(str(path.relative_to(whole))):
        step = int(run_state.restore_state(self.directory, _state(0)).step)
        self.assert_restored(step)
        self.assertEqual(self.steps(), [1, 2])  # reading changes nothing
        older += step == 1
      shutil.rmtree(self.directory)
    # Not all files matter to orbax, but some do.
    self.assertGreaterEqual(older, 3)

  def _damage(self, path, kind, source):
    content = bytearray(path.read_bytes())
    if kind == 'gone':
      path.unlink()
    elif kind == 'truncated':
      path.write_bytes(content[: len(content) // 2])
    else:
      content[source.integers(len(content))] ^= 1 << source.integers(8)
      path.write_bytes(content)

  def test_says_so_in_a_line_and_goes_on(self):
    self.save([1, 2])
    shutil.rmtree(self.directory / '2' / 'default')
    with self.assertLogs('absl', 'WARNING') as logs:
      self.assert_restored(1)
    ours = [x for x in logs.output if 'run_state.py' in x or 'damaged' in x]
    self.assertLen(ours, 1)
    self.assertIn(str(self.directory / '2'), ours[0])
    with self.open() as saved:
      saved.begin(1, _state(1))
      self.assertEqual(self.steps(), [1])
      saved.save(2, _state(2))
    self.assertEqual(self.steps(), [1, 2])
    self.assert_restored(2)

  def test_none_left(self):
    self.save([1, 2])
    for step in '12':
      shutil.rmtree(self.directory / step / 'default')
    with self.assertRaisesRegex(RequestError, rf'\A.*{self.directory}.*\Z'):
      run_state.restore_state(self.directory, _state(0))
    self.assertEqual(self.steps(), [1, 2])

  def test_another_version(self):
    self.save([1])
    with self.assertRaisesRegex(RequestError, 'another version'):
      run_state.restore_state(self.directory, _state(0)._replace(inner=()))
    self.assertEqual(self.steps(), [1])


class LargeTest(_TestCase):
  """States whose buffers the next step takes, written from the devices."""

  def steps(self, count):
    """Yields states, each of which is gone when the next is asked for."""
    for step in range(1, count + 1):
      state = _state(step)
      yield state, {}
      jax.tree.map(lambda x: x.delete(), state)

  def restored(self):
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _state(0),
    )
    return run_state.restore_large_state(self.directory, like)

  def run_all(self, count=5, every=2):
    with self.open(every=every, large=True) as saved:
      for state, _ in saved.guard(self.steps(count)):
        saved.save(int(state.step), state)

  def test_written_when_due(self):
    self.assertIsNone(self.restored())
    self.run_all()
    self.assertEqual(run_state.steps_in(self.directory), [2, 4])
    found = self.restored()
    jax.tree.map(np.testing.assert_array_equal, found, _state(4))
    types = jax.tree.map(lambda x: (type(x), x.dtype), _state(4))
    self.assertEqual(jax.tree.map(lambda x: (type(x), x.dtype), found), types)

  def test_on_any_mesh(self):
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    meshes = [jax.make_mesh((n, 4 // n), ('a', 'b')) for n in (4, 2)]
    one, two = (
      jax.NamedSharding(mesh, jax.sharding.PartitionSpec('a', 'b'))
      for mesh in meshes
    )
    with self.open(large=True) as saved:
      saved.save(1, {'x': jax.device_put(x, one)})
    like = {'x': jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=two)}
    found = run_state.restore_large_state(self.directory, like)['x']
    np.testing.assert_array_equal(found, x)
    self.assertEqual(found.sharding, two)

  def test_any_bit_matters(self):
    state = {
      'f': jnp.arange(5.0),
      'h': jnp.ones((2, 3), jnp.bfloat16),
      'i': jnp.arange(4, dtype=jnp.int32),
      'b': jnp.zeros(3, bool),
    }
    whole = np.asarray(run_state._digest(state))
    for name, x in state.items():
      raw = np.asarray(x).copy()
      for at in range(raw.nbytes):
        for bit in range(8 if name != 'b' else 1):
          words = raw.view(np.uint8).reshape(-1).copy()
          words[at] ^= 1 << bit
          other = words.view(raw.dtype).reshape(raw.shape)
          found = run_state._digest(state | {name: other})
          self.assertFalse(np.array_equal(found, whole), (name, at, bit))
    renamed = {'g' if k == 'f' else k: x for k, x in state.items()}
    self.assertFalse(np.array_equal(run_state._digest(renamed), whole))

  @parameterized.parameters('flipped', 'gone')
  def test_damaged(self, kind):
    self.run_all()
    for path in (self.directory / '4' / 'default' / 'd').iterdir():
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 4
      path.unlink() if kind == 'gone' else path.write_bytes(content)
    with self.assertLogs('absl', 'WARNING'):
      found = self.restored()
    jax.tree.map(np.testing.assert_array_equal, found, _state(2))

  def test_a_flush_waits_for_the_step_in_progress(self):
    begun, flushed = threading.Event(), threading.Event()

    def steps():
      for state in self.steps(3):
        if state[0].step == 2:
          begun.set()
          self.assertFalse(flushed.wait(0.5))  # it has to wait
        yield state

    def flush():
      begun.wait()
      saved.flush()
      flushed.set()

    with self.open(every=100, large=True) as saved:
      thread = threading.Thread(target=flush)
      thread.start()
      for state, _ in saved.guard(steps()):
        time.sleep(0.1)  # of metrics to write
        saved.save(int(state.step), state)
      thread.join()
    self.assertEqual(run_state.steps_in(self.directory), [2])
    jax.tree.map(np.testing.assert_array_equal, self.restored(), _state(2))

  def test_a_flush_gives_up(self):
    def steps():
      yield from self.steps(1)
      with self.assertRaisesRegex(TimeoutError, 'in progress'):
        failed = []

        def flush():
          try:
            saved.flush()
          except TimeoutError as error:
            failed.append(error)

        thread = threading.Thread(target=flush)
        thread.start()
        thread.join()
        raise failed[0]

    with (
      mock.patch.object(run_state, '_GRACE_SECONDS', 0.1),
      self.open(every=100, large=True) as saved,
    ):
      for state, _ in saved.guard(steps()):
        saved.save(int(state.step), state)
    self.assertEqual(run_state.steps_in(self.directory), [])


class InheritTest(_TestCase):
  def _refused(self, pattern, **shape):
    with self.assertRaisesRegex(
      RequestError, rf'\Asearch.init_from: .*{self.folder}.*{pattern}.*\Z'
    ):
      run_state.inherit_policy(self.folder, _state(0, **shape).params)

  def test_parameters_of_the_newest(self):
    self.save([1, 2])
    got = run_state.inherit_policy(self.folder, _state(0).params)
    jax.tree.map(np.testing.assert_array_equal, got, _state(2).params)

  def test_no_checkpoint(self):
    self._refused('no checkpoint')

  def test_other_sublayers(self):
    self.save([1])
    self._refused('6 sublayers.* 8', device_sublayers=8)

  def test_other_network(self):
    self.save([1])
    self._refused('policy.hidden', hidden=5)


if __name__ == '__main__':
  absltest.main()
