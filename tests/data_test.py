import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from ffp_jax import data
from ffp_jax.config import RequestError

_DOCUMENTS = ('First line.\nSecond.', 'Zweites Stück: 日本語 👍🏽', '  third  ')
_SIZES = {'calibration': 5, 'reward': 4, 'validation': 3, 'heldout': 6}


class _TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def file(self, name, content) -> str:
    path = self.folder / name
    if isinstance(content, str):
      path.write_text(content, encoding='utf-8', newline='')
    else:
      path.write_bytes(content)
    return str(path)

  def jsonl(self, documents, name='a.jsonl', **kwargs) -> str:
    lines = (json.dumps({'text': x, 'id': 1}, **kwargs) for x in documents)
    return self.file(name, '\n'.join(lines) + '\n')

  def parquet(self, columns, name='a.parquet') -> str:
    path = self.folder / name
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)

  def assert_refused(self, call, *words):
    """RequestError of one line, with every word in it."""
    with self.assertRaises(RequestError) as caught:
      call()
    message = str(caught.exception)
    self.assertNotIn('\n', message)
    for word in words:
      self.assertIn(word, message)


class ReadTextTest(_TestCase):
  def test_txt(self):
    text = '\n\n'.join(_DOCUMENTS)
    self.assertEqual(data.read_text(self.file('a.txt', text)), text)

  @parameterized.parameters(False, True)
  def test_jsonl_equals_txt(self, ascii_only):
    path = self.jsonl(_DOCUMENTS, ensure_ascii=ascii_only)
    self.assertEqual(data.read_text(path), '\n\n'.join(_DOCUMENTS))

  def test_parquet_equals_txt(self):
    path = self.parquet({'id': [1, 2, 3], 'text': list(_DOCUMENTS)})
    self.assertEqual(data.read_text(path), '\n\n'.join(_DOCUMENTS))

  def test_jsonl_skips_blank_lines(self):
    path = self.file('a.jsonl', '{"text": "a"}\n\n  \n{"text": "b"}')
    self.assertEqual(data.read_text(path), 'a\n\nb')

  def test_jsonl_with_carriage_returns(self):
    path = self.file('a.jsonl', '{"text": "a"}\r\n{"text": "b"}\r\n')
    self.assertEqual(data.read_text(path), 'a\n\nb')

  @parameterized.parameters('\u2028', '\u2029', '\x85')
  def test_jsonl_strings_may_hold_unicode_line_ends(self, end):
    # JSON asks for escapes below U+0020 only; these are common in web text.
    path = self.jsonl([f'one{end}line', 'two'], ensure_ascii=False)
    self.assertEqual(data.read_text(path), f'one{end}line\n\ntwo')

  def test_pydoc(self):
    text = data.read_text('pydoc')
    self.assertGreater(len(text), 100_000)
    self.assertEqual(data.read_text('pydoc'), text)
    self.assertIn('The "yield" statement', text)

  def test_pydoc_is_the_same_in_another_process(self):
    # Hashes of strings differ there; the order of topics must not.
    code = (
      'import hashlib; from ffp_jax import data; '
      'print(hashlib.sha256(data.read_text("pydoc").encode()).hexdigest())'
    )
    root = pathlib.Path(__file__).parents[1]
    seen = {
      subprocess.run(
        [sys.executable, '-c', code],
        cwd=root,
        env=os.environ | {'PYTHONHASHSEED': seed},
        capture_output=True,
        check=True,
        text=True,
      ).stdout
      for seed in ('1', '2')
    }
    self.assertLen(seen, 1)

  @parameterized.parameters('.txt', '.jsonl', '.parquet')
  def test_missing(self, suffix):
    path = str(self.folder / f'none{suffix}')
    self.assert_refused(lambda: data.read_text(path), path)

  @parameterized.parameters(
    ('a.txt', ''), ('a.txt', ' \n\t\n'), ('a.jsonl', ''), ('a.jsonl', '\n\n'),
    ('a.jsonl', '{"text": ""}'),
  )  # fmt: skip
  def test_empty(self, name, text):
    path = self.file(name, text)
    self.assert_refused(lambda: data.read_text(path), path, 'empty')

  def test_empty_parquet(self):
    path = self.parquet({'text': pyarrow.array([], pyarrow.string())})
    self.assert_refused(lambda: data.read_text(path), path, 'empty')

  @parameterized.parameters('a.txt', 'a.jsonl', 'a.parquet')
  def test_binary(self, name):
    path = self.file(name, bytes(range(256)) * 8)
    self.assert_refused(lambda: data.read_text(path), path)

  @parameterized.parameters(
    'no json', '{"text": "a"}\n{"text": ', '{"content": "a"}', '["text"]',
    '"text"', '{"text": 3}', '{"text": null}', '7',
  )  # fmt: skip
  def test_jsonl_without_text(self, content):
    path = self.file('a.jsonl', content)
    self.assert_refused(lambda: data.read_text(path), path)

  @parameterized.parameters(
    {'content': ['a']}, {'text': [1, 2]}, {'text': ['a', None]}
  )
  def test_parquet_without_text(self, **columns):
    path = self.parquet(columns)
    self.assert_refused(lambda: data.read_text(path), path)

  @parameterized.parameters('a.csv', 'a', 'a.txt.gz', 'wikitext', '', '.txt')
  def test_unknown_suffix(self, name):
    self.assert_refused(
      lambda: data.read_text(name), repr(name), 'pydoc', '.txt', '.parquet'
    )

  def test_directory(self):
    (self.folder / 'a.txt').mkdir()
    path = str(self.folder / 'a.txt')
    self.assert_refused(lambda: data.read_text(path), path)


class WindowsTest(parameterized.TestCase):
  @parameterized.parameters((20, 4, 5), (23, 4, 5), (3, 4, 0), (0, 4, 0))
  def test_are_consecutive(self, length, context, count):
    for tokens in (list(range(length)), np.arange(length)):
      got = data.windows(tokens, context)
      self.assertEqual(got.dtype, np.int32)
      self.assertEqual(got.shape, (count, context))
      self.assertEqual(got.flatten().tolist(), list(range(count * context)))


class SplitTest(_TestCase):
  def split(self, windows=30, seed=0, **sizes):
    all_WxT = data.windows(np.arange(windows * 4), 4)
    return data.split(all_WxT, seed=seed, **(_SIZES | sizes))

  def test_sizes(self):
    splits = self.split()
    for name, size in _SIZES.items():
      part = getattr(splits, name)
      self.assertEqual(part.shape, (size, 4))
      self.assertEqual(part.dtype, np.int32)

  @parameterized.parameters(*range(10))
  def test_are_disjoint(self, seed):
    # Tokens are unique, so that a window is known by its first one.
    for windows in (18, 19, 30):
      first = np.concatenate([x[:, 0] for x in self.split(windows, seed)])
      self.assertLen(set(first.tolist()), sum(_SIZES.values()))

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
    self.assert_refused(
      lambda: self.split(windows), f'{windows} windows', '4', '18', 'context'
    )


if __name__ == '__main__':
  absltest.main()
