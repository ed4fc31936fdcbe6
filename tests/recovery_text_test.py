import itertools
import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.errors import RequestError
from ffp_jax.text import recovery_text, tokenization
from ffp_jax.text import windows as windows_lib
from tests import tiny_run


class OrderTest(parameterized.TestCase):
  def test_each_pass_takes_every_window_once(self):
    found = recovery_text.order(0, (1.0,), (7,), 17)
    np.testing.assert_array_equal(found[:, 0], 0)
    first, second, rest = found[:7, 1], found[7:14, 1], found[14:, 1]
    for epoch in (first, second):
      np.testing.assert_array_equal(np.sort(epoch), np.arange(7))
      self.assertFalse(np.array_equal(epoch, np.arange(7)))
    self.assertFalse(np.array_equal(first, second))
    self.assertLen(set(rest), 3)

  def test_shares_hold_all_along(self):
    weights = np.array([0.7, 0.2, 0.1])
    found = recovery_text.order(0, weights * 5, (1000, 3, 40), 300)
    for count in range(1, 301):
      taken = np.bincount(found[:count, 0], minlength=3)
      self.assertLess(np.abs(taken - weights * count).max(), 1.0)
    # The short source is repeated, each of its windows equally often.
    short = found[found[:, 0] == 1, 1]
    np.testing.assert_array_equal(np.bincount(short), [20, 20, 20])

  def test_known_from_the_seed_and_a_prefix(self):
    args = (1.0, 2.0), (5, 9)
    found = recovery_text.order(3, *args, 40)
    np.testing.assert_array_equal(recovery_text.order(3, *args, 25), found[:25])
    other = recovery_text.order(4, *args, 40)
    np.testing.assert_array_equal(other[:, 0], found[:, 0])
    self.assertFalse(np.array_equal(other, found))

  def test_no_window_of_weight_zero(self):
    found = recovery_text.order(0, (0.0, 1.0), (0, 4), 9)
    np.testing.assert_array_equal(found[:, 0], 1)

  @parameterized.parameters(
    ((0.0, 0.0), (3, 3), 'one at least positive'),
    ((1.0, -0.5), (3, 3), 'positive'),
    ((float('nan'), 1.0), (3, 3), 'positive'),
    ((1.0, 1.0), (3, 0), 'shorter than one window'),
  )
  def test_refused(self, weights, sizes, words):
    with self.assertRaisesRegex(RequestError, words):
      recovery_text.order(0, weights, sizes, 4)


class BatchTest(absltest.TestCase):
  def test_takes_the_windows_of_the_step(self):
    sources = [np.arange(12).reshape(3, 4), 100 + np.arange(20).reshape(5, 4)]
    order = recovery_text.order(0, (1.0, 1.0), (3, 5), 24)
    text = recovery_text.RecoveryText(
      [recovery_text.Source('', 1.0, x) for x in sources], order
    )
    for step in range(4):
      found = recovery_text.batch(text, step, micro_batches=2, rows=3)
      self.assertEqual(found.shape, (2, 3, 4))
      for at, row in enumerate(found.reshape(6, 4)):
        source, window = order[step * 6 + at]
        np.testing.assert_array_equal(row, sources[source][window])


class TokenFileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    tiny_run.write_tokenizer(self.folder)
    self.tokenizer = tokenization.load_tokenizer(self.folder)
    self.documents = [x.strip() for x in tiny_run.text(4).split('\n\n')]
    self.documents = [x for x in self.documents if x]

  def _written(self, documents, most, join='\n\n'):
    path = self.folder / 'tokens.bin'
    count = recovery_text.token_file(
      documents, self.tokenizer, path, most=most, join=join
    )
    return count, np.fromfile(path, np.int32)

  @parameterized.parameters('\n\n', ' ')
  def test_are_those_of_the_joined_text(self, join):
    joined = join.join(self.documents)
    expected = tokenization.tokenize(self.folder, joined).ids
    count, found = self._written(self.documents, 10**9, join)
    self.assertEqual(count, len(expected))
    np.testing.assert_array_equal(found, expected)
    self.assertGreater(len(self.documents), 20)

  def test_no_more_documents_are_read_than_needed(self):
    seen = []
    endless = (seen.append(x) or x for x in itertools.cycle(self.documents))
    count, found = self._written(endless, 5000)
    self.assertEqual((count, len(found)), (5000, 5000))
    before = self._written(seen[:-1], 10**9)[0]
    self.assertLess(before, 5000)

  def test_mapped_windows_are_read_when_asked_for(self):
    count, found = self._written(self.documents, 1000)
    mapped = np.memmap(self.folder / 'tokens.bin', np.int32, 'r')
    windows = windows_lib.windows(mapped, 64)
    self.assertTrue(np.shares_memory(windows, mapped))
    self.assertEqual(windows.shape, (count // 64, 64))
    np.testing.assert_array_equal(windows[3], found[3 * 64 : 4 * 64])

  def test_few_tokens_of_a_long_document(self):
    path = self.folder / 'long.jsonl'
    document = ' '.join(self.documents * 40)
    path.write_text(json.dumps({'text': document}) + '\n')
    (source,) = recovery_text.read_sources(
      str(path), self.tokenizer, context=64, most=128, field=''
    )
    expected = tokenization.tokenize(self.folder, document).ids[:128]
    np.testing.assert_array_equal(source.windows.reshape(-1), expected)
    self.assertGreater(len(document), 128 * 16)

  def test_nothing_is_left_of_a_failure(self):
    def broken():
      yield 'one'
      raise RequestError('data: broken')

    before = sorted(self.folder.iterdir())
    with self.assertRaises(RequestError):
      self._written(broken(), 100)
    self.assertEqual(sorted(self.folder.iterdir()), before)


if __name__ == '__main__':
  absltest.main()
