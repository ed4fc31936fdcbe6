import functools
import types

import numpy as np
import torch
from absl.testing import absltest, parameterized

from ffp_jax import export
from ffp_jax.evaluation import harness_model, likelihood
from tests import testing, tiny_run

_MOST = 20  # tokens of an input; one context is longer
_TOKENS = 150  # of a batch: two contexts with their continuations fill it


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


class SequencesTest(absltest.TestCase):
  def sequences(self, requests, **changes):
    settings = {'max_length': _MOST, 'batch_tokens': _TOKENS} | changes
    found = likelihood.plan_sequences(requests, **settings)
    asked = [query.request for each in found for query in each.queries]
    self.assertCountEqual(asked, range(len(requests)))
    return found

  def test_shared_contexts_are_computed_once(self):
    requests = _requests('llama_grouped')
    found = self.sequences(requests)
    shared = [x for x in found if x.suffixes_NxC.size]
    self.assertEqual([len(x.queries) for x in shared], [8, 8])
    # 'start' of two continuations is the same suffix.
    for each in shared:
      self.assertEqual(each.suffixes_NxC.shape, (4, 16))
    self.assertLen(found, len(requests) - 16 - 1 + 2)

  def test_repeated_contexts(self):
    requests = _requests('llama_grouped')
    for changes in (
      {'share': False},
      {'batch_tokens': 10**4},
      {'batch_tokens': 90},
    ):
      found = self.sequences(requests, **changes)
      self.assertFalse(any(x.suffixes_NxC.size for x in found))
      # Three one-token continuations and a second one of `start`, twice, and
      # a one-token continuation of the long context, need no forward.
      self.assertLen(found, len(requests) - 2 * 4 - 1)

  def test_one_token_continuations_need_one_forward(self):
    requests = [
      (None, [i, 1, 2], [token]) for i in range(5) for token in (3, 4)
    ]
    found = self.sequences(requests)
    self.assertEqual([x.prefix for x in found], [(i, 1, 2) for i in range(5)])
    self.assertEqual([len(x.queries) for x in found], [2] * 5)


if __name__ == '__main__':
  absltest.main()
