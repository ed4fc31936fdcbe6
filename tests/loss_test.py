import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.evaluation import loss
from tests import testing, tiny_run


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _losses(logits, tokens_BxT):
  """Mean loss of each window in float64, from a reference's logits."""
  logits = np.asarray(logits, np.float64)[:, :-1]
  log_prob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  target = tokens_BxT[:, 1:, None]
  return -np.take_along_axis(log_prob, target, axis=-1).mean((1, 2))


class MakeNllTest(parameterized.TestCase):
  @parameterized.parameters('llama_grouped', 'opt_pre_norm')
  def test_dense_and_masked_against_torch(self, name):
    pair = testing.pair(name)
    tokens = testing.tokens(3, 9)
    masks = testing.random_masks(pair.config)
    model = testing.torch_model(name)
    losses = jax.jit(loss.make_nll(pair.config))
    np.testing.assert_allclose(
      losses(pair.params, tokens),
      _losses(testing.torch_logits(model, tokens), tokens),
      rtol=1e-5,
    )
    pruned = testing.without_units(pair, masks)
    np.testing.assert_allclose(
      losses(pair.params, tokens, masks),
      _losses(testing.torch_logits(pruned, tokens), tokens),
      rtol=1e-5,
    )

  def test_remat_changes_no_gradient(self):
    pair = testing.pair('llama_grouped')
    tokens = testing.tokens(3, 9)
    masks = testing.random_masks(pair.config)

    def gradient(remat):
      losses = loss.make_nll(pair.config, remat=remat)
      mean = jax.jit(lambda masks: losses(pair.params, tokens, masks).mean())
      text = str(jax.make_jaxpr(jax.grad(mean))(masks))
      return jax.jit(jax.grad(mean))(masks), 'remat' in text

    plain, remats = gradient(False)
    again, remats_again = gradient(True)
    self.assertEqual((remats, remats_again), (False, True))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
      again,
      plain,
    )


if __name__ == '__main__':
  absltest.main()
