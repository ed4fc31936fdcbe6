import numpy as np
import transformers
from absl.testing import absltest, parameterized
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ffp_jax.errors import RequestError
from ffp_jax.models import rope
from ffp_jax.models.json_fields import Fields

_LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
_YARN = {
  'type': 'yarn',
  'factor': 4.0,
  'original_max_position_embeddings': 32768,
}
# name -> (max_position_embeddings, rope_theta, rope_scaling)
_CASES = {
  'vicuna_16k': (4096, 10000.0, {'type': 'linear', 'factor': 4.0}),
  'dynamic': (2048, 10000.0, {'type': 'dynamic', 'factor': 2.0}),
  'llama_3.1': (131072, 500000.0, _LLAMA3),
  'llama_3.2': (131072, 500000.0, _LLAMA3 | {'factor': 32.0}),
  'qwen_128k': (32768, 1000000.0, _YARN),
  'yarn_whole_range': (131072, 50.0, _YARN | {'beta_slow': 1e-3}),
  'yarn_one_index': (64, 1e6, _YARN | {'original_max_position_embeddings': 8}),
  'yarn_amplitude': (131072, 10000.0, _YARN | {'attention_factor': 1.25}),
  'yarn_scales': (
    131072,
    10000.0,
    _YARN | {'mscale': 0.7, 'mscale_all_dim': 0.3, 'truncate': False},
  ),
  'yarn_implied': (131072, 10000.0, _YARN | {'factor': None}),
}


def _read(head_size=64, positions=2048, theta=10000.0, **values):
  absent = {'partial_rotary_factor': 1.0, 'rope_theta': theta}
  values = absent | {'max_position_embeddings': positions} | values
  return rope.read_scaling(Fields('config.json', values), head_size)


class FrequenciesTest(parameterized.TestCase):
  """Compares with PyTorch transformers, with the numbers of real models."""

  @parameterized.product(
    name=tuple(_CASES),
    head_size=(64, 128),
    key=('rope_scaling', 'rope_parameters'),
  )
  def test_frequencies(self, name, head_size, key):
    positions, theta, scaling = _CASES[name]
    config = transformers.LlamaConfig(
      head_dim=head_size,
      max_position_embeddings=positions,
      rope_theta=theta,
      rope_scaling=dict(scaling),
    )
    kind = config.rope_parameters['rope_type']
    read_theta, ours = _read(head_size, positions, theta, **{key: scaling})
    self.assertEqual(read_theta, theta)
    hash(ours)
    for time in (7, positions, 3 * positions):
      theirs, amplitude = ROPE_INIT_FUNCTIONS[kind](config, seq_len=time)
      turns = rope.frequencies(ours, theta, head_size, time)
      self.assertEqual(turns.dtype, np.float32)
      np.testing.assert_allclose(turns, theirs.numpy(), rtol=2e-6)
      self.assertAlmostEqual(ours.amplitude, amplitude, places=12)

  def test_only_dynamic_looks_at_the_context(self):
    for name, (positions, theta, scaling) in _CASES.items():
      _, ours = _read(64, positions, theta, rope_scaling=scaling)
      near, far = (
        rope.frequencies(ours, theta, 64, time)
        for time in (positions, positions + 1)
      )
      self.assertEqual(np.array_equal(near, far), name != 'dynamic', name)


class ReadTest(parameterized.TestCase):
  def test_default(self):
    for values in ({}, {'rope_scaling': None}, {'rope_parameters': {}}):
      self.assertEqual(_read(**values), (10000.0, rope.Scaling()))

  def test_theta_within_wins_over_theta_beside(self):
    parameters = {'rope_type': 'default', 'rope_theta': 7}
    theta, _ = _read(theta=5.0, rope_parameters=parameters)
    self.assertEqual(theta, 7.0)
    self.assertIsInstance(theta, float)

  def test_older_form_wins_over_the_new_one(self):
    older, new = {'type': 'linear', 'factor': 3}, {'rope_type': 'default'}
    _, scaling = _read(rope_scaling=older, rope_parameters=new)
    self.assertEqual(scaling, rope.Scaling('linear', 3.0))

  def test_trained_positions_beside_win(self):
    key = 'original_max_position_embeddings'
    _, scaling = _read(rope_scaling=_LLAMA3, **{key: 99})
    self.assertEqual(scaling.trained, 99)
    within = {k: v for k, v in _LLAMA3.items() if k != key}
    _, scaling = _read(rope_scaling=within, positions=77)
    self.assertEqual(scaling.trained, 77)

  @parameterized.named_parameters(
    ('kind', {'rope_type': 'longrope'}, "'longrope'"),
    ('kind_is_no_text', {'rope_type': ['yarn']}, "['yarn']"),
    ('older_kind', {'type': 'su', 'factor': 2.0}, "'su'"),
    ('no_factor', {'rope_type': 'linear'}, "'factor' is missing"),
    ('factor', {'rope_type': 'linear', 'factor': 0}, 'factor'),
    ('no_number', {'rope_type': 'linear', 'factor': '2'}, "'2'"),
    ('llama3', {'rope_type': 'llama3', 'factor': 8.0}, "'low_freq_factor'"),
    ('order', _LLAMA3 | {'high_freq_factor': 1}, 'high_freq_factor 1.0'),
    ('trained', _YARN | {'original_max_position_embeddings': 0}, 'positive'),
    ('part', {'partial_rotary_factor': 0.5}, 'in part'),
    ('by_layer', {'full_attention': {'rope_type': 'default'}}, 'by layer'),
    ('theta', {'rope_theta': 1.0}, 'rope_theta must be above 1'),
    ('no_object', 'yarn', 'an object'),
  )
  def test_refuses(self, scaling, words):
    with self.assertRaises(RequestError) as caught:
      _read(rope_scaling=scaling)
    self.assertStartsWith(str(caught.exception), 'config.json: ')
    self.assertIn('rope_scaling', str(caught.exception))
    self.assertIn(words, str(caught.exception))

  @parameterized.parameters((7, {}), (2, {'type': 'dynamic', 'factor': 2.0}))
  def test_head_size(self, head_size, scaling):
    with self.assertRaisesRegex(RequestError, f'even head .* {head_size}$'):
      _read(head_size, rope_scaling=scaling)


if __name__ == '__main__':
  absltest.main()
