import numpy as np
from absl.testing import absltest

from ffp_jax.evaluation import batches


class BatchesTest(absltest.TestCase):
  def test_every_row_once_in_few_shapes(self):
    source = np.random.default_rng(0)
    rows = [[1 + i] * n for i, n in enumerate(source.integers(1, 300, 100))]
    made = list(
      batches.make_batches(
        rows, max_length=300, batch_tokens=1000, new_tokens=10
      )
    )
    seen = {}
    for batch in made:
      for row, i in enumerate(batch.index):
        seen[i] = batch.tokens[row, : batch.lengths[row]].tolist()
        self.assertFalse(batch.tokens[row, batch.lengths[row] :].any())
    self.assertEqual([seen[i] for i in range(100)], rows)
    self.assertLen([i for batch in made for i in batch.index], 100)
    shapes = {batch.tokens.shape for batch in made}
    self.assertEqual(shapes, {(3, 300), (3, 256), (7, 128), (13, 64), (23, 32)})
    self.assertEqual(made[0].tokens.shape, (3, 300))

  def test_a_row_longer_than_a_batch(self):
    (batch,) = batches.make_batches([[1] * 50], max_length=64, batch_tokens=10)
    self.assertEqual(batch.tokens.shape, (1, 64))


if __name__ == '__main__':
  absltest.main()
