"""Compiles for TPUs that are not here, by their own compiler."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax import plan
from ffp_jax.benchmarks import tpu_plans
from ffp_jax.config import defaults
from ffp_jax.models import families
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import compilation, programs
from ffp_jax.runtime import sharding, topology
from ffp_jax.runtime.compiling import BRIEFLY

_LLAMA = ModelConfig(
  vocab=256,
  width=128,
  layers=3,
  groups=4,
  heads_per_group=2,
  head_size=16,
  ffn=256,
)
_MODELS = {
  'llama': _LLAMA,
  'qwen': dataclasses.replace(
    _LLAMA, qkv_bias=True, qk_norm=True, tied=True, window=16
  ),
  'opt': dataclasses.replace(
    _LLAMA,
    heads_per_group=1,
    norm='layer',
    positions='learned',
    max_positions=64,
    position_offset=2,
    activation='relu',
    gated=False,
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    tied=True,
  ),
}


def _config(**overrides):
  config = defaults()
  small = {
    'text.context': 32,
    'text.calibration_windows': 4,
    'text.validation_windows': 2,
    'search.context': 32,
    'search.rows': (2, 2),
    'recovery.tokens': 1024,
  }
  config.update_from_flattened_dict(small | overrides)
  return config


def _mesh(name, sizes):
  return sharding.make_mesh(*sizes, devices=topology.find_devices(name))


def _compile(sizes, *names, family='llama', name='v5e:2x2', **overrides):
  """The programs of a run, by name; all or those named."""
  mesh = _mesh(name, sizes)
  listed = programs.list_programs(
    _config(**overrides), _MODELS[family], jnp.dtype('bfloat16'), mesh
  )
  return {
    x.name: compilation.compile_for_topology(x, mesh)
    for x in listed
    if not names or x.name in names
  }


def _axes(collective, sizes):
  """The axes of the mesh over which devices exchange something."""
  places = np.unravel_index(collective.groups, sizes)
  return {
    axis
    for axis, place in zip(sharding.MESH_AXES, places, strict=True)
    if np.any(place != place[:, :1])
  }


class ProgramsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    jax.config.update('jax_platforms', 'cpu')

  @parameterized.parameters(
    ('llama', (1, 2, 2)), ('qwen', (1, 4, 1)), ('opt', (1, 1, 4))
  )
  def test_every_program_compiles(self, family, sizes):
    found = _compile(sizes, family=family)
    self.assertLen(found, 8)
    used = {sharding.MESH_AXES[i] for i in range(3) if sizes[i] > 1}
    for name, x in found.items():
      with self.subTest(name):
        self.assertIsInstance(x, compilation.Compiled)
        self.assertGreater(x.arguments, 0)
        seen = [axis for c in x.collectives for axis in _axes(c, sizes)]
        self.assertContainsSubset(seen, used)
        self.assertNotEmpty(seen)
    scored = found['scoring, a window'].collectives
    per_layer = [x for x in scored if x.loops]
    self.assertNotEmpty(per_layer)
    self.assertEqual({x.times for x in per_layer}, {_LLAMA.layers})

  def test_what_runs_for_seconds_is_compiled_briefly(self):
    mesh = _mesh('v5e:2x2', (1, 1, 4))
    listed = programs.list_programs(
      _config(), _LLAMA, jnp.dtype('bfloat16'), mesh
    )

    def compiled(program, **options):
      with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.arguments, **program.keywords)
        return lowered.compile(**options).as_text()

    for program in listed:
      with self.subTest(program.name):
        text = compiled(program, compiler_options=BRIEFLY)
        trained = program.name.startswith('recovery')
        self.assertEqual(compiled(program) == text, not trained)

  def test_another_chip(self):
    found = _compile((1, 2, 2), 'search step', name='v5p:2x2x1')
    self.assertIsInstance(found['search step'], compilation.Compiled)

  def test_two_slices_exchange_little_but_over_the_first_axis(self):
    devices = topology.find_devices('v5e:2x2', slices=2)
    exchanged = {}
    for sizes in ((2, 2, 2), (1, 2, 4)):
      mesh = sharding.make_mesh(*sizes, devices=devices)
      for half in np.split(mesh.devices.ravel(), 2):
        self.assertLen({x.slice_index for x in half}, 1)
      config = _config(**{'search.candidates': 2})
      step = programs.search_step(config, _LLAMA, jnp.dtype('bfloat16'), mesh)
      found = compilation.compile_for_topology(step, mesh)
      self.assertGreater(found.received, 0)
      exchanged[sizes] = found.received_between_slices
    # Rewards and the like, where another mesh gathers weights.
    self.assertBetween(exchanged[2, 2, 2], 1, 30_000)
    self.assertGreater(exchanged[1, 2, 4], 20 * exchanged[2, 2, 2])

  def test_candidates_exchange_next_to_nothing_in_the_layers(self):
    sizes = 4, 1, 1
    wide = {'search.candidates': 4, 'search.rows': (4, 4)}
    apart = _compile(sizes, 'search step', **wide)['search step']
    # Which units of a layer any candidate removes, so that all skip the same
    # blocks of its refit.
    masks = _LLAMA.groups, _LLAMA.ffn
    inside = [x for x in apart.collectives if x.loops]
    self.assertLess(sum(x.size for x in inside), 8 * sum(masks))
    # Nothing else but rewards and gradients of priorities.
    self.assertLess(sum(x.size for x in apart.collectives), 10_000)
    sizes = 2, 1, 2
    both = _compile(sizes, 'search step', **wide)['search step']
    inside = [
      x for x in both.collectives if x.loops and x.size > 8 * sum(masks)
    ]
    axes = collections.Counter(axis for x in inside for axis in _axes(x, sizes))
    self.assertEqual(set(axes), {'tensor'})
    self.assertLess(both.arguments, 0.7 * apart.arguments)

  def test_what_does_not_fit_is_said(self):
    model = dataclasses.replace(_LLAMA, vocab=2**21, width=8192)
    mesh = _mesh('v5e:2x2', (4, 1, 1))
    step = programs.search_step(_config(), model, jnp.dtype('bfloat16'), mesh)
    found = compilation.compile_for_topology(step, mesh)
    self.assertIsInstance(found, compilation.TooLarge)
    self.assertRegex(found.message, r'RESOURCE_EXHAUSTED.*15\.75G')
    text = plan.describe([found], 15.75, topology.CHIPS['v5e'])
    self.assertIn('DOES NOT FIT in 15.75 GiB per device: search step', text)


class TablesTest(parameterized.TestCase):
  """The rows of benchmarks/tpu_plans.py."""

  def setUp(self):
    super().setUp()
    jax.config.update('jax_platforms', 'cpu')

  def test_models_have_their_published_sizes(self):
    billions = {
      'llama-2-7b': 6.74,
      'llama-2-13b': 13.02,
      'llama-2-70b': 68.98,
      'llama-3.1-8b': 8.03,
      'mistral-7b': 7.24,
      'opt-66b': 65.72,
    }
    counted = {
      name: round(families.param_count(model) / 1e9, 2)
      for name, model in tpu_plans.MODELS.items()
    }
    self.assertEqual(counted, billions)

  @parameterized.parameters(
    ('v5e:4x4', (1, 2, 8)),
    ('v6e:4x4', (1, 2, 8)),
    ('v5e:2x2', (1, 1, 4)),
    ('v5p:2x2x4', (1, 2, 8)),
  )
  def test_meshes(self, where, expected):
    self.assertEqual(tpu_plans.make_mesh(where).devices.shape, expected)

  def test_rows(self):
    wide = dataclasses.replace(_LLAMA, vocab=2**21, width=8192)
    models = {'tiny': _LLAMA, 'wide': wide}
    with absltest.mock.patch.object(tpu_plans, 'MODELS', models):
      (row,) = tpu_plans.measure('tiny', 'v5e:2x2', _config(), whole=False)
      (big,) = tpu_plans.measure('wide', 'v5e:1x1', _config(), whole=False)
    step = _compile((1, 1, 4), 'search step')['search step']
    self.assertEqual(row['gib'], round(step.total / 2**30, 2))
    self.assertEqual(row['gb_received'], round(step.received / 1e9, 2))
    self.assertEqual((row['calls'], row['mesh']), (24, [1, 1, 4]))
    self.assertIn('RESOURCE_EXHAUSTED', big['refused'])
    first, second = tpu_plans.table([row, big]).splitlines()[2:]
    self.assertIn('| tiny | v5e:2x2 | 1 x 1 x 4 | search step |', first)
    self.assertIn('| does not fit | 15.75 |', second)


if __name__ == '__main__':
  absltest.main()
