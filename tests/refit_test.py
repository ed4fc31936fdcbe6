import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.models.decoder import Masks
from ffp_jax.models.functional import make_apply, make_capture
from ffp_jax.pruning import masks
from ffp_jax.pruning import refit as refit_lib
from tests import testing, tiny_run


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


_BASIS = jax.jit(refit_lib.refit_basis)
_STRENGTH = 0.1
_NAMES = 'llama_grouped', 'mistral_short_window', 'opt_post_norm_projected'


def _refit(x, w, kept, ridge):
  """X_k W', W' the ridge regression of X W on the kept inputs, near W."""
  rows = np.vstack([x[:, kept], np.sqrt(ridge) * np.eye(kept.sum())])
  missing = x[:, ~kept] @ w[~kept]
  aim = np.vstack([missing, np.zeros((kept.sum(), w.shape[1]))])
  change = np.linalg.lstsq(rows, aim, rcond=None)[0]
  return x[:, kept] @ (w[kept] + change)


class BasisTest(parameterized.TestCase):
  @parameterized.product(seed=(0, 1, 2), strength=(0.01, 0.3), size=(1, 2, 3))
  def test_a_mask_leaves_what_a_regression_does(self, seed, strength, size):
    source = np.random.default_rng(seed)
    units = 7
    mix = source.standard_normal((units * size, units * size))
    x = source.standard_normal((60, units * size)) @ mix
    w = source.standard_normal((units * size, 5))
    rank = source.permutation(units)
    gram = x.T @ x
    refit, weight = map(
      np.asarray,
      _BASIS(np.float32(gram), np.float32(w), np.int32(rank), strength),
    )
    ridge = strength * np.trace(gram) / len(gram)
    atol = 2e-3 * np.abs(x @ w).max()
    for count in range(units + 1):
      kept = np.repeat(rank < count, size)
      ours = x @ refit * kept @ weight
      np.testing.assert_allclose(ours, _refit(x, w, kept, ridge), atol=atol)
      # Removed inputs have no part in it, whatever they are.
      fresh = source.standard_normal(x.shape)
      np.testing.assert_allclose(
        (x * kept + fresh * ~kept) @ refit * kept @ weight, ours, atol=atol
      )

  def test_a_matrix_that_cannot_be_factorised_changes_nothing(self):
    gram = np.array([[1.0, 2.0], [2.0, 1.0]], np.float32)  # indefinite
    weight = np.eye(2, 3, dtype=np.float32)
    refit, new = _BASIS(gram, weight, np.arange(2), 0.0)
    np.testing.assert_array_equal(refit, np.eye(2))
    np.testing.assert_array_equal(new, weight)


@functools.cache
def _refitting(name):
  """(pair, ranks, calibration windows, the decoder whose masks refit)."""
  pair = testing.pair(name)
  source = np.random.default_rng(0)
  config = pair.config
  shapes = (config.layers, config.groups), (config.layers, config.ffn)
  rank = masks.rank_all(Masks(*(source.random(s) for s in shapes)))
  windows = testing.tokens(4, 16)[:, None]
  found = refit_lib.refit_model(
    pair.params, config, rank, windows, strength=_STRENGTH
  )
  return pair, rank, windows, found


class RefittingTest(parameterized.TestCase):
  @parameterized.parameters(*_NAMES)
  def test_without_masks_it_is_the_dense_decoder(self, name):
    pair, _, windows, (config, params) = _refitting(name)
    ours = jax.jit(make_apply(config))(params, windows[0], None)
    theirs = jax.jit(make_apply(pair.config))(pair.params, windows[0], None)
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())
    ones = masks.ones(config.layers, config.groups, config.ffn)
    again = jax.jit(make_apply(config))(params, windows[0], ones)
    np.testing.assert_allclose(ours, again, atol=1e-3 * np.abs(ours).max())

  @parameterized.parameters(*_NAMES)
  def test_a_cut_module_is_refit_on_the_dense_models_inputs(self, name):
    """Of the first layer's FFN, whose output the next layer sees."""
    pair, rank, windows, (config, params) = _refitting(name)
    inputs = jax.jit(make_capture(pair.config, lambda x: x))
    entered = [
      np.asarray(inputs(pair.params, w)[1], np.float64) for w in windows
    ]
    x = np.concatenate([e[0].reshape(-1, config.ffn) for e in entered])
    w = np.asarray(pair.params['stack']['ffn']['down'][0], np.float64)
    ridge = _STRENGTH * np.sum(x**2) / config.ffn
    stack = params['stack']['ffn']
    kept = np.asarray(rank.ffn[0]) < config.ffn // 2
    ours = x @ stack['refit'][0] * kept @ stack['down'][0]
    theirs = _refit(x, w, kept, ridge)
    np.testing.assert_allclose(ours, theirs, atol=3e-3 * np.abs(x @ w).max())
    # And it comes closer to the whole output than the cut alone.
    whole, cut = x @ w, x[:, kept] @ w[kept]
    self.assertLess(np.square(ours - whole).sum(), np.square(cut - whole).sum())


if __name__ == '__main__':
  absltest.main()
