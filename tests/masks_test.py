import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import masks


def _numpy_ranks(score):
  """Place of each unit of a row, written as a loop."""
  rank = np.empty(score.shape, np.int32)
  for row in np.ndindex(score.shape[:-1]):
    units = range(score.shape[-1])
    best_first = sorted(units, key=lambda u, row=row: (-score[row][u], u))
    for place, unit in enumerate(best_first):
      rank[row][unit] = place
  return rank


class RanksTest(parameterized.TestCase):
  @parameterized.parameters(*range(20))
  def test_ties_break_by_index(self, seed):
    source = np.random.default_rng(seed)
    # 4 values in 40 places: mostly ties.
    score = source.integers(0, 4, (3, 40)).astype(np.float32) / 3
    np.testing.assert_array_equal(masks.ranks(score), _numpy_ranks(score))
    np.testing.assert_array_equal(
      np.argsort(masks.ranks(score), axis=-1),
      np.argsort(-score, axis=-1, kind='stable'),
    )

  def test_distinct_scores(self):
    score = np.random.default_rng(0).standard_normal((2, 5, 33))
    score = score.astype(np.float32)
    got = jax.jit(masks.ranks)(score)
    self.assertEqual(got.dtype, jnp.int32)
    np.testing.assert_array_equal(got, _numpy_ranks(score))

  @parameterized.parameters(
    ([0.0, -0.0, 0.0, -0.0], [0, 1, 2, 3]),
    ([1.0, np.inf, -np.inf, 2.0], [2, 0, 3, 1]),
    # What isn't a number is the first to go.
    ([np.nan, 1.0, -np.inf, np.nan], [2, 0, 1, 3]),
    ([1.0, 1.0 + 2.0**-23, 1.0], [1, 0, 2]),
    ([7.0], [0]),
  )
  def test_special_values(self, score, expected):
    got = masks.ranks(np.array(score, np.float32))
    self.assertEqual(got.tolist(), expected)

  def test_equal_under_vmap_and_jit(self):
    source = np.random.default_rng(1)
    score = source.integers(0, 3, (6, 9)).astype(np.float32)
    whole = masks.ranks(score)
    np.testing.assert_array_equal(jax.jit(jax.vmap(masks.ranks))(score), whole)

  def test_rank_all_keeps_attention_and_ffn_apart(self):
    source = np.random.default_rng(2)
    scores = Masks(source.random((2, 3)), source.random((2, 7)))
    rank = masks.rank_all(scores)
    np.testing.assert_array_equal(
      rank.attention, _numpy_ranks(scores.attention)
    )
    np.testing.assert_array_equal(rank.ffn, _numpy_ranks(scores.ffn))


class FromCountsTest(parameterized.TestCase):
  @parameterized.parameters(*range(20))
  def test_keeps_exactly_the_best(self, seed):
    source = np.random.default_rng(seed)
    L, K, F = 3, 5, 17
    scores = Masks(
      source.integers(0, 3, (L, K)).astype(np.float32),
      source.integers(0, 5, (L, F)).astype(np.float32),
    )
    count_S = np.concatenate(
      [source.integers(0, K + 1, L), source.integers(0, F + 1, L)]
    ).astype(np.int32)
    got = masks.from_counts(masks.rank_all(scores), count_S)
    for mask_LxU, score_LxU, count_L in zip(
      got, scores, np.split(count_S, 2), strict=True
    ):
      self.assertEqual(mask_LxU.dtype, jnp.float32)
      expected = np.zeros(score_LxU.shape, np.float32)
      for layer, count in enumerate(count_L):
        best_first = np.argsort(-score_LxU[layer], kind='stable')
        expected[layer, best_first[:count]] = 1.0
      np.testing.assert_array_equal(mask_LxU, expected)
      np.testing.assert_array_equal(mask_LxU.sum(-1), count_L)

  def test_a_larger_count_only_adds_units(self):
    score = np.random.default_rng(0).integers(0, 4, (1, 12)).astype(np.float32)
    rank = masks.rank_all(Masks(score, score))
    before = np.zeros((1, 12))
    for count in range(13):
      after = masks.from_counts(rank, jnp.array([count, count])).ffn
      self.assertTrue((after >= before).all())
      self.assertEqual(after.sum(), count)
      before = after

  def test_a_count_that_is_not_whole_keeps_a_part_of_a_unit(self):
    rank = Masks(jnp.array([[1, 0, 2]]), jnp.array([[3, 1, 0, 2]]))
    got = masks.from_counts(rank, jnp.array([1.75, 0.5]))
    np.testing.assert_array_equal(got.attention, [[0.75, 1.0, 0.0]])
    np.testing.assert_array_equal(got.ffn, [[0.0, 0.0, 0.5, 0.0]])

  def test_dense_counts_are_ones(self):
    source = np.random.default_rng(0)
    scores = Masks(source.random((2, 3)), source.random((2, 7)))
    got = masks.from_counts(masks.rank_all(scores), jnp.array([3, 3, 7, 7]))
    for mask, one in zip(got, masks.ones(2, 3, 7), strict=True):
      np.testing.assert_array_equal(mask, one)
      np.testing.assert_array_equal(one, np.ones_like(mask))

  def test_many_candidates_at_once(self):
    source = np.random.default_rng(0)
    rank = masks.rank_all(Masks(source.random((2, 3)), source.random((2, 7))))
    count_NxS = np.stack(
      [source.integers(0, 4, (5, 2)), source.integers(0, 8, (5, 2))], 1
    ).reshape(5, 4)
    got = jax.jit(jax.vmap(masks.from_counts, (None, 0)))(rank, count_NxS)
    for i, count_S in enumerate(count_NxS):
      one = masks.from_counts(rank, count_S)
      np.testing.assert_array_equal(got.attention[i], one.attention)
      np.testing.assert_array_equal(got.ffn[i], one.ffn)


if __name__ == '__main__':
  absltest.main()
