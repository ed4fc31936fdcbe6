import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest, parameterized

from tests import mesh_run, tiny_run

_ROOT = pathlib.Path(__file__).parent.parent


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


class TwoProcessesTest(mesh_run.SameResultCase):
  @parameterized.parameters('llama', 'opt')
  def test_by_two_processes(self, family):
    folder = mesh_run.home(family)
    two = _start_two(folder, folder / 'two', (2, 2, 2))
    said = [process.communicate(timeout=300) for process in two]
    self.assertEqual([process.returncode for process in two], [0, 0], said)
    self.assert_same(folder / 'two', folder / 'one')
    # Only the first has something to say.
    self.assertIn('searched', said[0][0])
    self.assertNotIn('searched', said[1][0])

  def test_the_end_of_one_process_ends_the_other(self):
    folder = mesh_run.home('llama')
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
    'from tests import mesh_run\n'
    'def get_config():\n'
    f'  return mesh_run.config(pathlib.Path({str(folder)!r}), {mesh})\n'
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
