import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.errors import RequestError
from ffp_jax.text import windows as windows_lib

_SIZES = {'calibration': 5, 'reward': 4, 'validation': 3, 'heldout': 6}


class WindowsTest(parameterized.TestCase):
  @parameterized.parameters((20, 4, 5), (23, 4, 5), (3, 4, 0), (0, 4, 0))
  def test_are_consecutive(self, length, context, count):
    for tokens in (list(range(length)), np.arange(length)):
      got = windows_lib.windows(tokens, context)
      self.assertEqual(got.dtype, np.int32)
      self.assertEqual(got.shape, (count, context))
      self.assertEqual(got.flatten().tolist(), list(range(count * context)))


class OverlappingTest(parameterized.TestCase):
  def spelled_out(self, length, context, stride):
    """Lists (token, position, tokens before it in the window) of all scored."""
    tokens = np.arange(100, 100 + length)
    windows, spans = windows_lib.overlapping(tokens, context, stride)
    self.assertEqual(windows.dtype, np.int32)
    self.assertEqual(windows.shape, (len(spans), context))
    return windows, [
      (window[at], at)
      for window, (first, end) in zip(windows, spans, strict=True)
      for at in range(first, end)
    ]

  @parameterized.parameters(
    *((n, 8, stride) for n in (2, 7, 8, 9, 16, 23, 24, 25)
      for stride in (1, 3, 4, 7)),
  )  # fmt: skip
  def test_each_token_is_scored_once_with_its_context(
    self, length, context, stride
  ):
    windows, scored = self.spelled_out(length, context, stride)
    self.assertEqual([t for t, _ in scored], list(range(101, 100 + length)))
    for token, at in scored:
      self.assertGreaterEqual(at, min(context - stride, token - 100))
    # Each window is a part of the text.
    for i, window in enumerate(windows):
      text = range(100 + i * stride, min(100 + i * stride + 8, 100 + length))
      self.assertEqual(window[: len(text)].tolist(), list(text))
      self.assertFalse(window[len(text) :].any())

  @parameterized.parameters(
    (2, 1), (8, 1), (9, 2), (12, 2), (13, 3), (16, 3), (17, 4)
  )
  def test_no_window_more_than_needed(self, length, count):
    windows, _ = self.spelled_out(length, 8, 4)
    self.assertLen(windows, count)

  @parameterized.parameters((16, 2), (20, 3), (17, 3), (5, 1))
  def test_stride_of_a_window_leaves_out_the_first_of_each(self, length, count):
    windows, scored = self.spelled_out(length, 8, 8)
    self.assertLen(windows, count)
    expected = [100 + i for i in range(length) if i % 8]
    self.assertEqual([t for t, _ in scored], expected)

  @parameterized.parameters(0, 1)
  def test_too_few_tokens_score_nothing(self, length):
    self.assertEqual(self.spelled_out(length, 8, 4)[1], [])

  def test_windows_are_no_copies(self):
    windows, _ = windows_lib.overlapping(np.arange(2**20), 2**16, 1)
    self.assertEqual(windows.strides, (4, 4))


class SplitTest(parameterized.TestCase):
  def split(self, windows=30, seed=0, **sizes):
    all_WxT = windows_lib.windows(np.arange(windows * 4), 4)
    return windows_lib.split(all_WxT, seed=seed, **(_SIZES | sizes))

  def test_sizes(self):
    splits = self.split()
    for name, size in _SIZES.items():
      part = getattr(splits, name)
      self.assertEqual(part.shape, (size, 4))
      self.assertEqual(part.dtype, np.int32)

  @parameterized.parameters(*range(10))
  def test_are_disjoint(self, seed):
    # Tokens are unique, so that the first one identifies a window.
    for windows in (18, 19, 30):
      first = np.concatenate([x[:, 0] for x in self.split(windows, seed)])
      self.assertLen(first, windows)
      self.assertLen(set(first.tolist()), windows)

  def test_windows_stay_whole(self):
    for part in self.split():
      np.testing.assert_array_equal(part[:, 0] % 4, 0)
      np.testing.assert_array_equal(part, part[:, :1] + np.arange(4))

  def test_the_same_seed_gives_the_same_splits(self):
    for a, b in zip(self.split(seed=3), self.split(seed=3), strict=True):
      np.testing.assert_array_equal(a, b)

  def test_another_seed_deals_again(self):
    a, b = self.split(seed=3), self.split(seed=4)
    self.assertNotEqual(a.calibration.tolist(), b.calibration.tolist())

  def test_held_out_is_the_end_for_every_seed(self):
    expected = np.arange(24 * 4, 30 * 4).reshape(6, 4)
    for seed in range(5):
      np.testing.assert_array_equal(self.split(seed=seed).heldout, expected)

  def test_held_out_does_not_depend_on_the_other_sizes(self):
    other = self.split(calibration=1, reward=20, validation=0)
    np.testing.assert_array_equal(other.heldout, self.split().heldout)

  @parameterized.parameters(*_SIZES)
  def test_a_split_may_be_empty(self, name):
    splits = self.split(**{name: 0})
    self.assertEqual(getattr(splits, name).shape, (0, 4))
    first = np.concatenate([x[:, 0] for x in splits]).tolist()
    self.assertLen(set(first), len(first))

  def test_just_enough(self):
    first = np.concatenate([x[:, 0] for x in self.split(18)])
    self.assertEqual(sorted(first.tolist()), list(range(0, 18 * 4, 4)))

  @parameterized.parameters(17, 1, 0)
  def test_too_few_windows(self, windows):
    with self.assertRaisesRegex(
      RequestError, rf'\A.* {windows} windows of 4 .* 18; [^\n]*context.*\Z'
    ):
      self.split(windows)


if __name__ == '__main__':
  absltest.main()
