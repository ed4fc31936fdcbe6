import os
import pathlib

from absl.testing import absltest
from importlinter import cli

_ROOT = pathlib.Path(__file__).parent.parent


def _lint(root: pathlib.Path) -> int:
  """Returns the exit code of `lint-imports` in a directory."""
  before = os.getcwd()
  os.chdir(root)
  try:
    return cli.lint_imports(config_filename='pyproject.toml', no_cache=True)
  finally:
    os.chdir(before)


class ImportsTest(absltest.TestCase):
  def test_imports_run_downward(self):
    """The layers are in pyproject.toml; each file is in one of them."""
    self.assertEqual(_lint(_ROOT), 0)


if __name__ == '__main__':
  absltest.main()
