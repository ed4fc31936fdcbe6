import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.benchmarks import tpu_plans
from ffp_jax.models import families, removed
from ffp_jax.models.decoder import Masks
from ffp_jax.models.functional import make_apply, make_capture
from ffp_jax.pruning import abstract, masks
from ffp_jax.pruning import refit as refit_lib
from tests import testing, tiny_run


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


_FACTORS = jax.jit(refit_lib.refit_factors)
_REMOVED = jax.jit(removed.removed_output)
_STRENGTH = 0.1
_NAMES = 'llama_grouped', 'mistral_short_window', 'opt_post_norm_projected'


def _refit(x, w, kept, ridge):
  """X_k W', W' the ridge regression of X W on the kept inputs, near W."""
  rows = np.vstack([x[:, kept], np.sqrt(ridge) * np.eye(kept.sum())])
  missing = x[:, ~kept] @ w[~kept]
  aim = np.vstack([missing, np.zeros((kept.sum(), w.shape[1]))])
  change = np.linalg.lstsq(rows, aim, rcond=None)[0]
  return x[:, kept] @ (w[kept] + change)


def _factors(seed, *, units=7, size=1, strength=0.1):
  """Random inputs [N,I], weights [I,D], ranks [U], and the factors of them."""
  source = np.random.default_rng(seed)
  mix = source.standard_normal((units * size, units * size))
  x = source.standard_normal((60, units * size)) @ mix
  w = source.standard_normal((units * size, 5))
  rank = source.permutation(units)
  refit = _FACTORS(np.float32(x.T @ x), np.float32(w), np.int32(rank), strength)
  return x, w, rank, refit


class FactorsTest(parameterized.TestCase):
  @parameterized.product(seed=(0, 1, 2), strength=(0.01, 0.3), size=(1, 2, 3))
  def test_a_mask_leaves_what_a_regression_does(self, seed, strength, size):
    x, w, rank, refit = _factors(seed, size=size, strength=strength)
    ridge = strength * np.sum(x**2) / x.shape[1]
    atol = 2e-3 * np.abs(x @ w).max()

    def refitted(x, mask):
      return (x @ w) - _REMOVED(np.float32(x)[None], mask, refit)[0]

    fresh = np.random.default_rng(seed).standard_normal(x.shape)
    for count in range(len(rank) + 1):
      mask = np.float32(rank < count)
      kept = np.repeat(rank < count, size)
      ours = refitted(x, mask)
      np.testing.assert_allclose(ours, _refit(x, w, kept, ridge), atol=atol)
      # Removed inputs have no part in it, whatever they are.
      np.testing.assert_allclose(
        refitted(x * kept + fresh * ~kept, mask), ours, atol=atol
      )

  def test_a_matrix_that_cannot_be_factorised_changes_nothing(self):
    gram = np.array([[1.0, 2.0], [2.0, 1.0]], np.float32)  # indefinite
    weight = np.eye(2, 3, dtype=np.float32)
    refit = _FACTORS(gram, weight, np.array([1, 0]), 0.0)
    x = np.float32([[[3.0, 5.0]]])
    for mask in ([1.0, 0.0], [0.0, 1.0], [0.0, 0.0]):
      taken = _REMOVED(x, np.float32(mask), refit)
      np.testing.assert_array_equal(taken, x * (1 - np.array(mask)) @ weight)

  def test_beside_bfloat16_a_number_takes_a_byte(self):
    x, w, rank, refit = _factors(6, units=24, strength=_STRENGTH)
    short = removed.store(refit, jnp.bfloat16)
    for ours, theirs in zip(short[:2], refit[:2], strict=True):
      self.assertEqual(ours.nbytes, theirs.size)
    for ours, theirs in zip(short[2:], refit[2:], strict=True):
      self.assertEqual(ours.dtype, theirs.dtype)
    # bfloat16 holds the scales, which are powers of two.
    scale = np.asarray(short.scale_CxJ, np.float64)
    np.testing.assert_array_equal(scale, 2 ** np.round(np.log2(scale)))
    for count in (0, 9, 20, 23):
      mask = np.float32(rank < count)
      exact = _REMOVED(np.float32(x)[None], mask, refit)
      rough = _REMOVED(np.float32(x)[None], mask, short)
      error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
      self.assertBetween(error, 1e-4, 0.1)
    same = removed.store(refit, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, same, refit)

  @parameterized.parameters(1, 2)
  def test_gradient_is_that_of_the_products(self, size):
    x, _, rank, refit = _factors(3, units=24, size=size)
    mask = np.where(rank < 17, 1.0, 0.0) + np.where(rank == 17, 0.3, 0.0)
    aim = np.random.default_rng(0).standard_normal((60, 5))
    basis, weight, _, _ = refit
    flat_basis = np.concatenate([*basis], axis=1)[:, : x.shape[1]]
    flat_weight = np.concatenate([*weight])[: x.shape[1]]

    def plainly(x, mask):
      left = jnp.repeat(1.0 - mask[refit.order_U], size)
      return jnp.sum((x @ flat_basis * left) @ flat_weight * aim)

    def ours(x, mask):
      return jnp.sum(removed.removed_output(x[None], mask, refit)[0] * aim)

    arguments = np.float32(x), np.float32(mask)
    values = [
      jax.value_and_grad(f, (0, 1))(*arguments) for f in (plainly, ours)
    ]
    (value, (dx, dmask)), (found, (found_dx, found_dmask)) = values
    np.testing.assert_allclose(found, value, rtol=1e-4)
    np.testing.assert_allclose(found_dx, dx, atol=1e-4 * np.abs(dx).max())
    gone = rank >= 17
    atol = 1e-4 * np.abs(dmask).max()
    np.testing.assert_allclose(found_dmask[gone], dmask[gone], atol=atol)
    # Of blocks that keep all of their units nothing is computed.
    np.testing.assert_array_equal(found_dmask[rank < 15], 0.0)

  def test_masks_mapped_over_share_their_blocks(self):
    x, _, rank, refit = _factors(5, units=24)
    masks = np.float32([rank < 17, rank < 12, rank < 24])
    x = np.float32(x)[None]

    def value(mask, refit):
      return jnp.sum(jnp.sin(removed.removed_output(x, mask, refit)))

    measure = jax.value_and_grad(value)
    found, gradients = jax.jit(jax.vmap(measure, (0, None)))(masks, refit)
    for i, mask in enumerate(masks):
      alone, gradient = measure(mask, refit)
      np.testing.assert_allclose(found[i], alone, rtol=1e-4)
      gone = (mask == 0) | (rank == 23)
      np.testing.assert_allclose(
        gradients[i, gone], gradient[gone], rtol=1e-3, atol=1e-3
      )
    # Four blocks of three units are kept by all.
    poisoned = refit._replace(basis_CxIxJ=refit.basis_CxIxJ.at[:4].set(np.nan))
    again = jax.jit(jax.vmap(value, (0, None)))(masks, poisoned)
    np.testing.assert_allclose(again, found, rtol=1e-4)

  def test_blocks_that_keep_all_are_skipped(self):
    x, _, rank, refit = _factors(4, units=24)
    mask = np.float32(rank < 17)
    poisoned = refit._replace(
      basis_CxIxJ=refit.basis_CxIxJ.at[:5].set(np.nan),
      weight_CxJxD=refit.weight_CxJxD.at[:5].set(np.nan),
    )
    x = np.float32(x)[None]
    np.testing.assert_array_equal(
      _REMOVED(x, mask, poisoned), _REMOVED(x, mask, refit)
    )
    # The last unit has a gradient where nothing is removed, too.
    found = jax.grad(lambda m: jnp.sum(_REMOVED(x, m, refit)))(
      np.ones_like(mask)
    )
    self.assertGreater(np.abs(found[rank == 23]).min(), 0.0)


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
  def test_in_bfloat16_masks_leave_nearly_the_same(self, name):
    pair, rank, windows, (config, params) = _refitting(name)
    _, short = refit_lib.refit_model(
      jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair.params),
      pair.config,
      rank,
      windows,
      strength=_STRENGTH,
    )
    # As a plan has it, which knows no values.
    planned = families.param_shapes(config, jnp.bfloat16)
    found = jax.tree.map(lambda x: (x.shape, x.dtype), short)
    self.assertEqual(found, jax.tree.map(lambda x: (x.shape, x.dtype), planned))
    keep = masks.from_counts(
      rank, np.repeat([config.groups // 2, config.ffn // 2], config.layers)
    )
    apply = jax.jit(make_apply(config))
    exact, rough = (apply(p, windows[0], keep) for p in (params, short))
    dense = apply(params, windows[0], None)
    taken = np.linalg.norm(exact - dense)
    self.assertLess(np.linalg.norm(rough - exact), 0.1 * taken)

  def test_beside_bfloat16_the_factors_take_half_of_the_weights(self):
    model = tpu_plans.MODELS['llama-2-7b']
    dense, refit = (
      abstract.local_bytes(families.param_shapes(config, jnp.bfloat16))
      for config in (model, dataclasses.replace(model, refit=True))
    )
    self.assertBetween(refit / dense, 1.4, 1.48)

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
    refit = removed.Refit(*(stack[f'refit_{y}'][0] for y in removed.FACTORS))
    kept = np.asarray(rank.ffn[0]) < config.ffn // 2
    taken = _REMOVED(np.float32(x)[None], np.float32(kept), refit)[0]
    ours = x @ w - taken
    theirs = _refit(x, w, kept, ridge)
    np.testing.assert_allclose(ours, theirs, atol=3e-3 * np.abs(x @ w).max())
    # And it comes closer to the whole output than the cut alone.
    whole, cut = x @ w, x[:, kept] @ w[kept]
    self.assertLess(np.square(ours - whole).sum(), np.square(cut - whole).sum())


if __name__ == '__main__':
  absltest.main()
