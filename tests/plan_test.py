import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from ffp_jax import plan
from ffp_jax.config import defaults
from ffp_jax.models import families
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import abstract, compilation, flops, programs
from ffp_jax.pruning.programs import Program
from ffp_jax.runtime import collectives, device_memory, sharding, topology
from tests import tiny_run

_ROOT = pathlib.Path(__file__).parent.parent
_MODEL = ModelConfig(
  vocab=512,
  width=128,
  layers=4,
  groups=4,
  heads_per_group=2,
  head_size=16,
  ffn=512,
)


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _config(**overrides):
  config = defaults()
  config.update_from_flattened_dict(
    {'text.context': 64, 'search.context': 64, **overrides}
  )
  return config


def _weights(sizes, dtype=jnp.float32):
  """Bytes of the weights on each device."""
  mesh = sharding.make_mesh(*sizes)
  return abstract.local_bytes(abstract.params(_MODEL, dtype, mesh))


def _search(**overrides):
  """Bytes that a search step takes on one device."""
  mesh, config = sharding.make_mesh(1, 1, 1), _config(**overrides)
  step = programs.search_step(config, _MODEL, jnp.dtype('float32'), mesh)
  return compilation.compile_for_cpu(step, step, mesh).total


def _named(*names):
  """Programs of some names, that can't be called."""
  return [
    Program(
      name=name,
      function=None,
      arguments=(),
      keywords={},
      flops=flops.Flops(6e12, 1e12),
      parts=2,
      reads=3 * 10**9,
      beside=0,
      calls=3,
    )
    for name in names
  ]


class PlanTest(parameterized.TestCase):
  def test_weights_are_those_of_one_device(self):
    total = 4 * families.param_count(_MODEL)
    self.assertEqual(_weights((1, 1, 1)), total)
    eighth = _weights((1, 1, 8))
    # Groups and channels over tensor; of four groups only two parts.
    self.assertLess(eighth, 0.4 * total)
    self.assertGreater(eighth, total / 8)
    self.assertEqual(_weights((1, 1, 1), jnp.bfloat16), total // 2)

  def test_more_rows_take_more_and_remat_takes_less(self):
    few = _search(**{'search.rows': (1, 1)})
    many = _search(**{'search.rows': (1, 8)})
    lean = _search(**{'search.rows': (1, 8), 'search.remat': True})
    self.assertGreater(many, 1.5 * few)
    self.assertLess(lean, many)

  def test_the_programs_are_those_of_the_settings(self):
    def names(**overrides):
      mesh = sharding.make_mesh(1, 1, 1)
      listed = programs.list_programs(
        _config(**overrides), _MODEL, jnp.dtype('float32'), mesh
      )
      return {x.name: x.calls for x in listed}

    # With the defaults 16 reward windows, 24 of each held-out text, of five
    # models and of two, then of the recovered one, and 8 for validation before
    # recovery, in the middle and at its end.
    self.assertEqual(
      names(),
      {
        'importance': 1,
        'scoring, a window': 16 + 5 * 24 + 4 * 24 + 3 * 8,
        'refit, a layer': 4,
        'search step': 24,
        're-scoring, a row': 2 * 16,
        'calibration, a layer': 2 * 4,
        'recovery, all': 32_768 // 64,
        'recovery, rank 8': 0,
      },
    )
    others = names(**{'search.refit': 0.0, 'recovery.rank': 4})
    self.assertNotIn('refit, a layer', others)
    self.assertEqual(others['recovery, rank 4'], 512)
    self.assertEqual(others['recovery, all'], 0)
    plain = names(
      **{
        'calibration.enabled': False,
        'recovery.tokens': 0,
        'search.context': 32,
        'text.other': '',
      }
    )
    self.assertNotIn('calibration, a layer', plain)
    self.assertNotIn('refit, a layer', plain)
    self.assertEqual(plain['recovery, all'], 0)
    self.assertEqual(plain['scoring, a window'], 16 + 3 * 24)
    self.assertEqual(plain['re-scoring, a row'], 2 * 2 * 16)

  def test_the_verdict_names_the_largest_program_of_the_run(self):
    small, large, other = (
      compilation.Compiled(program, 1.0, 2**28, 2**28, n * 2**30, [])
      for program, n in zip(_named('a', 'b', 'c'), (1, 2, 9), strict=True)
    )
    other = other._replace(program=other.program._replace(calls=0))
    text = plan.describe([small, large, other], 4.0, tflops=1e-3)
    self.assertIn('fits in 4 GiB per device; the largest program is b', text)
    # Three calls each, of 6 TFLOP on two devices of 1 GFLOP/s.
    self.assertIn(
      'computes for 1.8e+04 s at best, and compiled here in 2', text
    )
    self.assertIn('DOES NOT FIT', plan.describe([small, large], 1.5))

  def test_seconds_are_those_of_what_takes_longest(self):
    """Of 1 TFLOP/s, and 2, 4 and 1 GB/s of memory, links and network."""
    (program,) = _named('a')
    groups = jnp.array([[0, 1]])
    exchanged = [
      collectives.Collective(kind, '', 10**9, times, groups, 1)
      for kind, times in (('all-gather', 8), (collectives.BETWEEN_SLICES, 3))
    ]
    compiled = compilation.Compiled(program, 1.0, 0, 0, 0, exchanged)
    chip = topology.Chip(1.0, 16.0, 2.0, 4.0, 1.0, {})
    # Of 6 TFLOP on two devices, 1 at full precision counts six times.
    self.assertEqual(
      compilation.bounds(compiled, chip),
      {'FLOPs': 5.5, 'memory': 1.5, 'links': 2.0, 'network': 3.0},
    )
    # Where nothing is published of the network, it does not count.
    unknown = compilation.bounds(compiled, chip._replace(dcn_gb=None))
    self.assertNotIn('network', unknown)

  def test_meshes_are_those_whose_axes_split_something(self):
    config = _config(**{'search.candidates': 2})
    self.assertEqual(
      compilation.list_meshes(config, _MODEL, 4),
      [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)],
    )
    odd = dataclasses.replace(_MODEL, groups=3)
    self.assertEqual(
      compilation.list_meshes(config, odd, 4),
      [(1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)],
    )

  def test_flops_against_a_count_by_hand(self):
    config = _config(**{'search.rows': (1, 2), 'search.candidates': 4})
    layer = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 512
    forward = 2 * (4 * layer + 512 * 128)  # a token, head included
    scores = 4 * 4 * 128 * 64  # Q K and their product with V, all layers
    norms = 2 * (4 * 2 + 1) * 128  # counted as products, and next to nothing
    tokens = 2 * 64
    self.assertAlmostEqual(
      flops.search_step(config, _MODEL).total,
      tokens * (forward + scores + norms) * 4 * 2,
      delta=1.0,
    )
    refit = dataclasses.replace(_MODEL, refit=True)
    more = (
      flops.search_step(config, refit).total
      - flops.search_step(config, _MODEL).total
    )
    # In eight blocks; a cut of a fifth ends in the middle of one.
    factors = 2 * 4 * (0.2 + 1 / 16) * (128 * (128 + 128) + 512 * (512 + 128))
    expected = tokens * factors * 4 * 2
    self.assertAlmostEqual(more, expected, delta=1e-2 * expected)

  def test_flops_of_a_layer_against_a_count_by_hand(self):
    config = _config(
      **{
        'text.calibration_windows': 4,
        'text.validation_windows': 2,
        'calibration.strengths': (0.1, 1.0),
      }
    )
    layer = 2 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 512)  # a token
    layer += 4 * 128 * 64 + 2 * 2 * 128  # scores; norms, counted as products
    sizes = 128, 512  # of the inputs of the output projections

    refit = sum(
      5 / 8 * 2 * 256 * n**2 + 2 / 3 * n**3 + 2 * n**2 * 128 for n in sizes
    )
    found = flops.refit_layer(config, _MODEL)
    self.assertAlmostEqual(found.full, refit, delta=1.0)
    self.assertAlmostEqual(found.total, 256 * layer + refit, delta=1.0)

    calibration = sum(
      5 / 8 * 2 * 384 * n**2 + 2 * n**3 / 3 + 9 * 2 * n**2 * 128 for n in sizes
    )
    found = flops.calibrate_layer(config, _MODEL)
    self.assertAlmostEqual(found.full, calibration, delta=1.0)
    self.assertAlmostEqual(found.total, 384 * layer + calibration, delta=1.0)

  def test_the_estimate_is_what_is_allocated(self):
    """The compiler's figure against the growth of resident memory."""
    done = subprocess.run(
      [sys.executable, '-c', _MEASURE],
      cwd=_ROOT,
      env=os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    said, grown = json.loads(done.stdout)
    self.assertGreater(said, 100e6)  # far above noise
    self.assertBetween(grown / said, 0.8, 1.25)


# Bytes of temporaries said, and bytes by which the peak grows in the call.
_MEASURE = """
import json, pathlib, re
import jax, jax.numpy as jnp
from ffp_jax.evaluation import loss
from ffp_jax.models import functional
from ffp_jax.models.decoder import Decoder, Masks, ModelConfig
from ffp_jax.runtime import device_memory

model = ModelConfig(vocab=2048, width=128, layers=6, groups=4,
                    heads_per_group=2, head_size=16, ffn=1024)
tokens = jnp.zeros((8, 256), jnp.int32)
params = jax.jit(Decoder(model).init)(jax.random.key(0), tokens)['params']
apply = functional.make_apply(model)
step = jax.jit(jax.grad(
  lambda m, p: loss.nll(apply, p, tokens, m).mean()))
masks = Masks(jnp.ones((6, 4)), jnp.ones((6, 1024)))
said = device_memory.memory_needed(step, masks, params).temporary
compiled = step.lower(masks, params).compile()

def resident(name):
  status = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(re.search(name + r':\\s+(\\d+)', status).group(1))

pathlib.Path('/proc/self/clear_refs').write_text('5')  # resets the peak
before = resident('VmRSS')
jax.block_until_ready(compiled(masks, params))
print(json.dumps([said, resident('VmHWM') - before]))
"""


class MemoryTest(parameterized.TestCase):
  def test_halves_once(self):
    tried = []

    def make(block):
      def step(x):
        tried.append(block)
        if block > 2:
          raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 3 GiB')
        return jnp.asarray(x)

      return step

    step, made = device_memory.halve_on_oom(make, 4)
    self.assertEqual(step(3), 3)
    self.assertEqual(step(5), 5)
    self.assertEqual(tried, [4, 2, 2])
    self.assertLen(made, 2)
    step, _ = device_memory.halve_on_oom(make, 8)
    with self.assertRaisesRegex(jax.errors.JaxRuntimeError, 'EXHAUSTED'):
      step(3)

  def test_other_errors_pass(self):
    def make(block):
      def step():
        raise jax.errors.JaxRuntimeError(f'INTERNAL: {block}')

      return step

    step, _ = device_memory.halve_on_oom(make, 4)
    with self.assertRaisesRegex(jax.errors.JaxRuntimeError, 'INTERNAL: 4'):
      step()

  @parameterized.parameters(
    (None, 8, 1), (100, 8, 1), (10_000, 8, 2), (10**9, 8, 8), (10**9, 1, 1)
  )
  def test_as_many_as_fit(self, free, most, expected):
    step = jax.jit(lambda x: jnp.sum(jnp.sort(x * 2.0)) * jnp.sin(x)[0])
    x = jnp.ones(1000)
    self.assertBetween(
      device_memory.memory_needed(step, x).temporary, 4000, 4499
    )
    with absltest.mock.patch.object(
      device_memory, 'free_bytes', return_value=free
    ):
      self.assertEqual(device_memory.largest_block(step, most, x), expected)


class CommandTest(absltest.TestCase):
  def _call(self, *arguments, **environment):
    return subprocess.run(
      [sys.executable, '-m', 'ffp_jax.plan', *arguments],
      cwd=_ROOT,
      env=os.environ | tiny_run.ENVIRONMENT | environment,
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )

  def _common(self):
    """A folder with a config.json alone, and flags that say so."""
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'config.json'
    path.write_text(json.dumps(tiny_run.HF_CONFIG))
    return folder, (
      '--config=configs/llama.py',
      f'--config.model={folder}',
      '--config.text.context=96',
      '--config.search.context=32',
    )

  def test_needs_only_a_config_json(self):
    folder, common = self._common()
    done = self._call(*common, '--devices=16', '--tflops=1')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('tensor 16', done.stdout)
    self.assertIn('fits in 80 GiB per device', done.stdout)
    (line,) = [x for x in done.stderr.splitlines() if 'text.context' in x]
    self.assertIn('96 is more than the 64 positions', line)

    # Without the compiler of TPUs, the same.
    (pathlib.Path(folder) / 'libtpu.py').write_text('raise ImportError')
    hidden = {'PYTHONPATH': folder}
    done = self._call(*common, '--topology=v5e:4x4', **hidden)
    self.assertEqual(done.returncode, 0, done.stderr)
    (line,) = [x for x in done.stderr.splitlines() if 'text.context' not in x]
    self.assertIn("pip install 'libtpu==0.0.42.*'", line)
    self.assertIn('tensor 16', done.stdout)
    self.assertIn('fits in 15.75 GiB per device', done.stdout)
    done = self._call(*common, '--topology=v5e:4x4', '--mesh=search', **hidden)
    self.assertEqual(done.returncode, 2)
    self.assertIn('pip install', done.stderr)

  def test_refuses(self):
    _, common = self._common()
    topology = '--topology=v5e:2x2'
    wrong = {
      (*common, '--topology=v9:2x2'): "'v9:2x2' is not a chip (v4, v5e, v5p",
      (*common, '--topology=v5e'): "'v5e' is not a chip",
      (*common, '--topology=v5e:3x3'): 'v5e:3x3',
      (*common, topology, '--devices=4'): '--devices',
      (*common, topology, '--tflops=4'): '--tflops',
      (*common, topology, '--mesh=find'): 'search',
      (*common, '--mesh=search'): 'needs --topology',
      (*common, '--slices=2'): 'needs --topology',
      (*common, topology, '--mesh=search', '--config.mesh.fsdp=2'): 'mesh.fsdp',
      (*common, '--config.mesh.fsdp=5'): 'mesh.fsdp=5',
      (*common, '--config.modle=x'): 'modle',
      (): '--config is missing',
    }
    for arguments, expected in wrong.items():
      with self.subTest(arguments):
        done = self._call(*arguments)
        self.assertEqual(done.returncode, 2)
        lines = [x for x in done.stderr.splitlines() if 'text.context' not in x]
        self.assertLen(lines, 1)
        self.assertIn(expected, lines[0])


if __name__ == '__main__':
  absltest.main()
