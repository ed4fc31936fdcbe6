import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from ffp_jax import prune
from ffp_jax.errors import RequestError
from ffp_jax.models import families
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.runtime import sharding
from ffp_jax.runtime.workdir import Workdir
from tests import tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_ROOT = pathlib.Path(__file__).parent.parent
_SIZES = {'candidates': 2, 'fsdp': 2, 'tensor': 2}
_FAMILIES = {
  'llama': {
    'num_key_value_heads': 3,
    'num_attention_heads': 6,
    'hidden_size': 48,
    'head_dim': 8,
  },
  'mistral': {'head_dim': 8, 'sliding_window': 20},
  'opt': {
    'ffn_dim': 48,
    'word_embed_proj_dim': 32,
    'do_layer_norm_before': True,
  },
}


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _mesh(candidates, fsdp, tensor):
  return sharding.make_mesh(candidates, fsdp, tensor)


class MakeMeshTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 1, -1), (1, 1, 8)),
    ((-1, 2, 2), (2, 2, 2)),
    ((2, -1, 1), (2, 4, 1)),
    ((1, 2, 1), (1, 2, 1)),  # some of the devices
  )
  def test_sizes(self, asked, found):
    self.assertEqual(tuple(_mesh(*asked).shape.values()), found)

  @parameterized.parameters(
    (3, 3, 1), (16, 1, -1), (-1, -1, 1), (0, 1, 1), (1, 3, -1)
  )
  def test_refused(self, *asked):
    with self.assertRaisesRegex(RequestError, f'mesh.candidates={asked[0]}'):
      _mesh(*asked)


class SpecTest(parameterized.TestCase):
  @parameterized.parameters(
    ((8, 4, 2, 16), ('embed', 'groups', 'heads', None), P('fsdp', 'tensor')),
    # Odd groups: their heads are split instead, or nothing is.
    (
      (8, 3, 2, 16),
      ('embed', 'groups', 'heads', None),
      P('fsdp', None, 'tensor'),
    ),
    ((8, 3, 3, 16), ('embed', 'groups', 'heads', None), P('fsdp')),
    # Too few rows: the width is split instead.
    ((1, 5, 8), ('batch', None, 'embed'), P(None, None, 'fsdp')),
    ((2, 5, 8), ('batch', None, 'embed'), P('fsdp')),
    ((7, 9), ('vocab', 'embed'), P()),
  )
  def test_each_mesh_axis_once_and_only_where_it_divides(
    self, shape, axes, expected
  ):
    found = sharding.partition_spec(shape, axes, _SIZES)
    padded = (*expected, *[None] * (len(shape) - len(expected)))
    self.assertEqual(tuple(found), padded)

  def test_every_parameter_but_norms_and_output_biases_is_split(self):
    config = ModelConfig(
      vocab=16,
      width=8,
      layers=2,
      groups=2,
      heads_per_group=2,
      head_size=4,
      ffn=8,
      positions='learned',
      norm='layer',
      gated=True,
      qkv_bias=True,
      out_bias=True,
      ffn_bias=True,
      embed_width=4,
    )
    shapes = families.param_shapes(config, jnp.float32)
    placed = sharding.param_shardings(shapes, _mesh(2, 2, 2))
    whole = {
      '/'.join(key.key for key in path)
      for path, x in jax.tree_util.tree_leaves_with_path(placed)
      if not any(x.spec)
    }
    self.assertEqual(
      whole,
      {
        'stack/attention/out_bias',
        'stack/ffn/down_bias',
        *(
          f'{norm}/norm/{leaf}'
          for norm in (
            'stack/attention_norm',
            'stack/ffn_norm',
            'final_norm',
          )
          for leaf in ('scale', 'bias')
        ),
      },
    )
    # The axis of layers stays whole: a scan reads one layer at a time.
    for x in jax.tree.leaves(placed['stack']):
      self.assertIsNone((*x.spec, None)[0])


class SideBySideTest(parameterized.TestCase):
  @parameterized.product(count=(1, 4, 6), block=(1, 2, 8), candidates=(1, 2))
  def test_is_a_map(self, count, block, candidates):
    xs = jnp.arange(count * 3.0).reshape(count, 3)

    def f(x):
      return x.sum(), {'square': sharding.constrain(x, 'embed') ** 2}

    with jax.set_mesh(_mesh(candidates, 2, 2)):
      total, rest = jax.jit(
        lambda xs: sharding.map_candidates(f, xs, block=block)
      )(xs)
    np.testing.assert_array_equal(total, xs.sum(-1))
    np.testing.assert_array_equal(rest['square'], xs**2)

  def test_without_a_mesh(self):
    xs = jnp.arange(4.0)[:, None]
    np.testing.assert_array_equal(
      sharding.map_candidates(jnp.sum, xs, block=2), xs[:, 0]
    )

  def test_candidates_lie_on_different_devices(self):
    def f(x):
      return x * 2.0

    with jax.set_mesh(_mesh(4, 1, 2)):
      step = jax.jit(lambda xs: sharding.map_candidates(f, xs, block=1))
      text = step.lower(jnp.ones((4, 8))).compile().as_text()
    # One candidate in each of the four parts.
    self.assertIn('f32[1,8]', text)


def _config(folder, mesh, **overrides):
  """A run of seconds on a mesh."""
  sizes = dict(zip(sharding.MESH_AXES, mesh, strict=True))
  config = tiny_run.config(
    **{f'mesh.{name}': size for name, size in sizes.items()},
    **{'search.candidates': 4, 'search.steps': (1, 2), 'search.rows': (2, 2)},
    **(tiny_run.RECOVERY | {'recovery.rows': 2}),
    **overrides,
  )
  config.model, config.data = str(folder / 'model'), str(folder / 'text.txt')
  return config


@functools.cache
def _home(family) -> pathlib.Path:
  """Holds a model, a text, and a run of them on one device, `one`."""
  folder = pathlib.Path(_FOLDER.name) / family
  tiny_run.inputs(folder, topics=4, model_type=family, **_FAMILIES[family])
  prune.prune_workdir(_config(folder, (1, 1, 1)), folder / 'one', command='')
  return folder


def _outcome(workdir):
  """(counts and priorities, metrics of every step, perplexities)."""
  allocation = json.loads((workdir / 'allocation.json').read_text())
  priority = allocation.pop('priority')
  files = [workdir / f'{name}.jsonl' for name in ('metrics', 'recovery')]
  lines = [x for file in files for x in file.read_text().splitlines()]
  metrics = [json.loads(line) for line in lines]
  for line in metrics:
    del line['seconds']
  results = json.loads((workdir / 'results.json').read_text())
  perplexity = {
    name: x['ppl']
    for name, x in results.items()
    if isinstance(x, dict) and 'ppl' in x
  }
  return allocation, priority, metrics, perplexity


class _StoppedError(Exception):
  pass


class SameResultTest(parameterized.TestCase):
  def assert_same(self, found, expected):
    """Up to the order in which float32 numbers are summed."""
    self.assertEqual(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-3)
    self.assertEqual(len(found[2]), len(expected[2]))
    for ours, theirs in zip(found[2], expected[2], strict=True):
      self.assertEqual(ours.keys(), theirs.keys())
      for key in ours:
        np.testing.assert_allclose(
          ours[key], theirs[key], rtol=2e-3, atol=1e-4, err_msg=key
        )
    self.assertEqual(found[3].keys(), expected[3].keys())
    for key, value in expected[3].items():
      np.testing.assert_allclose(found[3][key], value, rtol=1e-4, err_msg=key)

  @parameterized.parameters(
    ('llama', ((1, 8, 1), (1, 1, 8), (2, 2, 2))),
    ('mistral', ((1, 2, 4),)),
    ('opt', ((2, 2, 2),)),
  )
  def test_on_any_mesh(self, family, meshes):
    folder = _home(family)
    for mesh in meshes:
      workdir = folder / 'x'.join(map(str, mesh))
      prune.prune_workdir(_config(folder, mesh), workdir, command='')
      self.assert_same(_outcome(workdir), _outcome(folder / 'one'))

  @parameterized.parameters('llama', 'opt')
  def test_by_two_processes(self, family):
    folder = _home(family)
    two = _start_two(folder, folder / 'two', (2, 2, 2))
    said = [process.communicate(timeout=300) for process in two]
    self.assertEqual([process.returncode for process in two], [0, 0], said)
    self.assert_same(_outcome(folder / 'two'), _outcome(folder / 'one'))
    # Only the first has something to say.
    self.assertIn('searched', said[0][0])
    self.assertNotIn('searched', said[1][0])

  def test_goes_on_with_other_devices(self):
    folder = _home('llama')
    real = Workdir.append

    def append(files, line, *args):
      real(files, line, *args)
      if line['step'] == 1:
        raise _StoppedError

    workdir = folder / 'changed'
    with mock.patch.object(Workdir, 'append', append):
      with self.assertRaises(_StoppedError):
        prune.prune_workdir(_config(folder, (1, 1, 4)), workdir, command='')
    prune.prune_workdir(_config(folder, (4, 1, 1)), workdir, command='')
    self.assert_same(_outcome(workdir), _outcome(folder / 'one'))

  def test_the_end_of_one_process_ends_the_other(self):
    folder = _home('llama')
    for end in (0, 1):
      workdir = folder / f'end{end}'
      two = _start_two(folder, workdir, (1, 8, 1))
      deadline = time.monotonic() + 200
      while not (workdir / 'config.json').exists():  # both have joined
        self.assertLess(time.monotonic(), deadline)
        time.sleep(0.2)
      two[end].kill()
      _, said = two[1 - end].communicate(timeout=120)
      self.assertNotEqual(two[1 - end].returncode, 0)
      self.assertRegex(said, 'process of the run has ended|another task died')
      two[end].communicate()


class ProcessesTest(absltest.TestCase):
  def test_each_process_reads_its_half(self):
    """Peak memory of two processes that load one model between them."""
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    tiny_run.write_model(
      folder / 'model',
      hidden_size=1024,
      intermediate_size=8192,
      head_dim=256,
      num_hidden_layers=2,
    )
    size = (folder / 'model' / 'model.safetensors').stat().st_size
    self.assertGreater(size, 200e6)
    for out in self.run_two(_LOAD, folder / 'model'):
      self.assertBetween(int(out) / size, 0.45, 0.65)

  def test_what_holds_in_one_process_does_not_hold_everywhere(self):
    for out in self.run_two(_AGREE):
      # Before them, Gloo says that it is connected.
      self.assertEqual(out.split()[-3:], ['True', 'False', 'False'])

  def run_two(self, code, *arguments) -> list[str]:
    """Returns what two processes print, which get a port and their index."""
    port = _free_port()
    processes = [
      subprocess.Popen(
        [sys.executable, '-c', code, str(port), str(i), *arguments],
        cwd=_ROOT,
        env=os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for i in range(2)
    ]
    found = [process.communicate(timeout=200) for process in processes]
    for process, (_, said) in zip(processes, found, strict=True):
      self.assertEqual(process.returncode, 0, said)
    return [out for out, _ in found]


# Bytes by which resident memory grows at most while a model is loaded.
_LOAD = """
import pathlib, re, sys
import jax, numpy as np
from ffp_jax.checkpoints import model_config, weights
from ffp_jax.runtime import sharding

port, process, folder = *sys.argv[1:3], pathlib.Path(sys.argv[3])
sharding.join_processes(f'localhost:{port}', 2, int(process))
config = model_config.read_model_config(folder)

def resident(name):
  status = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(re.search(name + r':\\s+(\\d+)', status).group(1))

with jax.set_mesh(sharding.make_mesh(1, 2, 1)):
  weights.check_files(folder, config, np.dtype(np.float32))
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # resets the peak
  before = resident('VmRSS')
  params = weights.load_params(folder, config, np.dtype(np.float32))
  jax.block_until_ready(params)
  print(resident('VmHWM') - before)
"""


_AGREE = """
import sys
from ffp_jax.runtime import sharding

port, process = sys.argv[1], int(sys.argv[2])
sharding.join_processes(f'localhost:{port}', 2, process)
for condition in (True, process == 0, False):
  print(sharding.holds_everywhere(condition))
"""


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def _start_two(folder, workdir, mesh):
  """Starts two processes of four devices."""
  file = workdir.with_suffix('.py')
  file.write_text(
    'import pathlib\n'
    'from tests import sharding_test\n'
    'def get_config():\n'
    f'  return sharding_test._config(pathlib.Path({str(folder)!r}), {mesh})\n'
  )
  port = _free_port()
  flags = '--xla_force_host_platform_device_count=4'
  return [
    subprocess.Popen(
      [
        *(sys.executable, '-m', 'ffp_jax.main', f'--config={file}'),
        *(f'--workdir={workdir}', f'--coordinator=localhost:{port}'),
        *('--processes=2', f'--process={i}'),
      ],
      cwd=_ROOT,
      env=os.environ | tiny_run.ENVIRONMENT | {'XLA_FLAGS': flags},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]


if __name__ == '__main__':
  absltest.main()
