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
from ffp_jax.pruning import estimates
from ffp_jax.runtime import device_memory, sharding
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


def _plan(mesh, dtype=jnp.float32, **overrides):
  found = sharding.make_mesh(*mesh)
  return plan.plan(_config(**overrides), _MODEL, jnp.dtype(dtype), found)


class PlanTest(parameterized.TestCase):
  def test_weights_are_those_of_one_device(self):
    total = 4 * families.param_count(_MODEL)
    self.assertEqual(_plan((1, 1, 1))['weights_bytes'], total)
    eighth = _plan((1, 1, 8))['weights_bytes']
    # Groups and channels over tensor; of four groups only two parts.
    self.assertLess(eighth, 0.4 * total)
    self.assertGreater(eighth, total / 8)
    half = _plan((1, 1, 1), jnp.bfloat16)['weights_bytes']
    self.assertEqual(half, total // 2)

  def test_more_rows_take_more_and_remat_takes_less(self):
    few = _plan((1, 1, 1), **{'search.rows': (1, 1)})['search_bytes']
    many = _plan((1, 1, 1), **{'search.rows': (1, 8)})['search_bytes']
    lean = _plan((1, 1, 1), **{'search.rows': (1, 8), 'search.remat': True})[
      'search_bytes'
    ]
    self.assertGreater(many, 1.5 * few)
    self.assertLess(lean, many)

  def test_flops_against_a_count_by_hand(self):
    config = _config(**{'search.rows': (1, 2), 'search.candidates': 4})
    layer = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 512
    forward = 2 * (4 * layer + 512 * 128)  # a token, head included
    scores = 4 * 4 * 128 * 64  # Q K and their product with V, all layers
    norms = 2 * (4 * 2 + 1) * 128  # counted as products, and next to nothing
    tokens = 2 * 64
    self.assertAlmostEqual(
      estimates.flops(config, _MODEL),
      tokens * (forward + scores + norms) * 4 * 2,
      delta=1.0,
    )
    refit = dataclasses.replace(_MODEL, refit=True)
    more = estimates.flops(config, refit) - estimates.flops(config, _MODEL)
    squares = 2 * 4 * (128**2 + 512**2)
    self.assertAlmostEqual(more, tokens * squares * 4 * 2, delta=1.0)

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
from ffp_jax.pruning import estimates
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
  def _call(self, *arguments):
    return subprocess.run(
      [sys.executable, '-m', 'ffp_jax.plan', *arguments],
      cwd=_ROOT,
      env=os.environ | tiny_run.ENVIRONMENT,
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )

  def test_needs_only_a_config_json(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'config.json'
    path.write_text(json.dumps(tiny_run.HF_CONFIG))
    common = (
      '--config=configs/llama.py',
      f'--config.model={folder}',
      '--config.text.context=64',
      '--config.search.context=32',
      '--devices=16',
    )
    done = self._call(*common, '--tflops=1')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('tensor 16', done.stdout)
    self.assertIn('fits in 80 GiB per device', done.stdout)
    self.assertNotIn('text.context', done.stderr)
    done = self._call(
      *common, '--device_memory_gib=0.000001', '--config.text.context=96'
    )
    self.assertIn('DOES NOT FIT', done.stdout)
    (line,) = [x for x in done.stderr.splitlines() if 'text.context' in x]
    self.assertIn('96 is more than the 64 positions', line)
    done = self._call(*common, '--config.mesh.fsdp=5')
    self.assertEqual(done.returncode, 2)
    self.assertLen(done.stderr.splitlines(), 1)
    self.assertIn('mesh.fsdp=5', done.stderr)
    for wrong in ((), ('--config=configs/llama.py', '--config.modle=x')):
      done = self._call(*wrong)
      self.assertEqual(done.returncode, 2)
      self.assertLen(done.stderr.splitlines(), 1)


if __name__ == '__main__':
  absltest.main()
