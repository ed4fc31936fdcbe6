import re

import numpy as np
from absl.testing import absltest

from ffp_jax.reporting import figures, plots
from tests import finished_run


class SvgTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.picture = plots.search([finished_run.line(i) for i in range(6)])

  def test_the_page_sets_the_colours(self):
    svg = figures.svg(self.picture, 'a')
    self.assertEmpty(re.findall('#[0-9a-f]{6};', svg))
    self.assertContainsSubset(
      {'ink', 'paper', 'pale', 'rule', 'blue', 'orange'},
      re.findall(r'var\(--(\w+)\)', svg),
    )

  def test_words_are_text(self):
    svg = figures.svg(self.picture, 'a')
    texts = re.findall(r'<text [^>]*>([^<]+)</text>', svg)
    self.assertContainsSubset(
      ['reward', 'candidates evaluated', 'mean of the step'], texts
    )

  def test_the_same_bytes_again_and_other_ids_elsewhere(self):
    svg = figures.svg(self.picture, 'a')
    self.assertEqual(figures.svg(self.picture, 'a'), svg)
    names = [
      set(re.findall('id="(.+?)"', figures.svg(self.picture, name)))
      for name in ('a', 'b')
    ]
    self.assertNotEmpty(names[0])
    self.assertEmpty(names[0] & names[1])

  def test_a_long_search_is_no_large_picture(self):
    rng = np.random.default_rng(0)
    lines = [
      finished_run.line(i, stage=0, reward_max=x, reward_mean=x - 0.1)
      for i, x in enumerate(rng.uniform(0.2, 1.0, 1000))
    ]
    self.assertLess(len(figures.svg(plots.search(lines), 'a')), 100_000)


if __name__ == '__main__':
  absltest.main()
