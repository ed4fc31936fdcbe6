import pathlib
import subprocess
import sys

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parent.parent


def _lint(root: pathlib.Path) -> int:
  """Returns the exit code of `lint-imports` in a directory.

  In a process of its own, as it switches off the loggers of other tests.
  """
  command = pathlib.Path(sys.executable).parent / 'lint-imports'
  arguments = '--config', 'pyproject.toml', '--no-cache'
  return subprocess.run([command, *arguments], cwd=root, check=False).returncode


class ImportsTest(absltest.TestCase):
  def test_imports_run_downward(self):
    """The layers are in pyproject.toml; each file is in one of them."""
    self.assertEqual(_lint(_ROOT), 0)


if __name__ == '__main__':
  absltest.main()
