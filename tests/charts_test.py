import re

from absl.testing import absltest, parameterized

from ffp_jax.reporting import charts
from tests import finished_run


def _dots(svg, look):
  found = re.findall(rf'<circle class="{look}" cx="(.+?)" cy="(.+?)"/>', svg)
  return [(float(x), float(y)) for x, y in found]


def _lines(svg, look):
  return re.findall(rf'<path class="{look}" d="(.+?)"/>', svg)


def _texts(svg):
  return re.findall(r'<text x="(.+?)" y="(.+?)"[^>]*>(.*?)</text>', svg)


class RewardTest(parameterized.TestCase):
  def draw(self, values, **changes):
    """Chart of the best rewards; the mean is 0.1 lower. Without legend."""
    svg = charts.reward(
      [
        finished_run.line(
          i,
          reward_max=value,
          reward_mean=None if value is None else value - 0.1,
          **changes,
        )
        for i, value in enumerate(values)
      ]
    )
    return svg, _dots(svg, 'best')[:-1]

  def test_points_are_where_the_values_are(self):
    values = [0.5, 0.6, 0.4, 0.7]
    svg, dots = self.draw(values)
    for (left, top), value in zip(dots, values, strict=True):
      # From two known points.
      (x0, y0), (x1, y1) = dots[0], dots[3]
      step = values.index(value)
      self.assertAlmostEqual(left, x0 + (x1 - x0) * step / 3, delta=0.02)
      expected = y0 + (y1 - y0) * (value - 0.5) / 0.2
      self.assertAlmostEqual(top, expected, delta=0.02)
    self.assertLess(dots[3][1], dots[0][1])
    for best, mean in zip(dots, _dots(svg, 'mean'), strict=False):
      self.assertEqual(best[0], mean[0])
      self.assertLess(best[1], mean[1])

  def test_ticks_agree_with_the_points(self):
    svg, dots = self.draw([0.2, 0.4])
    ticks = {text: float(y) - 4 for _, y, text in _texts(svg)}
    self.assertAlmostEqual(ticks['0.2'], dots[0][1], delta=0.02)
    self.assertAlmostEqual(ticks['0.4'], dots[1][1], delta=0.02)

  def test_stages_are_apart(self):
    svg, _ = self.draw([0.5] * 6)
    self.assertLen(_lines(svg, 'stage'), 2)
    self.assertLen(_lines(svg, 'best'), 3)  # with that of the legend
    numbers = [text for _, y, text in _texts(svg) if y == '36']
    self.assertEqual(numbers, ['1', '2'])

  def test_one_candidate_is_one_curve(self):
    svg, dots = self.draw([0.5, 0.6], candidates=1)
    self.assertLen(dots, 2)
    self.assertEmpty(_dots(svg, 'mean'))
    labels = [text for _, _, text in _texts(svg)]
    self.assertNotIn('mean of the step', labels)
    self.assertNotIn('best of the step', labels)

  def test_a_gap_where_a_value_is_not_finite(self):
    svg, dots = self.draw([0.5, None, 0.5, 0.6], stage=0)
    self.assertLen(dots, 3)
    self.assertLen(_lines(svg, 'best'), 3)
    self.assertNotIn('nan', svg)

  @parameterized.parameters(([None, None],), ([0.5, 0.5],), ([0.0],))
  def test_odd_values(self, values):
    svg, dots = self.draw(values)
    self.assertLen(dots, len([v for v in values if v is not None]))
    self.assertNotRegex(svg, 'nan|inf')

  def test_a_long_stage_has_lines_alone(self):
    svg, dots = self.draw([0.5] * 100, stage=0)
    self.assertEmpty(dots)
    self.assertEqual(_lines(svg, 'best')[0].count('L'), 99)


class FrontierTest(absltest.TestCase):
  def points(self, *pairs):
    return [
      charts.Point(str(i), size * 10**6, ppl, best)
      for i, (size, ppl, best) in enumerate(pairs)
    ]

  def test_the_line_joins_the_best_by_size(self):
    svg = charts.frontier(
      self.points(
        (100, 10.0, True), (60, 30.0, True), (80, 12.0, True), (80, 20.0, False)
      )
    )
    (line,) = _lines(svg, 'best')
    self.assertEqual(
      line, 'M' + 'L'.join(f'{x} {y}' for x, y in sorted(_dots(svg, 'best')))
    )
    self.assertLen(_dots(svg, 'mean'), 1)
    left, top = zip(*sorted(_dots(svg, 'best')), strict=True)
    self.assertEqual(list(top), sorted(top))  # larger, hence better

  def test_labels_keep_apart(self):
    svg = charts.frontier(
      self.points((100, 10.0, True), *[(80, 20.0, True)] * 3)
    )
    labels = [(float(y), text) for _, y, text in _texts(svg)]
    tops = sorted(y for y, text in labels if text in ('1', '2', '3'))
    self.assertLen(tops, 3)
    self.assertGreaterEqual(tops[1] - tops[0], 13)
    self.assertGreaterEqual(tops[2] - tops[1], 13)

  def test_far_apart_on_a_log_scale(self):
    svg = charts.frontier(
      self.points((100, 10.0, True), (90, 100.0, True), (80, 1000.0, True))
    )
    tops = [y for _, y in sorted(_dots(svg, 'best'))]
    self.assertAlmostEqual(tops[1] - tops[0], tops[2] - tops[1], delta=0.02)
    self.assertIn('100', [text for *_, text in _texts(svg)])

  def test_one_point(self):
    svg = charts.frontier(self.points((100, 10.0, True)))
    self.assertNotRegex(svg, 'nan|inf')


if __name__ == '__main__':
  absltest.main()
