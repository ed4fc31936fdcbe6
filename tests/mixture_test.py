from absl.testing import absltest, parameterized

from ffp_jax.text import mixture


def _pieces(*documents, join='\n\n'):
  return list(mixture.pieces(documents, join))


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(
    ('pydoc', [('pydoc', 1)]),
    ('wikitext2:test', [('wikitext2:test', 1)]),
    ('wikitext2:test:0.5', [('wikitext2:test', 0.5)]),
    ('a.txt:0.7, b.jsonl:.3', [('a.txt', 0.7), ('b.jsonl', 0.3)]),
    ('a.txt,b.jsonl:2', [('a.txt', 1), ('b.jsonl', 2)]),
    ('a.txt:0,b.jsonl', [('b.jsonl', 1)]),
    ('', [('', 1)]),
    (':1', [(':1', 1)]),
    ('a\0b', [('a\0b', 1)]),
    ('~nobody/a:3', [('~nobody/a', 3)]),
    ('x' * 5000, [('x' * 5000, 1)]),
  )
  def test_parts(self, source, want):
    self.assertEqual(mixture.parse(source), want)


class PiecesTest(absltest.TestCase):
  def test_short_documents_stay_together(self):
    documents = [f'{i:0100}' for i in range(50)]
    got = _pieces(*documents, join=' ')
    self.assertEqual(' '.join(got), ' '.join(documents))
    self.assertEqual([len(x.split()) for x in got], [21, 21, 8])

  def test_a_document_of_the_usual_size_is_whole(self):
    documents = ['a b\n' * 600 + 'end', 'c' * 4000, 'd']
    self.assertEqual(_pieces(*documents), documents)

  def test_a_long_document_is_cut_after_lines(self):
    text = ''.join(f'{"word " * (i % 90 + 1)}\n' for i in range(400))
    got = _pieces(text)
    self.assertEqual(''.join(x + '\n' for x in got), text)
    self.assertBetween(max(map(len, got)), 2048, 2048 + 2048)

  def test_a_long_line_is_cut_after_words(self):
    text = 'word ' * 10_000
    got = _pieces(text)
    self.assertEqual(''.join(got), text)
    self.assertLess(max(map(len, got)), 4096)

  def test_words_without_end(self):
    self.assertEqual(_pieces('x' * 100_000), ['x' * 100_000])

  def test_null_and_empty(self):
    self.assertEqual(_pieces('a', None, '', 'b'), [None, 'a\n\n\n\nb'])
    self.assertEqual(_pieces(), [])
    self.assertEqual(_pieces('', ''), [])


class InterleaveTest(absltest.TestCase):
  def test_the_one_furthest_behind_is_next(self):
    texts = ['aa', 'aa', 'aa', 'aa'], ['bb', 'bb'], ['ccccc', 'c']
    got = list(mixture.interleave(texts, [2, 1, 1]))
    self.assertEqual(got, ['aa', 'bb', 'ccccc', 'aa', 'aa', 'bb', 'aa'])

  def test_bytes_not_characters(self):
    texts = ['éé'] * 3, ['bb'] * 5
    got = ''.join(mixture.interleave(texts, [1, 1]))
    self.assertEqual(got, 'éébbbbéébbbbéébb')

  def test_it_ends_with_the_first_that_ends(self):
    texts = ['a'] * 2, ['b'] * 9
    self.assertEqual(''.join(mixture.interleave(texts, [1, 1])), 'abab')

  def test_shares_that_are_the_sizes_use_all(self):
    texts = [[c * n] * count for c, n, count in
             (('a', 7, 11), ('b', 3, 5), ('c', 1, 13))]  # fmt: skip
    got = ''.join(mixture.interleave(texts, [77, 15, 13]))
    self.assertEqual([got.count(c) for c in 'abc'], [77, 15, 13])


if __name__ == '__main__':
  absltest.main()
