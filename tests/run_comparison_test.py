from absl.testing import absltest

from ffp_jax.reporting import run_comparison
from ffp_jax.reporting.blocks import Table
from tests import finished_run


def _tables(runs):
  return [x for x in run_comparison.compare(runs) if isinstance(x, Table)]


class ComparisonTest(absltest.TestCase):
  def rows(self, *runs):
    (table,) = _tables(runs)
    return table.rows

  def run_of(self, params, ppl):
    return finished_run.run(params_pruned=params, calibrated={'ppl': ppl})

  def test_frontier(self):
    rows = self.rows(
      self.run_of(800_000, 20.0),
      self.run_of(800_000, 19.0),
      self.run_of(700_000, 30.0),
      self.run_of(750_000, 30.0),
      self.run_of(600_000, None),
      self.run_of(850_000, 19.0),
    )
    self.assertEqual(
      [row[-1] for row in rows], ['yes', 'no', 'yes', 'yes', 'no', 'no', 'no']
    )
    self.assertEqual(rows[0], ('dense', '1.0', '16.58', '-', 'yes'))
    self.assertEqual(rows[2], ('2', '0.8', '19.00', '21.03', 'yes'))
    self.assertEqual(rows[5][2], 'not finite')

  def test_equal_runs_both_lead(self):
    rows = self.rows(*[self.run_of(800_000, 19.0)] * 2)
    self.assertEqual([row[-1] for row in rows], ['yes'] * 3)

  def test_only_like_runs_share_a_section(self):
    protocol = finished_run.results()['protocol']
    runs = [
      finished_run.run('a'),
      finished_run.run('b', settings={'model': 'other'}),
      finished_run.run('c', protocol=protocol | {'context': 1024}),
      finished_run.run('d'),
    ]
    names = [[row[0] for row in table.rows] for table in _tables(runs)]
    self.assertEqual(
      names, [['dense', '1', '4'], ['dense', '2'], ['dense', '3']]
    )


if __name__ == '__main__':
  absltest.main()
