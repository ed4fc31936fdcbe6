import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl.testing import absltest, parameterized

from ffp_jax import export
from ffp_jax.evaluation import loss
from ffp_jax.models import families
from ffp_jax.models.decoder import Decoder
from ffp_jax.pruning import sublayers
from tests import testing

_ONE_A_FAMILY = ('llama_biased', 'mistral_short_window', 'opt_pre_norm')
_GRADIENTS = (*_ONE_A_FAMILY, 'qwen3_grouped')


def setUpModule():
  # Tiny models: compiling them takes far longer than running them.
  jax.config.update('jax_disable_most_optimizations', True)


def tearDownModule():
  jax.config.update('jax_disable_most_optimizations', False)


@functools.cache
def _masked(name):
  """Returns the jitted (tokens, masks) -> (logits, captured inputs)."""
  pair = testing.pair(name)
  decoder = Decoder(pair.config, capture=lambda x: x)

  def apply(tokens, masks):
    logits, variables = decoder.apply(
      {'params': pair.params}, tokens, masks, mutable='captured'
    )
    stack = variables['captured']['stack']
    return logits, (stack['attention']['inputs'], stack['ffn']['inputs'])

  return jax.jit(apply)


@functools.cache
def _dense(name):
  """Returns the jitted tokens -> logits, without masks."""
  pair = testing.pair(name)
  decoder = Decoder(pair.config)
  return jax.jit(lambda tokens: decoder.apply({'params': pair.params}, tokens))


def _ones(pair):
  return jax.tree.map(np.ones_like, testing.random_masks(pair.config))


class _TestCase(parameterized.TestCase):
  def assert_close(self, ours, theirs, tolerance=1e-5):
    """Compares with a tolerance relative to the largest magnitude."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    self.assertEqual(ours.shape, theirs.shape)
    self.assertEqual(ours.dtype, np.float32)
    self.assertTrue(np.isfinite(ours).all())
    largest = np.abs(theirs).max()
    self.assertGreater(largest, 0.0)
    self.assertLess(np.abs(ours - theirs).max() / largest, tolerance)


class DecoderTest(_TestCase):
  """Compares with PyTorch transformers."""

  @parameterized.parameters(*testing.CASES)
  def test_logits(self, name):
    pair = testing.pair(name)
    tokens = testing.tokens(2, 11)
    ours, _ = _masked(name)(tokens, _ones(pair))
    self.assert_close(ours, testing.torch_logits(pair.torch, tokens))

  @parameterized.parameters('llama_grouped', 'mistral_short_window')
  def test_logits_of_a_long_text(self, name):
    # Long enough for the queries to attend in blocks, of unequal lengths.
    pair = testing.pair(name)
    tokens = testing.tokens(2, 70)
    ours = _dense(name)(tokens)
    self.assert_close(ours, testing.torch_logits(pair.torch, tokens))

  @parameterized.parameters(*testing.CASES)
  def test_masked_logits_are_those_of_zeroed_weights(self, name):
    pair = testing.pair(name)
    tokens = testing.tokens(2, 11)
    masks = testing.random_masks(pair.config)
    ours, _ = _masked(name)(tokens, masks)
    zeroed = testing.without_units(pair, masks)
    self.assert_close(ours, testing.torch_logits(zeroed, tokens))
    dense = testing.torch_logits(pair.torch, tokens)
    self.assertGreater(np.abs(ours - dense).max(), 0.1)

  @parameterized.parameters(*testing.CASES)
  def test_captures_what_the_output_projections_take(self, name):
    pair = testing.pair(name)
    tokens = testing.tokens(2, 11)
    _, ours = _masked(name)(tokens, _ones(pair))
    attention, ffn = testing.output_inputs(pair, tokens)
    self.assert_close(ours[0], attention)
    self.assert_close(ours[1], ffn)

  @parameterized.parameters('opt_pre_norm', 'llama_grouped', 'llama_dynamic')
  def test_padding_on_the_right(self, name):
    pair = testing.pair(name)
    tokens = testing.tokens(2, 11)
    real = np.arange(11) < np.array([[11], [6]])
    tokens[~real] = 1
    ours, _ = _masked(name)(tokens, _ones(pair))
    theirs = testing.torch_logits(pair.torch, tokens, real)
    self.assert_close(ours[real], theirs[real])

  # Rematerialisation must not change the gradient: once is enough.
  @parameterized.parameters(
    *zip(_GRADIENTS, (False, True, False, False), strict=True)
  )
  def test_gradient_of_masks(self, name, remat):
    pair = testing.pair(name)
    tokens = testing.tokens(2, 11)
    # Values between 0 and 1, as 0 and 1 could hide a wrong product.
    masks = jax.tree.map(
      lambda x: np.float32(0.25) + x / 2, testing.random_masks(pair.config)
    )
    decoder = Decoder(pair.config, remat=remat)

    def objective(masks):
      def apply(params, tokens, masks):
        return decoder.apply({'params': params}, tokens, masks)

      return jnp.mean(loss.nll(apply, pair.params, tokens, masks))

    value, ours = jax.jit(jax.value_and_grad(objective))(masks)
    expected, theirs = _torch_value_and_grad(pair, tokens, masks)
    self.assertAlmostEqual(float(value), expected, delta=1e-4)
    self.assert_close(ours.attention, theirs[0], 1e-4)
    self.assert_close(ours.ffn, theirs[1], 1e-4)


def _torch_value_and_grad(pair, tokens, masks):
  leaves = [torch.tensor(mask, requires_grad=True) for mask in masks]
  width = pair.config.heads_per_group * pair.config.head_size

  def times(layer, leaf, repeats):
    def hook(_, inputs):
      return (inputs[0] * leaf[layer].repeat_interleave(repeats),)

    return hook

  handles = []
  for i, block in enumerate(testing.blocks(pair.torch)):
    for name, leaf, repeats in zip(
      ('out', 'down'), leaves, (width, 1), strict=True
    ):
      hook = times(i, leaf, repeats)
      handles.append(block[name].register_forward_pre_hook(hook))
  try:
    ids = torch.tensor(tokens).long()
    logits = pair.torch(ids).logits[:, :-1].flatten(0, 1)
    value = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
  finally:
    for handle in handles:
      handle.remove()
  value.backward()
  return value.item(), [leaf.grad.numpy() for leaf in leaves]


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


class SlicedTest(_TestCase):
  @parameterized.parameters(*testing.CASES)
  def test_sliced_logits_are_masked_logits(self, name):
    pair = testing.pair(name)
    tokens = testing.tokens(2, 11)
    masks = testing.random_masks(pair.config)
    small, config = export.slice_params(pair.params, pair.config, masks)
    decoder = Decoder(config)
    ours = jax.jit(lambda p, t: decoder.apply({'params': p}, t))(small, tokens)
    masked, _ = _masked(name)(tokens, masks)
    self.assert_close(ours, masked)

  @parameterized.parameters(*testing.CASES)
  def test_sizes_add_up(self, name):
    pair = testing.pair(name)
    total = sum(x.numel() for x in pair.torch.parameters())
    self.assertEqual(_size(pair.params), total)
    self.assertEqual(families.param_count(pair.config), total)
    table = sublayers.find_sublayers(
      pair.config, round_heads=1, round_ffn=1, floor=1
    )
    prunable = sum(
      linear.weight.numel() + (0 if linear.bias is None else len(linear.bias))
      for block in testing.blocks(pair.torch)
      for linear in block.values()
    )
    self.assertEqual(table.total, prunable)
    for seed in range(2):
      masks = testing.random_masks(pair.config, seed)
      small, config = export.slice_params(pair.params, pair.config, masks)
      counts = np.concatenate([mask.sum(-1) for mask in masks])
      removed = table.total - table.kept_cost(counts)
      self.assertEqual(_size(small), total - removed)
      self.assertEqual(families.param_count(config), total - removed)


class InvariantsTest(_TestCase):
  @parameterized.parameters(*_ONE_A_FAMILY)
  def test_no_masks_are_masks_of_ones(self, name):
    tokens = testing.tokens(2, 11)
    ones, _ = _masked(name)(tokens, _ones(testing.pair(name)))
    self.assert_close(_dense(name)(tokens), ones, 1e-6)

  @parameterized.parameters(*_ONE_A_FAMILY)
  def test_later_tokens_do_not_matter(self, name):
    tokens = testing.tokens(2, 11)
    changed = tokens.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % 97
    before, after = _dense(name)(tokens), _dense(name)(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    self.assertGreater(np.abs(before - after)[:, 7:].max(), 0.1)

  def test_tokens_before_the_window_do_not_matter(self):
    name = 'mistral_short_window'
    tokens = testing.tokens(2, 11)
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    difference = np.abs(_dense(name)(tokens) - _dense(name)(changed))
    difference = difference.max((0, 2))
    # 2 layers with windows of 3 tokens reach back 4 tokens.
    self.assertGreater(difference[:5].min(), 0.0)
    np.testing.assert_array_equal(difference[5:], 0.0)

  def test_capture_sees_inputs_before_the_mask(self):
    # A unit's activation must not depend on its own mask.
    pair = testing.pair('opt_pre_norm')
    tokens = testing.tokens(2, 11)
    zeros = jax.tree.map(np.zeros_like, testing.random_masks(pair.config))
    _, (ours, _) = _masked('opt_pre_norm')(tokens, zeros)
    attention, _ = testing.output_inputs(pair, tokens)
    self.assert_close(ours[0], attention[0])

  def test_nothing_is_sown_without_capture(self):
    pair = testing.pair('opt_pre_norm')
    _, variables = jax.eval_shape(
      lambda: Decoder(pair.config).apply(
        {'params': pair.params}, testing.tokens(1, 3), mutable='captured'
      )
    )
    self.assertEmpty(variables)


if __name__ == '__main__':
  absltest.main()
