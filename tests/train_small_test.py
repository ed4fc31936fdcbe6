"""The small models of benchmarks/train_small.py, made smaller still."""

import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized

import ffp_jax
from ffp_jax.benchmarks import train_small
from ffp_jax.errors import RequestError
from tests import tiny_run

_SMALLER = {
  'vocab_size': 300,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 32,
}


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


class TrainSmallTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.out, self.data = folder / 'model', folder / 'text.txt'
    self.data.write_text(tiny_run.text())
    smaller = {
      name: x
      | _SMALLER
      | {key: 48 for key in ('ffn_dim', 'intermediate_size') if key in x}
      | ({'num_key_value_heads': 2} if 'num_key_value_heads' in x else {})
      for name, x in train_small.FAMILIES.items()
    }
    sizes = {
      'FAMILIES': smaller,
      '_VOCAB': 300,
      '_CONTEXT': 32,
      '_ROWS': 4,
      '_VALIDATION': 4,
    }
    self.enterContext(absltest.mock.patch.multiple(train_small, **sizes))

  def _make(self, family, tokens):
    return train_small.make_model(
      family, str(self.data), self.out, tokens=tokens, seed=0
    )

  @parameterized.parameters(*train_small.FAMILIES)
  def test_learns_and_is_a_model_as_any_other(self, family):
    ppl = self._make(family, 160 * 4 * 32)
    self.assertLess(ppl, 150.0)  # of 300 tokens
    found = ffp_jax.load_model(str(self.out))
    kind = json.loads((self.out / 'config.json').read_text())['model_type']
    self.assertEqual(kind, family.split('_')[0])
    again = ffp_jax.perplexity(found, str(self.data), context=32)
    self.assertLess(again, 150.0)

  def test_refuses(self):
    self.data.write_text('Too short.')
    with self.assertRaisesRegex(RequestError, '--data: .*give a longer text'):
      self._make('opt', 1024)
    self.assertFalse(self.out.exists())
    self.out.mkdir()
    with self.assertRaisesRegex(RequestError, '--out: .* exists'):
      self._make('opt', 1024)


if __name__ == '__main__':
  absltest.main()
