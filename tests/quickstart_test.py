import base64
import pathlib
import tempfile

import nbclient
import nbformat
from absl.testing import absltest

from tests import tiny_run

_ROOT = pathlib.Path(__file__).parent.parent
_NOTEBOOK = _ROOT / 'docs' / 'quickstart.ipynb'
_PARAMETERS = """
from tests import tiny_run
CONFIG = tiny_run.config()
MODEL, TEXT, SPARSITY = {model!r}, {data!r}, 0.3
"""


class QuickstartTest(absltest.TestCase):
  def test_runs_on_a_tiny_model(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    notebook = nbformat.read(_NOTEBOOK, as_version=4)
    (parameters,) = (
      cell
      for cell in notebook.cells
      if 'parameters' in cell.metadata.get('tags', [])
    )
    inputs = tiny_run.inputs(pathlib.Path(folder))
    parameters.source = _PARAMETERS.format(**inputs)
    nbclient.NotebookClient(
      notebook, timeout=300, resources={'metadata': {'path': str(_ROOT)}}
    ).execute()
    outputs = [x for cell in notebook.cells for x in cell.get('outputs', [])]
    said = ''.join(x.text for x in outputs if x.output_type == 'stream')
    self.assertIn('removed 3', said)
    self.assertIn('calibrated', said)
    pictures = [x.data['image/png'] for x in outputs if 'data' in x]
    self.assertTrue(base64.b64decode(pictures[0]).startswith(b'\x89PNG'))


if __name__ == '__main__':
  absltest.main()
