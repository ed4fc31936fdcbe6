import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl.testing import absltest, parameterized

from ffp_jax import export
from ffp_jax.errors import RequestError
from ffp_jax.models import decoding
from ffp_jax.models.decoder import Decoder
from ffp_jax.pruning import masks
from tests import testing, tiny_run

_TIME = 11
_CHUNKS = (5, 3, 1, 1, 1)
# Its frequencies change as the context grows, but keys in a cache do not.
_STRETCHED = 'llama_dynamic'
_ALIKE = tuple(name for name in testing.CASES if name != _STRETCHED)


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _in_chunks(params, tokens, config, keep=None, slots=13):
  """Returns the logits [B,T,V] of two prefills, then token by token."""
  cache = decoding.empty_cache(config, len(tokens), slots, np.float32)
  out = []
  for end, count in zip(itertools.accumulate(_CHUNKS), _CHUNKS, strict=True):
    chunk = tokens[:, end - count : end]
    logits, cache = decoding.forward(params, chunk, cache, keep, config=config)
    out.append(logits)
  np.testing.assert_array_equal(cache.length, [_TIME] * len(tokens))
  return np.concatenate(out, axis=1)


@functools.cache
def _cached(name, masked=True):
  pair = testing.pair(name)
  keep = testing.random_masks(pair.config) if masked else None
  return _in_chunks(pair.params, testing.tokens(2, _TIME), pair.config, keep)


def _torch_in_chunks(model, tokens):
  """Does the same in PyTorch, with the cache of transformers."""
  cache, out = transformers.DynamicCache(), []
  for end, count in zip(itertools.accumulate(_CHUNKS), _CHUNKS, strict=True):
    chunk = torch.tensor(tokens[:, end - count : end]).long()
    with torch.no_grad():
      got = model(chunk, past_key_values=cache, use_cache=True)
    out.append(got.logits.numpy())
  return np.concatenate(out, axis=1)


class ForwardTest(parameterized.TestCase):
  def assert_close(self, ours, theirs, tolerance=1e-5):
    """Compares with a tolerance relative to the largest magnitude."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    self.assertEqual(ours.shape, theirs.shape)
    self.assertEqual(ours.dtype, np.float32)
    self.assertTrue(np.isfinite(ours).all())
    largest = np.abs(theirs).max()
    self.assertLess(np.abs(ours - theirs).max() / largest, tolerance)

  @parameterized.parameters(*_ALIKE)
  def test_cached_logits_are_those_without_a_cache(self, name):
    pair = testing.pair(name)
    decoder = Decoder(pair.config)
    apply = jax.jit(lambda p, t, m: decoder.apply({'params': p}, t, m))
    tokens = testing.tokens(2, _TIME)
    keep = testing.random_masks(pair.config)
    self.assert_close(_cached(name), apply(pair.params, tokens, keep))

  @parameterized.parameters(*testing.CASES)
  def test_sliced(self, name):
    pair, tokens = testing.pair(name), testing.tokens(2, _TIME)
    keep = testing.random_masks(pair.config)
    fewer = testing.without_sublayers(keep)
    for kept, masked in (
      (keep, _cached(name)),
      (fewer, _in_chunks(pair.params, tokens, pair.config, fewer)),
    ):
      small, config = export.slice_params(pair.params, pair.config, kept)
      self.assert_close(_in_chunks(small, tokens, config), masked)

  @parameterized.parameters(_STRETCHED, 'mistral_short_window', 'opt_pre_norm')
  def test_against_the_cache_of_transformers(self, name):
    model = testing.torch_model(name)  # its frequencies are a state
    theirs = _torch_in_chunks(model, testing.tokens(2, _TIME))
    self.assert_close(_cached(name, masked=False), theirs)

  def test_stretched_positions_differ_without_a_cache(self):
    # Otherwise the comparison above would prove nothing.
    tokens = testing.tokens(2, _TIME)
    model = testing.torch_model(_STRETCHED)
    whole = testing.torch_logits(model, tokens)
    self.assertGreater(np.abs(_cached(_STRETCHED, masked=False) - whole).max(),
                       0.01)  # fmt: skip

  def test_no_slot_to_spare(self):
    name = 'llama_grouped'
    pair, tokens = testing.pair(name), testing.tokens(2, _TIME)
    keep = testing.random_masks(pair.config)
    full = _in_chunks(pair.params, tokens, pair.config, keep, slots=_TIME)
    self.assert_close(full, _cached(name), 1e-6)

  def test_tokens_beyond_the_slots_harm_no_others(self):
    name = 'llama_grouped'
    pair, tokens = testing.pair(name), testing.tokens(2, _TIME)
    keep = testing.random_masks(pair.config)
    short = _in_chunks(pair.params, tokens, pair.config, keep, slots=10)
    self.assert_close(short[:, :10], _cached(name)[:, :10], 1e-6)


class ContinuationsTest(parameterized.TestCase):
  """Compares with uncached passes over a text that grows by a token."""

  def naive(self, pair, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
      logits = testing.torch_logits(pair.torch, np.array([tokens]))
      tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]

  def continued(self, pair, tokens, real, count, **settings):
    made = decoding.generate_tokens(
      pair.params, tokens, real, config=pair.config, **settings
    )
    return np.concatenate(list(itertools.islice(made, count)), 1).tolist()

  @parameterized.parameters('llama_grouped', 'opt_pre_norm')
  def test_rows_of_different_lengths(self, name):
    pair, tokens = testing.pair(name), testing.tokens(3, 7)
    real = np.array([7, 1, 4])
    got = self.continued(pair, tokens, real, 6, slots=12)
    for row, length, ours in zip(tokens, real, got, strict=True):
      self.assertEqual(ours, self.naive(pair, row[:length], 6))

  def test_ends_when_the_slots_are_full(self):
    pair, tokens = testing.pair('llama_grouped'), testing.tokens(2, 7)
    got = self.continued(pair, tokens, np.array([7, 7]), None, slots=9)
    # The last token needs no slot.
    for row, ours in zip(tokens, got, strict=True):
      self.assertEqual(ours, self.naive(pair, row, 3))

  def test_temperature(self):
    pair = testing.pair('llama_grouped')
    tokens = np.tile(testing.tokens(1, 5), (4000, 1))
    real, settings = np.full(4000, 5), {'slots': 5, 'temperature': 2.0}
    first = self.continued(pair, tokens, real, 1, seed=1, **settings)
    again = self.continued(pair, tokens, real, 1, seed=1, **settings)
    other = self.continued(pair, tokens, real, 1, seed=2, **settings)
    self.assertEqual(first, again)
    self.assertNotEqual(first, other)
    logits = testing.torch_logits(pair.torch, tokens[:1])[0, -1]
    expected = np.asarray(jax.nn.softmax(jnp.asarray(logits) / 2.0))
    found = np.bincount(np.ravel(first), minlength=97) / 4000
    # Four standard deviations of a share.
    bound = 4 * np.sqrt(expected * (1 - expected) / 4000) + 1e-3
    self.assertTrue((np.abs(found - expected) < bound).all())

  def test_choices_differ_from_step_to_step(self):
    pair = testing.pair('llama_grouped')
    tokens = np.tile(testing.tokens(1, 5), (8, 1))
    got = self.continued(
      pair, tokens, np.full(8, 5), 5, slots=9, temperature=1e6
    )
    self.assertGreater(len(set(np.ravel(got))), 20)

  def test_unrolled(self):
    pair, tokens = testing.pair('qwen3_grouped'), testing.tokens(2, 7)
    config = decoding.unroll_layers(pair.config)
    params, sliced = export.slice_params(
      pair.params, pair.config, masks.ones(2, config.groups, config.ffn)
    )
    self.assertEqual(config, sliced)
    self.assertEqual(decoding.unroll_layers(sliced), sliced)
    loose = pair._replace(params=params, config=config)
    self.assertEqual(
      *(self.continued(x, tokens, np.array([7, 3]), 4, slots=12)
        for x in (pair, loose))
    )  # fmt: skip

  def test_more_than_the_learned_positions(self):
    config = testing.pair('opt_pre_norm').config
    decoding.check_slots(config, config.max_positions)
    with self.assertRaisesRegex(RequestError, r'\A21 tokens[^\n]*20'):
      decoding.check_slots(config, 21)
    decoding.check_slots(testing.pair('llama_grouped').config, 10**6)


if __name__ == '__main__':
  absltest.main()
