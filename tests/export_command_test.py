import pathlib
import resource
import subprocess
import sys
from unittest import mock

from absl.testing import absltest, parameterized

from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.export import formats
from ffp_jax.runtime import storage
from tests import testing, tiny_run


class _TestCase(testing.CheckpointTestCase):
  def setUp(self):
    super().setUp()
    self.dense = self.folder() / 'dense'
    tiny_run.write_model(self.dense)
    self.out = self.folder() / 'out'

  def export(self, format, model=None, dtype=None, pre=None):
    model = str(model or self.dense)
    return formats.export(model, format, self.out, dtype=dtype, pre=pre)

  def assert_nothing_written(self):
    self.assertEmpty(list(self.out.parent.iterdir()))


class RefusedTest(_TestCase):
  """Before any weight is read, and with nothing written."""

  def setUp(self):
    super().setUp()
    load = mock.patch.object(formats, 'load_model', side_effect=AssertionError)
    self.enterContext(load)

  @parameterized.parameters('hf', 'hf_dense')
  def test_not_pruned(self, format):
    self.assert_refused(
      lambda: self.export(format), str(self.dense), 'not pruned', 'gguf'
    )
    self.assert_nothing_written()

  @parameterized.parameters(
    ('gguf', 'int8'), ('hf', 'q8_0'), ('orbax', 'float64')
  )
  def test_dtype(self, format, dtype):
    self.assert_refused(
      lambda: self.export(format, dtype=dtype), '--dtype', dtype, 'bfloat16'
    )

  def test_pre_of_another_format(self):
    self.assert_refused(lambda: self.export('hf', pre='gpt-2'), '--pre')

  def test_no_model(self):
    missing = self.folder() / 'missing'
    self.assert_refused(lambda: self.export('gguf', missing), str(missing))

  @parameterized.parameters(*formats.FORMATS)
  def test_output_exists(self, format):
    self.out.mkdir()
    self.assert_refused(lambda: self.export(format), str(self.out), 'exists')
    self.assertEmpty(list(self.out.iterdir()))

  def test_no_directory_for_the_output(self):
    self.out = self.out / 'deeper' / 'still'
    self.assert_refused(lambda: self.export('gguf'), 'no directory')

  def test_gguf_without_a_tokenizer(self):
    for path in self.dense.glob('tokenizer*'):
      path.unlink()
    self.assert_refused(lambda: self.export('gguf'), 'tokenizer')
    self.assert_nothing_written()


class FullDiskTest(_TestCase):
  @parameterized.parameters(*formats.FORMATS)
  def test_nothing_is_left(self, format):
    model = testing.write_pruned(self.dense, (2, 1, 1), (9, 8, 7))
    # A module cached under the limit would stay torn for good.
    self.enterContext(mock.patch.object(sys, 'dont_write_bytecode', True))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
      with self.assertRaises(Exception) as caught:
        self.export(format, model)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
    self.assertTrue(storage.disk_full(caught.exception), caught.exception)
    self.assert_nothing_written()

  def test_other_errors(self):
    self.assertFalse(storage.disk_full(OSError('no such file')))
    self.assertFalse(storage.disk_full(ValueError('1 requested and 0 written')))


class CommandTest(_TestCase):
  def run_command(self, *flags):
    return subprocess.run(
      [sys.executable, '-m', 'ffp_jax.export', *flags],
      capture_output=True,
      text=True,
      env=tiny_run.ENVIRONMENT | {'HOME': str(self.folder())},
      cwd=pathlib.Path(__file__).parents[1],
    )

  def test_gguf_there_and_back(self):
    path = self.out.with_suffix('.gguf')
    done = self.run_command(
      f'--model={self.dense}', '--format=gguf', f'--out={path}'
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(done.stdout, f'{path.stat().st_size:,} bytes in {path}\n')
    home = mock.patch.object(pathlib.Path, 'home', return_value=self.folder())
    with home:
      again = hub.resolve_model(str(path))
      config = model_config.read_model_config(self.dense)
      self.assertEqual(model_config.read_model_config(again), config)
      self.assert_trees_equal(
        weights.load_params(again, config, 'float32'),
        weights.load_params(self.dense, config, 'float32'),
      )

  @parameterized.parameters(
    (('--format=onnx',), 'onnx'),
    (('--format=gguf',), '--model is missing'),
  )
  def test_flags(self, flags, words):
    done = self.run_command(*flags)
    self.assertEqual(done.returncode, 2)
    (line,) = [x for x in done.stderr.splitlines() if 'ffp_jax: ' in x]
    self.assertIn(words, line)


if __name__ == '__main__':
  absltest.main()
