"""The measurement of what recovery makes of compared allocations."""

import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

from ffp_jax import jobs
from ffp_jax.baselines import settings
from ffp_jax.benchmarks import recovered_allocations as measured
from ffp_jax.checkpoints.model import load_model
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import scoring
from tests import tiny_run


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


class RecoveredAllocationsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.compared = self.folder / 'compare.json'
    runs = [
      {'method': name, 'sparsity': 0.25, 'seed': 0, 'counts': counts}
      for name, counts in (
        ('uniform', [2, 1, 1, 36, 36, 36]),
        ('evopress', [1, 2, 2, 24, 40, 30]),
      )
    ]
    self.compared.write_text(json.dumps({'runs': runs}))

  def test_measures_what_is_missing(self):
    config = settings.comparison()
    tiny = tiny_run.config(**tiny_run.inputs(self.folder, topics=12))
    config.update(tiny)
    config.recovery.every = 128
    other = self.folder / 'other.txt'
    other.write_text('Something else entirely, many times over. ' * 40)
    runs = measured.find_runs(
      self.compared, ['uniform', 'evopress'], [0.25], [0]
    )
    out = self.folder / 'out.json'
    budgets = [('', 0, 128), ('', 2, 128)]
    lines = measured.measure_all(config, runs[:1], [str(other)], budgets, out)
    self.assertEqual(
      [(x['method'], x['rank'], x['tokens']) for x in lines],
      [('dense', 0, 0)]
      + [('uniform', r, t) for r, t in ((0, 0), (0, 128))]
      + [('uniform', 2, 128)],
    )
    for line in lines:
      self.assertEqual(list(line['ppl'])[1], str(other))
      self.assertTrue(np.isfinite(list(line['ppl'].values())).all())
    self.assertLen({line['ppl'][config.data] for line in lines}, 4)
    self.assertEqual([i for i, _ in lines[2]['validation']], [0, 4])
    models = self.folder / 'models'
    again = measured.measure_all(
      config, runs, [str(other)], budgets[:1], out, models
    )
    self.assertEqual(again[:4], lines)
    self.assertEqual([x['method'] for x in again[4:]], ['evopress'] * 2)
    self.assertEqual(json.loads(out.read_text()), again)
    job = jobs.prepare_job(settings.cell_config(config, 0, 0.5))
    for i, line in enumerate(again[4:], 4):
      self.assertEqual(line['model'], str(models / str(i)))
      kept = load_model(line['model'], 'float32')
      loss = scoring.Scorer(kept.config)(kept.params, job.text.heldout)
      ppl = line['ppl'][config.data]
      self.assertAlmostEqual(np.exp(loss) / ppl, 1.0, delta=1e-4)
    self.assertLen(measured.table(again).splitlines(), 7)

  def test_what_is_not_there(self):
    with self.assertRaisesRegex(RequestError, 'has no run .*cmaes'):
      measured.find_runs(self.compared, ['cmaes'], [0.25], [0])
    with self.assertRaisesRegex(RequestError, 'not a compare.json'):
      measured.find_runs(self.folder / 'missing', ['uniform'], [0.25], [0])


if __name__ == '__main__':
  absltest.main()
