"""Recovery against PyTorch, and against what must not change."""

import copy
import dataclasses
import functools
import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl.testing import absltest, parameterized

from ffp_jax import export
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.models import adapters, families
from ffp_jax.models.decoder import Decoder, Masks, ModelConfig
from ffp_jax.pruning import recovery
from ffp_jax.pruning.distillation import distillation_loss
from ffp_jax.runtime import sharding
from tests import testing, tiny_run

_MODEL = ModelConfig(
  vocab=64,
  width=16,
  layers=2,
  groups=2,
  heads_per_group=2,
  head_size=8,
  ffn=24,
)
_STEPS = 4
_RATE = recovery.schedule(peak=0.01, warmup=1, steps=_STEPS)
_OPTIM = recovery.optimizer(max_norm=1.0, decays=(0.9, 0.95))


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _tokens(*shape, seed=0, vocab=_MODEL.vocab):
  return np.random.default_rng(seed).integers(0, vocab, shape, np.int32)


class _Setting(NamedTuple):
  """A model to recover."""

  model: ModelConfig
  dense: dict
  calibrated: dict  # stands for it: other output projections
  keep: Masks


def _setting(model=_MODEL, dense=None, dtype=jnp.float32) -> _Setting:
  dense = tiny_run.params(model) if dense is None else dense
  dense = jax.tree.map(lambda x: x.astype(dtype), dense)
  keep = jax.tree.map(jnp.asarray, testing.random_masks(model))
  # As calibration leaves them: other weights, no rows of removed units. Some
  # of these zeros are negative.
  stack = {**dense['stack']}
  for module, name, mask in (
    ('attention', 'out', keep.attention[:, :, None, None, None]),
    ('ffn', 'down', keep.ffn[:, :, None]),
  ):
    weight = (0.9 * stack[module][name] * mask).astype(dtype)
    stack[module] = {**stack[module], name: weight}
  return _Setting(model, dense, {**dense, 'stack': stack}, keep)


@functools.cache
def _step_fn(model, rank, remat=False):
  loss_fn = recovery.make_loss(
    model, rank=rank, cross_entropy=0.0, remat=remat, chunk=8
  )
  return recovery.make_step(loss_fn, _OPTIM, _RATE)


def _trained(setting, rank, batches, remat=False):
  """Returns (what was trained, what was not, metrics of every step)."""
  trained, frozen = recovery.begin(*_begin(setting), rank=rank, seed=0)
  state = recovery.start(trained, _OPTIM)[:4]
  step_fn, lines = _step_fn(setting.model, rank, remat), []
  for batch in batches:
    *new, metrics = step_fn(*state, frozen, setting.dense, setting.keep, batch)
    state = *new, state[3]
    lines.append(jax.device_get(metrics))
  return state, frozen, lines


def _begin(setting):
  return setting.calibrated, setting.model, setting.keep


def _merged(setting, rank, batches):
  """Returns the plain parameters of a trained model."""
  state, frozen, _ = _trained(setting, rank, batches)
  return adapters.merge(frozen, state[0], setting.dense['embed']['table'].dtype)


class DistillationLossTest(parameterized.TestCase):
  @parameterized.parameters(
    ('llama_grouped', 1, 0.0),
    ('llama_grouped', 8, 0.3),
    ('llama_biased', 8, 0.0),
    ('opt_post_norm_projected', 100, 1.0),
  )
  def test_is_that_of_pytorch(self, name, chunk, share):
    """Values and gradients, of tied, projected and separate heads."""
    pair = testing.pair(name)
    decoder = Decoder(pair.config)
    source = np.random.default_rng(0)
    shape = (3, 4, pair.config.width)
    streams = source.standard_normal((2, *shape)).astype(np.float32)
    ends = {k: x for k, x in pair.params.items() if k != 'stack'}
    dense = jax.tree.map(lambda x: x + 0.1, ends)
    tokens = source.integers(0, pair.config.vocab, shape[:2])

    def unembed(params, x):
      return decoder.apply({'params': params}, x, method='unembed')

    def loss(ends, stream, dense, dense_stream):
      return distillation_loss(
        unembed,
        ends,
        stream,
        dense,
        dense_stream,
        tokens,
        cross_entropy=share,
        chunk=chunk,
      )

    (found, divergence), gradients = jax.jit(
      jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    )(ends, streams[0], dense, streams[1])
    logits, pull_back = jax.vjp(unembed, ends, jnp.asarray(streams[0]))
    aim = unembed(dense, jnp.asarray(streams[1]))
    *expected, slope = _torch_losses(
      np.asarray(logits), np.asarray(aim), tokens, share
    )
    np.testing.assert_allclose((found, divergence), expected, rtol=1e-6)
    for ours, theirs in zip(
      jax.tree.leaves(gradients[:2]),
      jax.tree.leaves(pull_back(jnp.asarray(slope))),
      strict=True,
    ):
      largest = np.abs(theirs).max()
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * largest)
    # The head is not trained, as with adapters.
    alone, _ = jax.jit(jax.grad(loss, 1, has_aux=True))(
      ends, streams[0], dense, streams[1]
    )
    np.testing.assert_allclose(alone, gradients[1], rtol=1e-5, atol=1e-8)
    self.assertGreater(np.abs(gradients[1]).max(), 1e-3)
    for ours in jax.tree.leaves(gradients[2:]):
      np.testing.assert_array_equal(ours, 0.0)

  def test_logits_never_exist_whole(self):
    V, D, B, T = 4096, 8, 4, 64
    source = np.random.default_rng(0)
    table = source.standard_normal((D, V)).astype(np.float32)
    x = source.standard_normal((B, T, D)).astype(np.float32)

    def loss(table, x, chunk):
      return distillation_loss(
        lambda p, x: x @ p,
        table,
        x,
        2.0 * table,
        x,
        np.zeros((B, T), np.int32),
        cross_entropy=0.5,
        chunk=chunk,
      )[0]

    def temporary(chunk):
      function = jax.jit(jax.grad(loss, (0, 1)), static_argnames='chunk')
      compiled = function.lower(table, x, chunk=chunk).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * B * T * V
    self.assertGreater(temporary(B * T), whole)
    self.assertLess(temporary(16), whole / 2)


def _torch_losses(logits, aim, tokens, share):
  """Returns the loss, KL(aim || logits) a token, the loss's gradient."""
  logits = torch.tensor(logits, requires_grad=True)
  V = logits.shape[-1]
  divergence = torch.nn.functional.kl_div(
    logits.log_softmax(-1).reshape(-1, V),
    torch.tensor(aim).log_softmax(-1).reshape(-1, V),
    log_target=True,
    reduction='batchmean',
  )
  cross_entropy = torch.nn.functional.cross_entropy(
    logits[:, :-1].reshape(-1, V), torch.tensor(tokens[:, 1:]).reshape(-1)
  )
  loss = (1 - share) * divergence + share * cross_entropy
  loss.backward()
  return loss.item(), divergence.item(), logits.grad.numpy()


class AdapterTest(parameterized.TestCase):
  @parameterized.parameters(
    'llama_biased', 'mistral_short_window', 'opt_pre_norm'
  )
  def test_merged_is_the_same_function(self, name):
    pair = testing.pair(name)
    setting = _setting(pair.config, pair.params)
    trained, frozen = recovery.begin(*_begin(setting), rank=3, seed=0)
    wide = Decoder(dataclasses.replace(pair.config, adapter_rank=3))
    plain = Decoder(pair.config)
    tokens = testing.tokens(2, 7)

    def logits(decoder, params):
      return jax.jit(decoder.apply)({'params': params}, tokens, setting.keep)

    before = logits(plain, setting.calibrated)
    joined = adapters.join(frozen, trained, jnp.float32)
    np.testing.assert_array_equal(logits(wide, joined), before)
    key = jax.random.key(1)
    moved = jax.tree.map(
      lambda x: x + 0.1 * jax.random.normal(key, x.shape), trained
    )
    after = logits(wide, adapters.join(frozen, moved, jnp.float32))
    merged = adapters.merge(frozen, moved, jnp.float32)
    self.assertEqual(
      jax.tree.map(jnp.shape, merged), jax.tree.map(jnp.shape, pair.params)
    )
    self.assertGreater(np.abs(after - before).max(), 0.1)
    np.testing.assert_allclose(
      logits(plain, merged), after, rtol=1e-4, atol=1e-4
    )

  def test_every_linear_layer_has_one_as_large_as_its_inputs_ask(self):
    setting = _setting(dataclasses.replace(_MODEL, width=64, ffn=512))
    found = adapters.draw(
      setting.model, setting.keep, rank=5, key=jax.random.key(0)
    )
    stack = found['stack']
    inputs = {'query': 64, 'key': 64, 'value': 64, 'out': 32}
    inputs |= {'gate': 64, 'up': 64, 'down': 512}
    factors = {**stack['attention'], **stack['ffn']}
    self.assertLen(factors, 2 * len(inputs))
    for name, size in inputs.items():
      a = np.asarray(factors[f'{name}_a'])
      np.testing.assert_allclose(
        np.std(a[a != 0]), size**-0.5, rtol=0.1, err_msg=name
      )
      np.testing.assert_array_equal(factors[f'{name}_b'], 0.0)

  def test_every_adapter_is_split(self):
    shapes = families.param_shapes(
      dataclasses.replace(_MODEL, adapter_rank=2), jnp.float32
    )
    placed = sharding.param_shardings(shapes, sharding.make_mesh(2, 2, 2))
    for module in ('attention', 'ffn'):
      for name, x in placed['stack'][module].items():
        self.assertTrue(any(x.spec), name)
        self.assertIsNone(x.spec[0], name)


class StepTest(parameterized.TestCase):
  @parameterized.parameters(0, 2)
  def test_three_steps_are_those_of_pytorch(self, rank):
    pair = testing.pair('llama_grouped')
    keep = jax.tree.map(jnp.asarray, testing.random_masks(pair.config))
    setting = _Setting(pair.config, pair.params, pair.params, keep)
    batches = _tokens(3, 2, 2, 7, vocab=97)
    first, _ = recovery.begin(*_begin(setting), rank=rank, seed=0)
    expected, losses = _torch_steps(pair, keep, first, rank, batches)
    state, _, lines = _trained(setting, rank, batches)
    np.testing.assert_allclose([x['kl'] for x in lines], losses, rtol=1e-5)
    self.assertGreater(losses[0], 0.1)

    def compare(path, ours, theirs, first):
      moved = np.linalg.norm(theirs - first)
      self.assertGreater(moved, 0.0, path)
      self.assertLess(np.linalg.norm(ours - theirs) / moved, 2e-3, path)

    first, _ = recovery.begin(*_begin(setting), rank=rank, seed=0)
    jax.tree_util.tree_map_with_path(compare, state[0], expected, first)

  @parameterized.product(rank=(0, 2), name=('llama_biased', 'opt_pre_norm'))
  def test_removed_units_stay_and_masked_is_sliced(self, rank, name):
    pair = testing.pair(name)
    setting = _setting(pair.config, pair.params)
    batches = _tokens(2, 1, 2, 7, vocab=97)
    merged = _merged(setting, rank, batches)
    keep = jax.tree.map(lambda x: np.asarray(x) > 0, setting.keep)
    groups, channels = keep
    old, new = setting.calibrated['stack'], merged['stack']
    for module, name in (
      *(('attention', x) for x in ('query', 'key', 'value', 'out')),
      *(('ffn', x) for x in ('gate', 'up', 'down') if x in old['ffn']),
    ):
      before, after = (np.asarray(x[module][name]) for x in (old, new))
      mask = groups if module == 'attention' else channels
      if name in ('out', 'down'):
        at = ~mask
        before, after = before[at], after[at]
      else:
        before, after = (np.moveaxis(x, 2, 1) for x in (before, after))
        before, after = before[~mask], after[~mask]
      self.assertEqual(after.tobytes(), before.tobytes(), name)
      self.assertGreater(np.abs(new[module][name] - old[module][name]).max(), 0)

    tokens = testing.tokens(2, 7)
    small, sliced = export.slice_params(merged, setting.model, setting.keep)
    masked = Decoder(setting.model).apply(
      {'params': merged}, tokens, setting.keep
    )
    found = Decoder(sliced).apply({'params': small}, tokens)
    np.testing.assert_allclose(found, masked, rtol=1e-4, atol=1e-4)

  def test_weights_that_adapters_update_are_not_copied(self):
    setting = _setting()
    _, frozen = recovery.begin(*_begin(setting), rank=2, seed=0)
    for path, x in jax.tree_util.tree_leaves_with_path(frozen):
      if path[-1].key not in ('out', 'down'):
        dense = setting.dense
        for key in path:
          dense = dense[key.key]
        self.assertIs(x, dense)

  @parameterized.parameters(0, 2)
  def test_micro_batches_add_up(self, rank):
    setting, tokens = _setting(), _tokens(1, 4, 8)
    found = [
      _trained(setting, rank, [tokens.reshape(*shape, 8)])
      for shape in ((1, 4), (2, 2), (4, 1))
    ]
    for other in found[1:]:
      for key, value in found[0][2][0].items():
        np.testing.assert_allclose(
          other[2][0][key], value, rtol=1e-5, err_msg=key
        )
      # The first update of Adam has the size of the rate everywhere: its
      # moments tell more.
      moments = (x[0][1][1].mu for x in (found[0], other))
      for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)

  def test_rematerialised(self):
    setting, batches = _setting(), _tokens(2, 1, 2, 8)
    plain = _trained(setting, 0, batches)
    again = _trained(setting, 0, batches, remat=True)
    for a, b in zip(plain[2], again[2], strict=True):
      for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=key)

  def test_float32_masters_of_bfloat16(self):
    """Steps too small for bfloat16 add up."""
    setting = _setting(dtype=jnp.bfloat16)
    state, frozen, lines = _trained(setting, 0, _tokens(2, 1, 2, 8))
    self.assertEqual(frozen, {})
    self.assertTrue(np.isfinite([x['kl'] for x in lines]).all())
    for x in jax.tree.leaves(state[0]):
      self.assertEqual(x.dtype, jnp.float32)
    rounded = adapters.merge(frozen, state[0], jnp.bfloat16)
    table = state[0]['embed']['table']
    self.assertEqual(rounded['embed']['table'].dtype, jnp.bfloat16)
    self.assertGreater(np.abs(table - rounded['embed']['table']).max(), 0.0)


def _torch_steps(pair, keep, first, rank, batches):
  """Returns what PyTorch trains, as ours is nested, and the losses."""
  student = copy.deepcopy(pair.torch)
  c = pair.config
  blocks = testing.blocks(student)
  for i, block in enumerate(blocks):
    masks = {
      'out': np.repeat(keep.attention[i], c.heads_per_group * c.head_size),
      'down': np.asarray(keep.ffn[i]),
    }
    for name, mask in masks.items():
      mask = torch.tensor(mask)
      block[name].register_forward_pre_hook(
        lambda _, inputs, mask=mask: (inputs[0] * mask,)
      )
  factors = _torch_adapters(blocks, first) if rank else None
  weights = [*factors.values()] if rank else [*student.parameters()]
  for x in weights:
    x.requires_grad_(True)
  optim = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
  losses = []
  for step, micro in enumerate(batches):
    optim.param_groups[0]['lr'] = float(_RATE(step))
    optim.zero_grad()
    losses.append(0.0)
    for tokens in torch.tensor(micro).long():
      with torch.no_grad():
        aim = pair.torch(tokens).logits.log_softmax(-1)
      found = student(tokens).logits.log_softmax(-1)
      loss = torch.nn.functional.kl_div(
        found.flatten(0, 1),
        aim.flatten(0, 1),
        log_target=True,
        reduction='batchmean',
      )
      (loss / len(micro)).backward()
      losses[-1] += loss.item() / len(micro)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optim.step()
  if rank:
    return _stacked(first, factors), losses
  with tempfile.TemporaryDirectory() as folder:
    student.save_pretrained(folder)
    return weights_lib.load_params(pathlib.Path(folder), c, np.float32), losses


def _torch_adapters(blocks, first):
  """Hooks low-rank updates into linear layers; returns them by place."""
  factors = {}
  for module, tree in first['stack'].items():
    for leaf, x in tree.items():
      for i in range(len(blocks)):
        x_i = np.asarray(x[i])
        r = x_i.shape[-1] if leaf.endswith('_a') else x_i.shape[0]
        shape = (-1, r) if leaf.endswith('_a') else (r, -1)
        factors[module, leaf, i] = torch.tensor(x_i.reshape(shape))
  for i, block in enumerate(blocks):
    for name, linear in block.items():
      module = 'ffn' if name in ('gate', 'up', 'down') else 'attention'
      a, b = (factors[module, f'{name}_{part}', i] for part in 'ab')
      linear.register_forward_hook(
        lambda _, inputs, y, a=a, b=b: y + inputs[0] @ a @ b
      )
  return factors


def _stacked(first, factors):
  """Returns PyTorch's adapters, nested as ours."""

  def one(path, x):
    _, module, leaf = (key.key for key in path)
    found = [
      factors[module, leaf, i].detach().numpy() for i in range(x.shape[0])
    ]
    return np.stack(found).reshape(x.shape)

  return jax.tree_util.tree_map_with_path(one, first)


class MeshTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, ((8, 1, 1), (1, 4, 2), (2, 2, 2))), (2, ((2, 2, 2),))
  )
  def test_same_losses_on_any_mesh(self, rank, meshes):
    setting = _setting()
    batches = _tokens(3, 2, 8, 8)
    _, _, expected = _trained(setting, rank, batches)
    for mesh in meshes:
      with jax.set_mesh(sharding.make_mesh(*mesh)):
        placed = [
          jax.device_put(x, sharding.param_shardings(x)) for x in setting[1:3]
        ]
        here = _Setting(setting.model, *placed, setting.keep)
        state, _, found = _trained(here, rank, batches)
        # Of Adam's moments each device has its part as well.
        for tree in (state[0], state[1][1].mu, state[1][1].nu):
          self.assert_placed(tree)
      for ours, theirs in zip(found, expected, strict=True):
        for key in theirs:
          np.testing.assert_allclose(
            ours[key], theirs[key], rtol=1e-4, err_msg=f'{mesh} {key}'
          )

  def assert_placed(self, tree):
    jax.tree.map(
      lambda x, place: self.assertTrue(
        x.sharding.is_equivalent_to(place, x.ndim)
      ),
      tree,
      sharding.param_shardings(tree),
    )


class StepsTest(parameterized.TestCase):
  def _run(self, rank, state, setting, frozen, limit=None):
    """Returns what `steps` yields, on this machine."""
    step_fn = _step_fn(setting.model, rank)
    tokens = _tokens(_STEPS, 1, 2, 8)

    def validate(trained):
      return float(sum(jnp.sum(x**2) for x in jax.tree.leaves(trained)))

    found = recovery.steps(
      state,
      lambda *args: step_fn(
        *args[:4], frozen, setting.dense, setting.keep, args[4]
      ),
      lambda i: tokens[i],
      validate,
      _OPTIM,
      total=_STEPS,
      every=2,
    )
    return [jax.tree.map(np.array, pair) for pair in found]

  @parameterized.parameters(0, 2)
  def test_resumed_is_uninterrupted(self, rank):
    setting = _setting()

    def new():
      trained, frozen = recovery.begin(*_begin(setting), rank=rank, seed=0)
      return recovery.start(trained, _OPTIM), frozen

    state, frozen = new()
    whole = self._run(rank, state, setting, frozen)
    self.assertLen(whole, 1 + _STEPS)
    self.assertEqual(
      ['validation' in line for _, line in whole],
      [True, False, True, False, True],
    )
    like, _ = new()
    for i, (saved, _) in enumerate(whole):
      again = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), saved, like
      )
      rest = self._run(rank, again, setting, frozen)
      jax.tree.map(np.testing.assert_array_equal, rest, whole[i + 1 :])

  def _toy(self, losses, total=6, every=1, kls=None):
    """Runs steps that add one to a number; validation is a lookup."""
    kls = kls or {}

    def step_fn(trained, opt_state, step, rate_scale, tokens):
      del tokens
      metrics = {
        'loss': jnp.float32(kls.get(int(step), 1.0)),
        'kl': jnp.float32(1.0),
        'gradient_norm': jnp.float32(1.0),
        'rate': rate_scale,
      }
      trained = {'x': trained['x'] + rate_scale}
      return trained, opt_state, step + 1, metrics

    def validate(trained):
      return losses[float(trained['x'])]

    state = recovery.start({'x': jnp.float32(0.0)}, _OPTIM)
    return list(
      recovery.steps(
        state,
        step_fn,
        lambda i: i,
        validate,
        _OPTIM,
        total=total,
        every=every,
      )
    )

  def test_keeps_the_best(self):
    found = self._toy({0: 3.0, 1: 2.0, 2: 1.0, 3: 1.1, 4: 1.2, 5: 1.1, 6: 1.2})
    self.assertLen(found, 7)
    last = found[-1][0]
    self.assertEqual(float(last.best['x']), 2.0)
    self.assertEqual(float(last.trained['x']), 6.0)
    self.assertEqual((last.best_loss, last.start_loss), (1.0, 3.0))

  def test_never_worse_than_the_start(self):
    found = self._toy({i: 3.0 + 0.01 * i for i in range(7)})
    last = found[-1][0]
    self.assertEqual(float(last.best['x']), 0.0)
    self.assertEqual(last.best_loss, last.start_loss)

  @parameterized.parameters(9.0, float('nan'), float('inf'))
  def test_halves_once_and_then_ends(self, high):
    found = self._toy({0: 3.0, 1: 2.0, 2: high, 1.5: 2.1, 2.5: high})
    scales = [float(state.rate_scale) for state, _ in found]
    # 2 diverges, on from 1 with half a step each; 2 diverges again.
    self.assertEqual(scales, [1.0, 1.0, 0.5, 0.5, 0.25])
    diverged = [line.get('diverged') for _, line in found]
    self.assertEqual(diverged, [None, False, True, False, True])
    last = found[-1][0]
    self.assertEqual(float(last.best['x']), 1.0)
    self.assertEqual(int(last.step), 4)
    self.assertEqual(int(last.halvings), 2)

  def test_a_loss_that_is_not_finite_diverges_between_validations(self):
    found = self._toy(
      {0: 3.0, 1.0: 2.0}, total=3, every=3, kls={0: float('nan')}
    )
    self.assertEqual([int(s.halvings) for s, _ in found], [0, 1, 1, 1])
    # Two half steps from the start.
    self.assertEqual(float(found[-1][0].best['x']), 1.0)


if __name__ == '__main__':
  absltest.main()
