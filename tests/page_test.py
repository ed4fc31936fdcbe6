import html.parser
import itertools
import re

from absl.testing import absltest, parameterized

from ffp_jax.reporting import blocks, figures, page, run_comparison, run_report
from tests import finished_run

_VOID = ('meta', 'link')
_NASTY = '</title></style><script>alert("1")</script><img src=x onerror=\'y\'>&'


class _Element:
  def __init__(self, tag, attributes):
    self.tag, self.attributes = tag, dict(attributes)
    self.children, self.text = [], ''

  def all(self, *tags):
    """Elements below with one of these tags, in the page's order."""
    for child in self.children:
      if child.tag in tags:
        yield child
      yield from child.all(*tags)

  def one(self, tag):
    (element,) = self.all(tag)
    return element


class _Tree(html.parser.HTMLParser):
  """Builds elements; wants every one closed, in order."""

  def __init__(self, text):
    super().__init__()
    self.open = [_Element('', ())]
    self.feed(text)
    self.close()
    (self.root,) = self.open
    assert not self.rawdata

  def handle_starttag(self, tag, attrs):
    assert len(dict(attrs)) == len(attrs), f'{tag}: an attribute twice'
    element = _Element(tag, attrs)
    self.open[-1].children.append(element)
    if tag not in _VOID:
      self.open.append(element)

  def handle_startendtag(self, tag, attrs):
    self.open[-1].children.append(_Element(tag, attrs))

  def handle_endtag(self, tag):
    assert self.open.pop().tag == tag, tag

  def handle_data(self, data):
    for element in self.open:
      element.text += data


def _parse(blocks_or_run, title='a title'):
  found = blocks_or_run
  if isinstance(found, run_report.Run):
    found = run_report.report(found)
  return _Tree(page.page(title, found)).root


def _pages():
  full = finished_run.run(
    tasks={'arc': {'dense': 0.5, 'pruned': None}},
    speed={'tokens a second': {'dense': 1.0, 'pruned': 2.0}},
  )
  other = finished_run.run(
    'runs/b', settings={'model': 'other'}, calibrated={'ppl': None}
  )
  bare = finished_run.run(lines=0)
  bare = bare._replace(results=finished_run.uncalibrated(bare.results))
  return {
    'full': list(run_report.report(full)),
    'bare': list(run_report.report(bare)),
    'comparison': list(run_comparison.compare([full, other, bare])),
  }


def _table(root, caption):
  """Cells of the table with this caption, row by row, the header first."""
  (table,) = (
    x for x in root.all('table') if x.one('caption').text.startswith(caption)
  )
  return [
    [cell.text for cell in row.all('th', 'td')] for row in table.all('tr')
  ]


@parameterized.named_parameters((k, v) for k, v in _pages().items())
class StructureTest(parameterized.TestCase):
  def test_language_and_title(self, found):
    root = _parse(found, title='a & b')
    self.assertEqual(root.one('html').attributes['lang'], 'en')
    self.assertEqual(root.one('title').text, 'a & b')
    (viewport,) = (
      x.attributes['content']
      for x in root.all('meta')
      if x.attributes.get('name') == 'viewport'
    )
    self.assertIn('width=device-width', viewport)
    self.assertLen(list(root.all('main')), 1)

  def test_headings_follow_one_another(self, found):
    tags = [x.tag for x in _parse(found).all('h1', 'h2', 'h3', 'h4')]
    levels = [int(tag[1]) for tag in tags]
    self.assertEqual(levels[0], 1)
    self.assertEqual(levels.count(1), 1)
    for above, level in itertools.pairwise(levels):
      self.assertLessEqual(level, above + 1)

  def test_tables_have_headers(self, found):
    tables = list(_parse(found).all('table'))
    self.assertNotEmpty(tables)
    for table in tables:
      self.assertTrue(table.one('caption').text)
      head = list(table.one('thead').all('th', 'td'))
      for cell in head:
        self.assertEqual(
          cell.attributes.get('scope'), cell.text and 'col' or None
        )
        self.assertEqual(cell.tag, 'th' if cell.text else 'td')
      for row in table.one('tbody').all('tr'):
        first, *others = row.all('th', 'td')
        self.assertEqual(first.attributes.get('scope'), 'row')
        self.assertTrue(first.text)
        self.assertEqual({x.tag for x in others}, {'td'})
        self.assertLen([first, *others], len(head))

  def test_pictures_have_text(self, found):
    root = _parse(found)
    for picture in root.all('svg'):
      self.assertEqual(picture.attributes['role'], 'img')
      self.assertGreater(len(picture.attributes['aria-label']), 20)
    for figure in root.all('figure'):
      self.assertTrue(figure.one('figcaption').text)
    for folded in root.all('details'):
      self.assertTrue(folded.one('summary').text)
    self.assertEmpty(list(root.all('img')))

  def test_ids_are_unique(self, found):
    ids = [
      x.attributes['id'] for x in _all(_parse(found)) if 'id' in x.attributes
    ]
    self.assertLen(set(ids), len(ids))

  def test_it_loads_nothing(self, found):
    text = page.page('a title', found)
    self.assertNotIn('://', text)
    self.assertNotRegex(text, r'url\((?!#)|@import|srcset|javascript:')
    elements = list(_all(_Tree(text).root))
    inside = {
      f'#{x.attributes["id"]}' for x in elements if 'id' in x.attributes
    }
    self.assertContainsSubset(re.findall(r'url\((.*?)\)', text), inside)
    for element in elements:
      self.assertNotIn(
        element.tag, ('script', 'iframe', 'object', 'embed', 'base')
      )
      for name, value in element.attributes.items():
        self.assertNotStartsWith(name, 'on')
        if name in ('src', 'href', 'data', 'xlink:href'):
          self.assertIn(value, {'data:,', *inside})


def _all(element):
  for child in element.children:
    yield child
    yield from _all(child)


class PicturesTest(absltest.TestCase):
  def test_they_are_drawn(self):
    pages = _pages()
    labels = {
      name: [
        svg.attributes['aria-label'].split(';')[0]
        for svg in _parse(found).all('svg')
      ]
      for name, found in pages.items()
    }
    perplexity = 'Held-out perplexity, lower is better'
    kept = 'Share kept in every layer'
    self.assertEqual(
      labels,
      {
        'full': [
          perplexity,
          kept,
          'Reward of the candidates, higher is better',
        ],
        'bare': [perplexity, kept],
        # Two models are compared.
        'comparison': ['Perplexity against parameters'] * 2,
      },
    )

  def test_a_page_is_the_same_again(self):
    first, second = (page.page('', _pages()['full']) for _ in range(2))
    self.assertEqual(first, second)


class NumbersTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.run_ = finished_run.run(lines=6)
    self.root = _parse(self.run_)

  def test_perplexities(self):
    _, *rows = _table(self.root, 'Perplexity on held-out text')
    results = self.run_.results
    keys = ('dense', 'uniform', 'uniform_calibrated', 'searched', 'calibrated')
    self.assertEqual(
      [float(ppl) for _, ppl, _ in rows],
      [round(results[key]['ppl'], 2) for key in keys],
    )
    for key, (_, _, times) in zip(keys, rows, strict=True):
      ratio = results[key]['ppl'] / results['dense']['ppl']
      self.assertAlmostEqual(float(times), ratio, delta=0.005)

  def test_sizes(self):
    _, *rows = _table(self.root, 'Size')
    results = self.run_.results
    kept = results['params_prunable'] - results['params_removed']
    pairs = [
      (results['params_dense'], results['params_pruned']),
      (results['params_prunable'], kept),
      (results['bytes_dense'], results['bytes_pruned']),
    ]
    for (_, before, after), pair in zip(rows, pairs, strict=True):
      numbers = (before, after.split()[0])
      self.assertEqual(tuple(int(x.replace(',', '')) for x in numbers), pair)

  def test_layers(self):
    _, *rows = _table(self.root, 'Share kept')
    for row, layer in zip(rows, self.run_.allocation['layers'], strict=True):
      digits = [re.findall(r'\d+', x.replace(',', '')) for x in row]
      (number,), attention, ffn = [[int(x) for x in cell] for cell in digits]
      self.assertEqual(number, layer['layer'])
      for cell, kind in ((attention, 'attention'), (ffn, 'ffn')):
        kept, total = layer[f'{kind}_kept'], layer[f'{kind}_total']
        self.assertEqual(cell, [round(100 * kept / total), kept, total])

  def test_rewards(self):
    _, *rows = _table(self.root, 'Reward of every step')
    for row, line in zip(rows, self.run_.metrics, strict=True):
      self.assertEqual(
        [float(x) for x in row],
        [
          line['step'] + 1,
          line['stage'] + 1,
          round(line['reward_mean'], 3),
          round(line['reward_max'], 3),
        ],
      )

  def test_one_candidate_has_one_reward(self):
    lines = [finished_run.line(i, candidates=1) for i in range(2)]
    root = _parse(finished_run.run(lines=lines))
    head, *rows = _table(root, 'Reward of every step')
    self.assertEqual(head, ['step', 'stage', 'reward'])
    self.assertEqual([row[2] for row in rows], ['0.600', '0.610'])


class EscapeTest(absltest.TestCase):
  def check(self, found, title=_NASTY):
    root = _parse(found, title)
    # As many elements as without, and every word stays a word.
    self.assertEmpty(list(root.all('script', 'img')))
    return root

  def test_a_run(self):
    run = finished_run.run(
      settings={'model': _NASTY, 'data': _NASTY, 'seed': _NASTY},
      command=_NASTY,
      device=_NASTY,
      versions={_NASTY: _NASTY},
      seconds={_NASTY: 1.0},
      tasks={_NASTY: {_NASTY: 1.0}},
      protocol=finished_run.results()['protocol']
      | {'text': _NASTY, 'split': _NASTY, 'name': _NASTY},
    )
    root = self.check(run)
    plain = _parse(
      finished_run.run(tasks={'a': {'b': 1.0}}, seconds={'c': 1.0})
    )
    self.assertEqual([x.tag for x in _all(root)], [x.tag for x in _all(plain)])
    self.assertEqual(root.one('title').text, _NASTY)
    self.assertEqual(root.one('h1').text, f'Pruning {_NASTY}')
    self.assertEqual(root.one('code').text, _NASTY)

  def test_a_comparison(self):
    runs = [
      finished_run.run(_NASTY, settings={'model': _NASTY}) for _ in range(2)
    ]
    root = self.check(run_comparison.compare(runs))
    self.assertEqual(root.one('h2').text, _NASTY)

  def test_every_block(self):
    table = blocks.Table(
      _NASTY,
      (_NASTY, _NASTY),
      [(_NASTY, _NASTY), (_NASTY, _NASTY)],
    )
    drawn, [[ax]] = figures.new_figure(3, _NASTY)
    ax.set_xlabel(_NASTY)
    found = [
      blocks.Heading(1, _NASTY),
      blocks.Text(_NASTY),
      blocks.Code(_NASTY),
      blocks.Items([(_NASTY, _NASTY)]),
      table,
      blocks.Picture(_NASTY, 'nasty', drawn, table),
    ]
    root = self.check(found)
    self.assertEqual(root.one('body').text.count(_NASTY), 23)
    self.assertStartsWith(root.one('svg').attributes['aria-label'], _NASTY)


def _themes():
  """Colours by their names, for light screens and dark ones."""
  style = _parse([]).one('style').text
  return [
    dict(re.findall(r'--(\w+): (#\w+);', rule))
    for rule in re.findall(r':root \{(.*?)\}', style, re.DOTALL)
  ]


def _luminance(colour):
  """Relative luminance, as WCAG 2.2 defines it."""
  if len(colour) == 4:
    colour = '#' + ''.join(2 * x for x in colour[1:])
  shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [
    x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares
  ]
  return sum(
    w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
  )


class ContrastTest(parameterized.TestCase):
  """WCAG 2.2: 4.5 for text, 3 for graphics."""

  @parameterized.parameters('light', 'dark')
  def test_both_themes(self, theme):
    light, dark = _themes()
    self.assertEqual(light.keys(), dark.keys())
    colour = {'light': light, 'dark': dark}[theme]
    for front, back, least in (
      ('ink', 'paper', 7),
      ('pale', 'paper', 4.5),
      ('ink', 'soft', 7),
      ('blue', 'paper', 3),
      ('orange', 'paper', 3),
      ('pale', 'soft', 4.5),
    ):
      low, high = sorted(_luminance(colour[x]) for x in (front, back))
      ratio = (high + 0.05) / (low + 0.05)
      self.assertGreaterEqual(ratio, least, f'{front} on {back}')

  def test_pictures_are_drawn_in_the_light_theme(self):
    light, _ = _themes()
    for colour, name in figures.THEME.items():
      if name not in ('ink', 'paper'):  # pictures have pure black and white
        self.assertEqual(light[name], colour)


if __name__ == '__main__':
  absltest.main()
