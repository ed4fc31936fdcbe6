import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax import importance, masks, repair
from ffp_jax.evaluate import captured_of
from ffp_jax.model import Masks
from tests import testing, tiny_run


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


_MARGINALS = jax.jit(repair.marginals)


def _problem(seed, units=7, size=2, outputs=5, tokens=60):
  """Correlated inputs [N,I], weights [I,D], ranks [U]."""
  source = np.random.default_rng(seed)
  mix = source.standard_normal((units * size, units * size))
  x = source.standard_normal((tokens, units * size)) @ mix
  w = source.standard_normal((units * size, outputs))
  return x, w, source.permutation(units)


def _errors(x, w, rank, size, ridge):
  """Squared output errors of every count, without and with a refit.

  The refit minimises |X_k D - X_r W_r|^2 + ridge |D|^2 over the change D.
  """
  found = []
  for count in range(len(rank) + 1):
    kept = np.repeat(rank < count, size)
    missing = x[:, ~kept] @ w[~kept]
    plain = np.sum(np.square(missing))
    rows = np.vstack([x[:, kept], np.sqrt(ridge) * np.eye(kept.sum())])
    aim = np.vstack([missing, np.zeros((kept.sum(), w.shape[1]))])
    change = np.linalg.lstsq(rows, aim, rcond=None)[0]
    found.append((plain, np.sum(np.square(rows @ change - aim))))
  return np.array(found).T


class MarginalsTest(parameterized.TestCase):
  @parameterized.product(seed=(0, 1, 2), strength=(0.01, 0.3), size=(1, 2, 3))
  def test_against_least_squares(self, seed, strength, size):
    x, w, rank = _problem(seed, size=size)
    gram = x.T @ x
    plain, mended = _MARGINALS(
      np.float32(gram), np.float32(w), np.int32(rank), strength
    )
    ridge = strength * np.trace(gram) / len(gram)
    for ours, theirs in zip(
      (plain, mended), _errors(x, w, rank, size, ridge), strict=True
    ):
      # The unit at rank r is what is lost between keeping r + 1 and r.
      lost = (theirs[:-1] - theirs[1:])[rank]
      np.testing.assert_allclose(ours, lost, atol=2e-4 * theirs.max())

  def test_what_others_can_say_costs_nothing(self):
    x, w, _ = _problem(0, units=3, size=1)
    x[:, 2] = x[:, 0] - 2.0 * x[:, 1]
    plain, mended = _MARGINALS(
      np.float32(x.T @ x), np.float32(w), np.arange(3), 1e-5
    )
    self.assertLess(mended[2], 1e-2 * plain[2])

  def test_a_failed_factorisation_is_no_repair(self):
    gram = -np.eye(4, dtype=np.float32)
    plain, mended = _MARGINALS(
      gram, np.ones((4, 2), np.float32), np.arange(4), 0.1
    )
    np.testing.assert_array_equal(mended, plain)


class LeftTest(absltest.TestCase):
  def test_share_around_the_cut(self):
    plain = Masks(np.float32([[1, 2, 3]]), np.float32([[4, 4, 4, 4]]))
    mended = Masks(np.float32([[0.5, 1, 9]]), np.float32([[4, 1, 1, 0]]))
    near = Masks(np.float32([[1, 1, 0]]), np.float32([[0, 1, 1, 0]]))
    share = repair.left(repair.Harm(plain, mended), near)
    np.testing.assert_allclose(np.concatenate(share), [0.5, 0.25])
    more = repair.left(
      repair.Harm(plain, mended), Masks(*(1 - n for n in near))
    )
    np.testing.assert_allclose(np.concatenate(more), [1.0, 0.5])

  def test_unknown_harm_changes_nothing(self):
    rank = Masks(np.arange(3)[None], np.arange(4)[None])
    near = Masks(np.ones((1, 3)), np.ones((1, 4)))
    share = repair.left(repair.unknown(rank), near)
    np.testing.assert_array_equal(np.concatenate(share), 1.0)


class ForeseeTest(parameterized.TestCase):
  @parameterized.parameters('llama_grouped', 'opt_pre_norm')
  def test_harm_is_that_of_the_dense_models_inputs(self, name):
    pair = testing.pair(name)
    config, params = pair.config, pair.params
    tokens = testing.tokens(2, 11)
    stack = params['stack']
    weights = stack['attention']['out'], stack['ffn']['down']
    rank = masks.rank_all(importance.magnitude(weights))
    windows = np.asarray(tokens)[:, None]
    found = repair.foresee(params, config, rank, windows, strength=0.1)

    def inputs(x):
      return x.reshape(-1, x.shape[-1] if x.ndim == 3 else x[0, 0].size)

    captured = functools.partial(captured_of(config, inputs), params)
    seen = jax.tree.map(np.asarray, jax.jit(captured)(tokens))
    for plain, mended, ranks, x, w in zip(
      *found, rank, seen, weights, strict=True
    ):
      for i in range(config.layers):
        flat = np.asarray(w[i]).reshape(-1, w.shape[-1])
        expected = _MARGINALS(x[i].T @ x[i], flat, ranks[i], 0.1)
        for ours, theirs in zip((plain[i], mended[i]), expected, strict=True):
          np.testing.assert_allclose(
            ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max()
          )


if __name__ == '__main__':
  absltest.main()
