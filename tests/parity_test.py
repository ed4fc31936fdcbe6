import json
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest

from tests import tiny_run


class CommandTest(absltest.TestCase):
  def test_documented_command(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    tiny_run.write_model(folder / 'model')
    text = folder / 'a.json'
    text.write_text(json.dumps([{'text': 'short', 'body': tiny_run.text()}]))
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'ffp_jax.benchmarks.parity'),
        *(f'--model={folder / "model"}', f'--data={text}', '--field=body'),
        *('--context=32', '--windows=2'),
      ],
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    found = json.loads(done.stdout)
    self.assertEqual(found['tokens'], 2 * 31)
    self.assertLess(found['relative difference'], 1e-5)


if __name__ == '__main__':
  absltest.main()
