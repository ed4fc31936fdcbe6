import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.models.decoder import Decoder, Masks, ModelConfig
from ffp_jax.pruning import calibration, masks
from ffp_jax.pruning.calibration import Moments
from tests import tiny_run

_LLAMA = ModelConfig(
  vocab=40, width=20, layers=3, groups=3, heads_per_group=2, head_size=4, ffn=14
)
_OPT_POST_NORM = dataclasses.replace(
  _LLAMA,
  layers=2,
  groups=4,
  heads_per_group=1,
  norm='layer',
  positions='learned',
  position_offset=2,
  max_positions=24,
  activation='relu',
  gated=False,
  qkv_bias=True,
  out_bias=True,
  ffn_bias=True,
  pre_norm=False,
  final_norm=False,
  embed_width=12,
  tied=True,
)
_CONFIGS = {'llama': _LLAMA, 'opt_post_norm': _OPT_POST_NORM}
_STRENGTHS = (0.1, 0.01, 1.0)
# Jitted, or their loops would be compiled anew at every call.
_RIDGE = jax.jit(calibration.ridge_regression)
_CHOOSE = jax.jit(calibration.select_strength)
_ERROR = jax.jit(calibration.squared_error)


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _lstsq(x, y, weight, mask, strength):
  """Ridge in float64, as least squares on an augmented system."""
  x, y, weight = (np.asarray(a, np.float64) for a in (x, y, weight))
  kept = np.flatnonzero(mask)
  fitted = np.zeros_like(weight)
  lam = strength * np.mean(np.square(x[:, kept]).sum(0))
  rows = np.concatenate([x[:, kept], np.sqrt(lam) * np.eye(len(kept))])
  aims = np.concatenate([y, np.sqrt(lam) * weight[kept]])
  fitted[kept] = np.linalg.lstsq(rows, aims, rcond=None)[0]
  return fitted


def _pick(fit, check, weight, mask, strengths):
  """What `choose` should return; fit and check are pairs (x, y)."""
  tried = [np.asarray(weight, np.float64) * mask[:, None]]
  tried += [_lstsq(*fit, weight, mask, strength) for strength in strengths]
  x, y = (np.asarray(a, np.float64) for a in check)
  losses = [np.square(x @ new - y).sum() for new in tried]
  best = int(np.argmin(losses))
  return tried[best], best - 1


def _moments(x, y):
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  return Moments(jnp.float32(x.T @ x), jnp.float32(x.T @ y))


def _problem(seed, inputs=12, outputs=7, tokens=60):
  """(x, x of another model, weight, mask); removed inputs are correlated."""
  source = np.random.default_rng(seed)
  mix = source.standard_normal((inputs, inputs)) / np.sqrt(inputs)
  x = source.standard_normal((tokens, inputs)) @ (np.eye(inputs) + mix)
  other = x + 0.3 * source.standard_normal(x.shape)
  weight = source.standard_normal((inputs, outputs)).astype(np.float32)
  mask = source.permutation(np.arange(inputs) % 3 > 0).astype(np.float32)
  return x, other, weight, mask


def _distance(ours, theirs):
  """Largest difference relative to the largest magnitude."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


class RidgeTest(parameterized.TestCase):
  @parameterized.product(
    target=('own', 'dense'), strength=(1e-3, 0.1, 10.0), seed=(0, 1)
  )
  def test_against_least_squares(self, target, strength, seed):
    x, other, weight, mask = _problem(seed)
    y = (x if target == 'own' else other) @ weight
    ours = _RIDGE(_moments(x, y), weight, mask, strength)
    theirs = _lstsq(x, y, weight, mask, strength)
    self.assertLess(_distance(ours, theirs), 1e-4)
    self.assertGreater(_distance(ours, weight * mask[:, None]), 1e-3)

  @parameterized.parameters(1e-3, 1.0)
  def test_rows_of_removed_inputs_are_zero(self, strength):
    x, _, weight, mask = _problem(0)
    ours = _RIDGE(_moments(x, x @ weight), weight, mask, strength)
    self.assertGreater((mask == 0).sum(), 2)
    np.testing.assert_array_equal(ours[mask == 0], 0.0)
    self.assertTrue((np.abs(ours[mask == 1]).max(1) > 0).all())

  def test_nothing_removed_changes_nothing(self):
    x, _, weight, mask = _problem(0)
    moments = _moments(x, x @ weight)
    ours = _RIDGE(moments, weight, np.ones_like(mask), 0.01)
    self.assertLess(_distance(ours, weight), 1e-5)

  def test_everything_removed_is_zero(self):
    x, _, weight, mask = _problem(0)
    moments = _moments(x, x @ weight)
    ours = _RIDGE(moments, weight, np.zeros_like(mask), 0.01)
    np.testing.assert_array_equal(ours, np.zeros_like(weight))

  def test_a_strong_ridge_keeps_the_weights(self):
    x, _, weight, mask = _problem(0)
    ours = _RIDGE(_moments(x, x @ weight), weight, mask, 1e6)
    self.assertLess(_distance(ours, weight * mask[:, None]), 1e-4)

  def test_a_removed_copy_is_taken_over(self):
    # Input 1 is input 0 over again: its weight moves there.
    x, _, weight, _ = _problem(0)
    x[:, 1] = x[:, 0]
    mask = np.ones(len(weight), np.float32)
    mask[1] = 0.0
    ours = _RIDGE(_moments(x, x @ weight), weight, mask, 1e-6)
    expected = weight.copy()
    expected[0] += expected[1]
    expected[1] = 0.0
    self.assertLess(_distance(ours, expected), 1e-3)

  @parameterized.parameters(1e-12, 1e-9, 0.0)
  def test_a_failing_factorisation_is_raised(self, strength):
    # Six tokens for twelve inputs, large and nearly alike: the float32 Gram
    # matrix isn't positive definite.
    x, _, weight, mask = _problem(0, tokens=6)
    x = 1.0 + 1e-3 * x
    moments = _moments(x, x @ weight)
    kept = np.asarray(moments.gram_IxI) * mask * mask[:, None]
    mean = np.trace(kept) / mask.sum()
    lifted = kept + np.diag(np.where(mask > 0, strength * mean, 1.0))
    self.assertFalse(np.isfinite(jnp.linalg.cholesky(lifted)).all())
    ours = _RIDGE(moments, weight, mask, strength)
    self.assertTrue(np.isfinite(ours).all())
    np.testing.assert_array_equal(ours[mask == 0], 0.0)
    before = _ERROR(moments, weight * mask[:, None])
    after = _ERROR(moments, ours)
    if strength:
      self.assertLess(after, before)
    else:  # ten times nothing is nothing
      np.testing.assert_array_equal(ours, weight * mask[:, None])

  def test_dead_inputs(self):
    x, _, weight, mask = _problem(0)
    moments = _moments(0 * x, 0 * x @ weight)
    ours = _RIDGE(moments, weight, mask, 0.1)
    np.testing.assert_array_equal(ours, weight * mask[:, None])

  @parameterized.parameters(*range(3))
  def test_error_is_the_squared_error_but_for_a_constant(self, seed):
    x, other, weight, mask = _problem(seed)
    y = other @ weight
    moments = _moments(x, y)
    for new in (weight, weight * mask[:, None], 0 * weight):
      ours = _ERROR(moments, new) + np.square(y).sum()
      theirs = np.square(x @ new - y).sum()
      self.assertAlmostEqual(ours, theirs, delta=1e-5 * np.square(y).sum())


class ChooseTest(parameterized.TestCase):
  @parameterized.product(
    seed=(0, 1, 2, 3), strengths=((0.01, 0.1, 1.0), (30.0, 0.3, 3.0))
  )
  def test_best_on_unseen_tokens(self, seed, strengths):
    # Few and noisy tokens, so that the best strength varies.
    x, other, weight, mask = _problem(seed, tokens=20 + 10 * seed)
    half = len(x) // 2
    y = other @ weight
    fit, check = (x[:half], y[:half]), (x[half:], y[half:])
    ours, index = _CHOOSE(
      _moments(*fit), _moments(*check), weight, mask, strengths
    )
    theirs, expected = _pick(fit, check, weight, mask, strengths)
    self.assertEqual(index, expected)
    self.assertLess(_distance(ours, theirs), 1e-3)

  @parameterized.parameters(*range(3))
  def test_every_strength_wins_somewhere(self, expected):
    # Unseen tokens that were made by the ridge of one strength.
    x, _, weight, mask = _problem(0)
    moments = _moments(x, x @ weight)
    best = _RIDGE(moments, weight, mask, _STRENGTHS[expected])
    _, index = _CHOOSE(moments, _moments(x, x @ best), weight, mask, _STRENGTHS)
    self.assertEqual(index, expected)

  def test_no_change_where_no_strength_helps(self):
    # Seen, the removed half is the kept half; unseen, its opposite.
    source = np.random.default_rng(0)
    half = source.standard_normal((40, 6))
    weight = source.standard_normal((12, 5)).astype(np.float32)
    mask = np.repeat(np.float32([1, 0]), 6)
    seen, unseen = (np.hstack([half, sign * half]) for sign in (1, -1))
    ours, index = _CHOOSE(
      _moments(seen, seen @ weight),
      _moments(unseen, unseen @ weight),
      weight,
      mask,
      _STRENGTHS,
    )
    self.assertEqual(index, -1)
    np.testing.assert_array_equal(ours, weight * mask[:, None])

  def test_without_strengths(self):
    x, _, weight, mask = _problem(0)
    moments = _moments(x, x @ weight)
    ours, index = _CHOOSE(moments, moments, weight, mask, ())
    self.assertEqual(index, -1)
    np.testing.assert_array_equal(ours, weight * mask[:, None])


def _tokens(config, windows, seed):
  source = np.random.default_rng(seed)
  return source.integers(0, config.vocab, (windows, 2, 10), np.int32)


def _masks(config):
  """A different number of units in every module."""
  source = np.random.default_rng(0)

  def half(units, kept):
    mask = np.arange(units) < np.array(kept)[:, None]
    return source.permuted(mask, axis=1).astype(np.float32)

  L = config.layers
  return Masks(
    half(config.groups, [config.groups - 1, 1, 2][:L]),
    half(config.ffn, [8, 11, 5][:L]),
  )


@functools.cache
def _calibrated(name):
  """(config, params, masks, new params, strengths [2,L])."""
  config = _CONFIGS[name]
  params = tiny_run.params(config)
  new, chosen = calibration.calibrate(
    params,
    config,
    _masks(config),
    _tokens(config, 5, seed=1),
    _tokens(config, 2, seed=2),
    strengths=_STRENGTHS,
  )
  return config, params, _masks(config), new, chosen


@functools.cache
def _capture(config):
  decoder = Decoder(config, capture=lambda x: x)
  return jax.jit(
    lambda params, tokens, masks: decoder.apply(
      {'params': params}, tokens, masks, mutable='captured'
    )[1]['captured']['stack']
  )


def _inputs(config, params, keep, windows_WxBxT):
  """Inputs of the output projections, (attention, FFN) each [L,N,I]."""
  tokens = windows_WxBxT.reshape(-1, windows_WxBxT.shape[-1])
  seen = _capture(config)(params, tokens, keep)
  return tuple(
    np.asarray(seen[module]['inputs']).reshape(config.layers, tokens.size, -1)
    for module in ('attention', 'ffn')
  )


def _projections(params):
  """Output projections as matrices, (attention, FFN) each [L,I,D]."""
  out = params['stack']['attention']['out']
  down = params['stack']['ffn']['down']
  return tuple(
    np.asarray(x).reshape(x.shape[0], -1, x.shape[-1]) for x in (out, down)
  )


def _modules(name):
  """Yields what is known of every module of a calibrated model.

  Calibration leaves the layers before a module as they are, so the finished
  model still shows what that module's fit saw.

  Yields:
    ((module, layer), fit (x, y), check (x, y), weight, mask, new weight,
    strength).
  """
  config, params, keep, new, chosen = _calibrated(name)
  sets = []
  for windows, seed in ((5, 1), (2, 2)):
    tokens = _tokens(config, windows, seed)
    sets.append(_inputs(config, new, keep, tokens))
  weights, news = _projections(params), _projections(new)
  for module in range(2):
    for i in range(config.layers):
      weight = weights[module][i]
      units = keep[module][i]
      fit, check = (
        (x[module][i], x[module][i].astype(np.float64) @ weight) for x in sets
      )
      mask = np.repeat(units, len(weight) // len(units))
      where = (module, i)
      yield where, fit, check, weight, mask, news[module][i], chosen[where]


_RUNS = ('llama', 'opt_post_norm')


class CalibrateTest(parameterized.TestCase):
  @parameterized.parameters(*_RUNS)
  def test_every_module_against_least_squares(self, name):
    for where, fit, check, weight, mask, new, strength in _modules(name):
      with self.subTest(where):
        theirs, index = _pick(fit, check, weight, mask, _STRENGTHS)
        self.assertEqual(strength, (0.0, *_STRENGTHS)[index + 1])
        self.assertLess(_distance(new, theirs), 1e-3)

  @parameterized.parameters(*_RUNS)
  def test_calibration_tokens_are_never_worse_off(self, name):
    gains = []
    for where, (x, y), _, weight, mask, new, _ in _modules(name):
      before = np.square(x @ (weight * mask[:, None]) - y).sum()
      after = np.square(x @ new - y).sum()
      with self.subTest(where):
        self.assertLessEqual(after, before * (1 + 1e-6))
      gains.append(after < 0.9 * before)
    self.assertTrue(any(gains))

  @parameterized.parameters(*_RUNS)
  def test_all_else_stays(self, name):
    _, params, _, new, _ = _calibrated(name)
    changed = [
      jax.tree_util.keystr(path)
      for (path, old), now in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(new), strict=True
      )
      if not np.array_equal(old, now)
    ]
    self.assertEqual(
      changed, ["['stack']['attention']['out']", "['stack']['ffn']['down']"]
    )
    self.assertEqual(
      jax.tree.map(jnp.shape, params), jax.tree.map(jnp.shape, new)
    )

  def test_first_attention_from_scratch(self):
    config, params, keep, new, _ = _calibrated('llama')
    pairs = []
    weight = _projections(params)[0][0]
    for windows, seed in ((5, 1), (2, 2)):
      tokens = _tokens(config, windows, seed).reshape(-1, 10)
      x = np.concatenate([_first_inputs(config, params, t) for t in tokens])
      pairs.append((x, x @ weight.astype(np.float64)))
    size = config.heads_per_group * config.head_size
    mask = np.repeat(keep.attention[0], size)
    theirs, _ = _pick(*pairs, weight, mask, _STRENGTHS)
    self.assertLess(_distance(_projections(new)[0][0], theirs), 1e-3)

  def test_nothing_removed_changes_nothing(self):
    params = tiny_run.params(_LLAMA)
    ones = masks.ones(_LLAMA.layers, _LLAMA.groups, _LLAMA.ffn)
    new, _ = calibration.calibrate(
      params,
      _LLAMA,
      ones,
      _tokens(_LLAMA, 5, seed=1),
      _tokens(_LLAMA, 2, seed=2),
      strengths=_STRENGTHS,
    )
    for ours, theirs in zip(
      jax.tree.leaves(new), jax.tree.leaves(params), strict=True
    ):
      self.assertLess(_distance(ours, theirs), 1e-5)

  def test_bfloat16_stays_bfloat16(self):
    config = dataclasses.replace(_LLAMA, layers=1)
    bfloat16 = jnp.dtype('bfloat16')
    params = jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x).astype(bfloat16)),
      tiny_run.params(config),
    )
    keep = jax.tree.map(lambda x: x[:1], _masks(_LLAMA))
    new, chosen = calibration.calibrate(
      params,
      config,
      keep,
      _tokens(config, 5, seed=1),
      _tokens(config, 2, seed=2),
      strengths=_STRENGTHS,
    )
    self.assertEqual({x.dtype for x in jax.tree.leaves(new)}, {bfloat16})
    self.assertGreater(chosen.min(), 0.0)


def _first_inputs(config, params, tokens_T):
  """Inputs of the first attention's output projection, one head at a time."""
  attention = jax.tree.map(
    lambda x: np.asarray(x[0], np.float64), params['stack']['attention']
  )
  scale = np.asarray(params['stack']['attention_norm']['norm']['scale'][0])
  x = np.asarray(params['embed']['table'], np.float64)[tokens_T]
  x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * scale
  T, H = len(tokens_T), config.head_size

  def turn(y):
    turned = np.empty_like(y)
    for t in range(T):
      for h in range(H // 2):
        angle = t * config.rope_theta ** (-2 * h / H)
        a, b = y[t, h], y[t, h + H // 2]
        turned[t, h] = a * np.cos(angle) - b * np.sin(angle)
        turned[t, h + H // 2] = b * np.cos(angle) + a * np.sin(angle)
    return turned

  heads = []
  for k in range(config.groups):
    key = turn(x @ attention['key'][:, k])
    value = x @ attention['value'][:, k]
    for g in range(config.heads_per_group):
      query = turn(x @ attention['query'][:, k, g])
      mixed = np.empty((T, H))
      for t in range(T):
        weight = np.exp(key[: t + 1] @ query[t] / np.sqrt(H))
        mixed[t] = weight @ value[: t + 1] / weight.sum()
      heads.append(mixed)
  return np.concatenate(heads, axis=1)


if __name__ == '__main__':
  absltest.main()
