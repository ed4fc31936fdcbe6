import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.models.decoder import Decoder
from ffp_jax.pruning import importance
from tests import testing

_NAMES = ('llama_grouped', 'llama_biased', 'opt_pre_norm')


@functools.cache
def _captured_apply(name):
  decoder = Decoder(testing.pair(name).config, importance.square_sum)

  def apply(params, tokens):
    _, variables = decoder.apply({'params': params}, tokens, mutable='captured')
    stack = variables['captured']['stack']
    return stack['attention']['inputs'], stack['ffn']['inputs']

  return apply


@functools.cache
def _norms(name, batches):
  """`input_norms` of 6 windows in so many batches."""
  tokens = testing.tokens(6, 9).reshape(batches, -1, 9)
  return jax.jit(importance.input_norms, static_argnums=0)(
    _captured_apply(name), testing.pair(name).params, tokens
  )


def _out_weights(name):
  stack = testing.pair(name).params['stack']
  return stack['attention']['out'], stack['ffn']['down']


def _numpy_scores(name, root_mean_squares):
  """Loops over units, from PyTorch's weights [D, inputs].

  Args:
    name: of the model.
    root_mean_squares: of each layer's inputs, (attention [L,KGH], FFN [L,F]).
  """
  pair = testing.pair(name)
  c = pair.config
  width = c.heads_per_group * c.head_size
  attention = np.zeros((c.layers, c.groups))
  ffn = np.zeros((c.layers, c.ffn))
  for i, block in enumerate(testing.blocks(pair.torch)):
    out, down = (
      np.abs(block[x].weight.numpy().astype(np.float64)) * rms[i]
      for x, rms in zip(('out', 'down'), root_mean_squares, strict=True)
    )
    for k in range(c.groups):
      attention[i, k] = out[:, k * width : (k + 1) * width].sum()
    for f in range(c.ffn):
      ffn[i, f] = down[:, f].sum()
  return attention, ffn


class ScoresTest(parameterized.TestCase):
  @parameterized.parameters(*_NAMES)
  def test_norms_are_those_of_pytorch_activations(self, name):
    c = testing.pair(name).config
    inputs = testing.output_inputs(testing.pair(name), testing.tokens(6, 9))
    ours = _norms(name, 3)
    self.assertEqual(
      ours[0].shape, (c.layers, c.groups, c.heads_per_group, c.head_size)
    )
    self.assertEqual(ours[1].shape, (c.layers, c.ffn))
    for got, activations in zip(ours, inputs, strict=True):
      expected = np.sqrt(np.square(activations.astype(np.float64)).mean((1, 2)))
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)

  @parameterized.parameters(*_NAMES)
  def test_wanda(self, name):
    c = testing.pair(name).config
    inputs = testing.output_inputs(testing.pair(name), testing.tokens(6, 9))
    expected = _numpy_scores(
      name,
      [
        np.sqrt(np.square(x.astype(np.float64)).mean((1, 2))).reshape(
          c.layers, -1
        )
        for x in inputs
      ],
    )
    ours = importance.wanda(_out_weights(name), _norms(name, 3))
    for got, want in zip(ours, expected, strict=True):
      self.assertEqual(got.dtype, np.float32)
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
      self.assertGreater(np.std(want), 0.0)

  @parameterized.parameters('llama_grouped', 'opt_pre_norm')
  def test_batches_in_a_scan_are_one_large_batch(self, name):
    for got, want in zip(_norms(name, 3), _norms(name, 1), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


class SquareSumTest(parameterized.TestCase):
  @parameterized.parameters((2, 3, 5), (2, 3, 2, 4, 5))
  def test_sums_over_batch_and_time(self, *shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(
      importance.square_sum(x), np.square(x).sum((0, 1)), rtol=1e-6
    )

  @parameterized.parameters(np.float16, 'bfloat16')
  def test_half_precision_is_summed_in_float32(self, dtype):
    # 4096 ones: 256 is bfloat16's last, and 300 squared float16's infinity.
    ones = jax.numpy.ones((4, 1024, 2), dtype)
    got = importance.square_sum(ones)
    self.assertEqual(got.dtype, np.float32)
    np.testing.assert_array_equal(got, 4096.0)
    np.testing.assert_array_equal(
      importance.square_sum(300 * ones[:1, :1]), 90000.0
    )


if __name__ == '__main__':
  absltest.main()
