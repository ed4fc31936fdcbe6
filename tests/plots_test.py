import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.reporting import figures, plots
from tests import finished_run


def _curves(picture, color):
  """Points [n, 2] of every line of one colour."""
  (ax,) = picture.axes
  return [x.get_xydata() for x in ax.lines if x.get_color() == color]


class SearchTest(parameterized.TestCase):
  def draw(self, values, **changes):
    """The picture of these best rewards; the mean is 0.1 lower."""
    return plots.search(
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

  def test_points_are_where_the_values_are(self):
    picture = self.draw([0.5, 0.6, 0.4], candidates=4)
    (best,) = _curves(picture, figures.ORANGE)
    np.testing.assert_allclose(best, [[2, 0.5], [6, 0.6], [10, 0.4]])
    (mean,) = _curves(picture, figures.BLUE)
    np.testing.assert_allclose(mean, best - [0, 0.1])

  def test_stages_are_apart(self):
    picture = self.draw([0.5] * 6)
    self.assertEqual([len(x) for x in _curves(picture, figures.ORANGE)], [3, 3])
    poles = [x[0, 0] for x in _curves(picture, figures.RULE)]
    self.assertCountEqual(poles, [0, 6])
    (ax,) = picture.axes
    self.assertCountEqual(
      [x.get_text() for x in ax.texts],
      ['10.0% sparsity\n255 tokens', '20.0% sparsity\n255 tokens'],
    )

  def test_one_candidate_is_one_curve(self):
    picture = self.draw([0.5, 0.6], candidates=1)
    self.assertLen(_curves(picture, figures.ORANGE), 1)
    self.assertEmpty(_curves(picture, figures.BLUE))
    self.assertEmpty(picture.legends)
    self.assertLen(self.draw([0.5, 0.6]).legends, 1)

  def test_a_gap_where_a_value_is_not_finite(self):
    picture = self.draw([0.5, None, 0.5, 0.6], stage=0)
    (best,) = _curves(picture, figures.ORANGE)
    np.testing.assert_array_equal(best[:, 1], [0.5, np.nan, 0.5, 0.6])
    self.assertNotIn('nan', figures.svg(picture, 'a'))

  @parameterized.parameters(([None, None],), ([0.5, 0.5],), ([0.0],))
  def test_odd_values(self, values):
    self.assertNotRegex(figures.svg(self.draw(values), 'a'), r'\b(nan|inf)\b')

  def test_far_apart_on_a_log_scale(self):
    for values, scale in (([0.2, 0.9], 'linear'), ([0.11, 5.0], 'log')):
      (ax,) = self.draw(values).axes
      self.assertEqual(ax.get_yscale(), scale)

  def test_a_long_search_has_lines_alone(self):
    for steps, marker in ((100, 'o'), (101, 'None')):
      (ax,) = self.draw([0.5] * steps, stage=0).axes
      looks = {x.get_marker() for x in ax.lines if len(x.get_xdata()) > 2}
      self.assertEqual(looks, {marker})


class BarsTest(absltest.TestCase):
  def test_perplexities(self):
    results = finished_run.results(calibrated={'ppl': None})
    picture = plots.perplexity(results)
    (ax,) = picture.axes
    widths = [bar.get_width() for bar in ax.patches]
    self.assertEqual(widths, [16.58, 24.57, 21.03, 21.25, 0.0])
    self.assertIn('>not finite</text>', figures.svg(picture, 'a'))

  def test_perplexities_far_apart_begin_at_one(self):
    picture = plots.perplexity(finished_run.results(uniform={'ppl': 1e6}))
    (ax,) = picture.axes
    self.assertEqual(ax.get_xscale(), 'log')
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    self.assertEqual(spans[:2], [(1.0, 16.58), (1.0, 1e6)])

  def test_shares_kept(self):
    attention, ffn = plots.kept(finished_run.allocation()).axes
    self.assertEqual(
      [bar.get_height() for bar in attention.patches], [2 / 3] * 4
    )
    self.assertEqual(
      [bar.get_height() for bar in ffn.patches],
      [(1000 + i) / 1536 for i in range(4)],
    )


class FrontierTest(absltest.TestCase):
  def draw(self, *pairs):
    return plots.frontier(
      [
        plots.Point(str(i), size * 10**6, ppl, best)
        for i, (size, ppl, best) in enumerate(pairs)
      ]
    )

  def test_the_line_joins_the_best_by_size(self):
    picture = self.draw(
      (100, 10.0, True), (60, 30.0, True), (80, 12.0, True), (80, 20.0, False)
    )
    (line,) = _curves(picture, figures.ORANGE)
    np.testing.assert_array_equal(line, [[60, 30], [80, 12], [100, 10]])
    (others,) = _curves(picture, figures.BLUE)
    np.testing.assert_array_equal(others, [[80, 20]])
    (ax,) = picture.axes
    self.assertEqual([x.get_linestyle() for x in ax.lines], ['None', '-'])

  def test_labels_keep_apart(self):
    picture = self.draw((100, 10.0, True), *[(80, 20.0, True)] * 3)
    (ax,) = picture.axes
    picture.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.texts]
    self.assertLen(boxes, 4)
    for i, box in enumerate(boxes):
      self.assertEqual(box.count_overlaps(boxes[:i]), 0)

  def test_far_apart_on_a_log_scale(self):
    picture = self.draw(
      (100, 10.0, True), (90, 101.0, True), (80, 1000.0, True)
    )
    (ax,) = picture.axes
    self.assertEqual(ax.get_yscale(), 'log')
    self.assertIn('>1,000</text>', figures.svg(picture, 'a'))

  def test_one_point(self):
    svg = figures.svg(self.draw((100, 10.0, True)), 'a')
    self.assertNotRegex(svg, r'\b(nan|inf)\b')
    self.assertIn('>100</text>', svg)


if __name__ == '__main__':
  absltest.main()
