import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.models.decoder import Decoder, Masks, ModelConfig
from ffp_jax.pruning import calibration, masks
from tests import tiny_run
from tests.numpy_ridge import STRENGTHS, distance, pick

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


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _tokens(config, windows, seed):
  source = np.random.default_rng(seed)
  return source.integers(0, config.vocab, (windows, 2, 10), np.int32)


def _masks(config):
  """A different number of units in every sublayer."""
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
    strengths=STRENGTHS,
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
    np.asarray(seen[kind]['inputs']).reshape(config.layers, tokens.size, -1)
    for kind in ('attention', 'ffn')
  )


def _projections(params):
  """Output projections as matrices, (attention, FFN) each [L,I,D]."""
  out = params['stack']['attention']['out']
  down = params['stack']['ffn']['down']
  return tuple(
    np.asarray(x).reshape(x.shape[0], -1, x.shape[-1]) for x in (out, down)
  )


def _sublayers(name):
  """Yields what is known of every sublayer of a calibrated model.

  Calibration leaves the layers before a sublayer as they are, so the finished
  model still shows what that sublayer's fit saw.

  Yields:
    ((0 for attention or 1 for the FFN, layer), fit (x, y), check (x, y),
    weight, mask, new weight, strength).
  """
  config, params, keep, new, chosen = _calibrated(name)
  sets = []
  for windows, seed in ((5, 1), (2, 2)):
    tokens = _tokens(config, windows, seed)
    sets.append(_inputs(config, new, keep, tokens))
  weights, news = _projections(params), _projections(new)
  for kind in range(2):
    for i in range(config.layers):
      weight = weights[kind][i]
      units = keep[kind][i]
      fit, check = (
        (x[kind][i], x[kind][i].astype(np.float64) @ weight) for x in sets
      )
      mask = np.repeat(units, len(weight) // len(units))
      where = (kind, i)
      yield where, fit, check, weight, mask, news[kind][i], chosen[where]


_RUNS = ('llama', 'opt_post_norm')


class CalibrateTest(parameterized.TestCase):
  @parameterized.parameters(*_RUNS)
  def test_every_module_against_least_squares(self, name):
    for where, fit, check, weight, mask, new, strength in _sublayers(name):
      with self.subTest(where):
        theirs, index = pick(fit, check, weight, mask, STRENGTHS)
        self.assertEqual(strength, (0.0, *STRENGTHS)[index + 1])
        self.assertLess(distance(new, theirs), 1e-3)

  @parameterized.parameters(*_RUNS)
  def test_calibration_tokens_are_never_worse_off(self, name):
    gains = []
    for where, (x, y), _, weight, mask, new, _ in _sublayers(name):
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
    theirs, _ = pick(*pairs, weight, mask, STRENGTHS)
    self.assertLess(distance(_projections(new)[0][0], theirs), 1e-3)

  def test_nothing_removed_changes_nothing(self):
    params = tiny_run.params(_LLAMA)
    ones = masks.ones(_LLAMA.layers, _LLAMA.groups, _LLAMA.ffn)
    new, _ = calibration.calibrate(
      params,
      _LLAMA,
      ones,
      _tokens(_LLAMA, 5, seed=1),
      _tokens(_LLAMA, 2, seed=2),
      strengths=STRENGTHS,
    )
    for ours, theirs in zip(
      jax.tree.leaves(new), jax.tree.leaves(params), strict=True
    ):
      self.assertLess(distance(ours, theirs), 1e-5)

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
      strengths=STRENGTHS,
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
