import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest

from ffp_jax.benchmarks import inference
from ffp_jax.errors import RequestError
from tests import tiny_run

_SETTINGS = {
  'batch': 2,
  'prompt_tokens': 5,
  'new_tokens': 3,
  'dtype': 'float32',
  'random': False,
}


class CompareTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.enterContext(mock.patch.dict('os.environ', tiny_run.ENVIRONMENT))

  def test_dense_beside_pruned(self):
    dense, pruned = self.folder / 'dense', self.folder / 'pruned'
    tiny_run.write_model(dense)
    # With --random, a config.json is all that is needed.
    pruned.mkdir()
    config = json.loads((dense / 'config.json').read_text())
    config['ffp_jax'] = {'kept_groups': [1, 2, 1], 'kept_ffn': [8, 48, 16]}
    (pruned / 'config.json').write_text(json.dumps(config))
    models = [str(dense), str(pruned)]
    first, second = inference.compare(
      'jax', models, _SETTINGS | {'random': True}, repeats=2
    )
    self.assertEqual([first['model'], second['model']], models)
    self.assertFalse([key for key in first if 'x dense' in key])
    for key in ('prefill tokens/s', 'decode tokens/s', 'peak host memory, MB'):
      self.assertGreater(first[key], 0.0)
      ratio = second[key] / first[key]
      self.assertAlmostEqual(second[f'{key}, x dense'], ratio, delta=1e-3)
    # Two units of attention and 72 channels of 32 inputs each.
    removed = 2 * (2 * 2 + 2) * 8 * 32 + 72 * 3 * 32
    self.assertAlmostEqual(
      first['parameters, M'] - second['parameters, M'], removed / 1e6
    )

  def test_columns_of_a_report(self):
    rows = [
      {'model': 'a', 'speed': 2.0},
      {'model': 'b', 'speed': 3.0, 'speed, x dense': 1.5},
    ]
    self.assertEqual(
      inference.columns({'jax': rows, 'llama.cpp': rows[:1]}),
      {
        'dense': {'speed, jax': 2.0, 'speed, llama.cpp': 2.0},
        'pruned': {'speed, jax': 3.0},
      },
    )

  def test_a_process_that_fails(self):
    with self.assertRaisesRegex(RequestError, 'failed'):
      inference.compare('jax', [str(self.folder / 'no')], _SETTINGS, repeats=1)


if __name__ == '__main__':
  absltest.main()
