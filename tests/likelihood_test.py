import functools
import types

import numpy as np
import torch
from absl.testing import absltest, parameterized

from ffp_jax import export
from ffp_jax.evaluation import harness_model, likelihood
from tests import testing, tiny_run

_MOST = 20  # tokens of an input; one context is longer
_TOKENS = 150  # computed together


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _likeliest(model, context, count) -> list[int]:
  """What a model goes on with."""
  said = []
  for _ in range(count):
    logits = testing.torch_logits(model, [_padded(context + said)])
    said.append(int(logits[0, len(context + said) - 1].argmax()))
  return said


def _padded(row) -> list[int]:
  return row + [0] * (_MOST - len(row))


@functools.cache
def _requests(name) -> list[tuple]:
  """Contexts with one and with many continuations, one-token ones among them.

  Some of them are the likeliest, and the last context loses its start.
  """
  model, source = testing.torch_model(name), np.random.default_rng(0)
  draw = lambda count: source.integers(0, 97, count).tolist()  # noqa: E731
  requests = []
  for length in (9, 5):
    context = draw(length)
    said = _likeliest(model, context, 4)
    start = draw(2)
    continuations = [said[:1], draw(1), said, start + draw(1), start + draw(1)]
    continuations += [draw(4), draw(6), draw(1)]
    requests += [(None, context, each) for each in continuations]
  alone, long = draw(4), draw(40)
  requests += [(None, alone, draw(3)), (None, draw(1), draw(19))]
  requests += [(None, long, draw(n)) for n in (1, 1, 3, 2, 3)]
  return [requests[i] for i in source.permutation(len(requests))]


def _plain(model, requests) -> list[tuple[float, bool]]:
  """The answers of PyTorch, a forward each."""
  out = []
  for _, context, continuation in requests:
    row = (context + continuation)[-_MOST - 1 :]
    # Positions that stretch with the context see the padding.
    logits = testing.torch_logits(model, [_padded(row[:-1])])
    logits = torch.tensor(logits[0, : len(row) - 1][-len(continuation) :])
    log_prob = torch.log_softmax(logits.double(), -1)
    total = sum(
      log_prob[i, token].item() for i, token in enumerate(continuation)
    )
    hit = log_prob.argmax(-1).tolist() == continuation
    out.append((total, hit))
  return out


def _answers(config, params, requests, tokens=_TOKENS):
  tokenizer = types.SimpleNamespace(eos_token_id=0)  # requests are token ids
  model = harness_model.JaxLM(
    params, config, tokenizer, max_length=_MOST, batch_tokens=tokens
  )
  return model._loglikelihood_tokens(requests, disable_tqdm=True)


class AnswersTest(parameterized.TestCase):
  def assert_same(self, ours, theirs):
    for (total, hit), (expected, expected_hit) in zip(
      ours, theirs, strict=True
    ):
      self.assertAlmostEqual(total, expected, delta=1e-4)
      self.assertEqual(hit, expected_hit)

  @parameterized.parameters(*testing.CASES)
  def test_against_torch(self, name):
    pair, requests = testing.pair(name), _requests(name)
    theirs = _plain(testing.torch_model(name), requests)
    self.assert_same(_answers(pair.config, pair.params, requests), theirs)
    hits = [hit for _, hit in theirs]
    self.assertGreater(sum(hits), 2)
    self.assertFalse(all(hits))

  @parameterized.parameters('llama_grouped', 'mistral_short_window')
  def test_sliced(self, name):
    pair, requests = testing.pair(name), _requests(name)
    masks = testing.random_masks(pair.config)
    theirs = _plain(testing.without_units(pair, masks), requests)
    small, config = export.slice_params(pair.params, pair.config, masks)
    self.assert_same(_answers(config, small, requests), theirs)


class RowsTest(absltest.TestCase):
  def rows(self, requests, **changes):
    settings = {'max_length': _MOST, 'batch_tokens': _TOKENS} | changes
    found = [*likelihood.plan_rows(requests, **settings)]
    asked = [query.request for rows in found for query in rows.queries]
    self.assertCountEqual(asked, range(len(requests)))
    for rows in found:
      self.assertLessEqual(rows.tokens_BxT.size, settings['batch_tokens'])
    return found

  def computed(self, rows) -> int:
    return sum(int(np.count_nonzero(each.tree_BxT)) for each in rows)

  def test_a_context_and_what_continuations_share_is_computed_once(self):
    requests = [(None, [5, 6, 7], x) for x in ([1], [2], [3, 4], [3, 8])]
    requests.append((None, [5, 6, 7], [9, 9, 9]))
    (rows,) = self.rows(requests)
    self.assertEqual(rows.tokens_BxT[0, :6].tolist(), [5, 6, 7, 3, 9, 9])
    self.assertEqual(rows.positions_BxT[0, :6].tolist(), [0, 1, 2, 3, 3, 4])
    self.assertEqual(rows.branch_BxT[0, :6].tolist(), [0, 0, 0, 1, 2, 2])
    self.assertEqual(self.computed([rows]), 6)
    at = {query.request: query.at for query in rows.queries}
    wanted = {0: (2,), 1: (2,), 2: (2, 3), 3: (2, 3), 4: (2, 4, 5)}
    self.assertEqual(at, wanted)

  def test_trees_of_several_lengths_fill_rows(self):
    requests = [(None, [i] * n, [1]) for i, n in enumerate((12, 8, 7, 7, 6), 1)]
    (rows,) = self.rows(requests)
    self.assertEqual(rows.tree_BxT.shape, (_TOKENS // _MOST, _MOST))
    self.assertEqual(rows.tree_BxT.max(axis=1)[:3].tolist(), [2, 3, 0])
    self.assertEqual(self.computed([rows]), 40)

  def test_rows_have_few_lengths(self):
    source = np.random.default_rng(0)
    requests = [
      (None, [*source.integers(1, 97, n)], [1, 2])
      for n in (*source.integers(1, 90, 200), *source.integers(1, 900, 20))
    ]
    rows = self.rows(requests, max_length=900, batch_tokens=2048)
    shapes = {each.tokens_BxT.shape for each in rows}
    self.assertEqual(shapes, {(2, 900), (4, 512), (8, 256)})
    padded = sum(each.tokens_BxT.size for each in rows)
    self.assertLess(padded, 1.25 * self.computed(rows))

  def test_a_row_to_each_continuation_where_nothing_is_shared(self):
    requests = _requests('llama_grouped')
    rows = self.rows(requests, share=False)
    trees = [each.tree_BxT.max(axis=1) for each in rows]
    self.assertEqual(np.concatenate(trees).max(), 1)
    # Three one-token continuations and a second one of `start`, twice, and a
    # one-token continuation of the long context, need no row.
    self.assertEqual(np.concatenate(trees).sum(), len(requests) - 2 * 4 - 1)

  def test_continuations_too_many_for_a_row_have_their_own(self):
    requests = [(None, [1] * 10, [i, i, i]) for i in range(20)]
    rows = self.rows(requests)
    self.assertEqual(self.computed(rows), 20 * 12)


if __name__ == '__main__':
  absltest.main()
