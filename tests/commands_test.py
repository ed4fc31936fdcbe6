"""Runs the commands whose own tests do not run them, by their documented line.

A command that takes over signals and the log runs in a process of its own, the
others in this one, where modules are imported and programs compiled once.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from unittest import mock

import jax
from absl import flags
from absl.testing import absltest, parameterized

from ffp_jax.baselines import settings
from ffp_jax.runtime import cli
from tests import tiny_run

_ROOT = pathlib.Path(__file__).parents[1]
_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_CONFIG = """
from tests import tiny_run


def get_config():
  return tiny_run.config(**{'search.steps': (0, 1), 'search.refit': 0.0})
"""
_COMPARISON = """
from ffp_jax.baselines import settings
from tests import tiny_run


def get_config():
  out = settings.comparison()
  out.update(tiny_run.config().to_dict())
  out.compare.update(
    {'methods': ('uniform',), 'sparsities': (0.25,), 'seeds': (0,)}
  )
  out.compare.tokens = 300
  out.compare.checkpoints = (1.0,)
  return out
"""
_TASK = """
task: lines
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/lines.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}]
"""
# Command lines in the documentation.
_LINE = re.compile(r'python -m (ffp_jax[\w.]*)((?:[^`\n\\]|\\+\n)*)')
_SHORT = re.compile(r'`(\.[\w.]+)( --[^`]*)`')


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


@functools.cache
def _inputs() -> pathlib.Path:
  folder = pathlib.Path(_FOLDER.name)
  tiny_run.inputs(folder)
  (folder / 'config.py').write_text(_CONFIG)
  (folder / 'comparison.py').write_text(_COMPARISON)
  (folder / 'lines.yaml').write_text(_TASK.replace('FOLDER', str(folder)))
  path = folder / 'model' / 'tokenizer_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'eos_token': '!'}))
  line = {'question': 'the way', 'choices': [' a', ' b']}
  (folder / 'lines.jsonl').write_text(json.dumps(line) + '\n')
  return folder


def _line(line: str) -> list[str]:
  """Splits a command line; FOLDER is where the inputs are."""
  return shlex.split(line.replace('FOLDER', str(_inputs())))


def _call(line: str) -> str:
  """Returns what a command prints that is run by `python -m` elsewhere."""
  done = subprocess.run(
    [sys.executable, '-m', *_line(line)],
    cwd=_ROOT,
    env=os.environ | tiny_run.ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  if done.returncode:
    raise AssertionError(f'{line}: exit code {done.returncode}\n{done.stderr}')
  return done.stdout


def _call_here(line: str) -> str:
  """Returns what a command prints that is run as `__main__` of this process."""
  module, *arguments = _line(line)
  known, printed = {*flags.FLAGS}, io.StringIO()
  try:
    with (
      mock.patch.object(sys, 'argv', [module, *arguments]),
      contextlib.redirect_stdout(printed),
    ):
      runpy.run_module(module, run_name='__main__')
  except SystemExit as end:
    if end.code:
      raise AssertionError(f'{line}: exit code {end.code}') from end
  finally:
    # The flag of runtime/cli.py stays: that is imported only once.
    for name in {*flags.FLAGS} - known - {'help_config'}:
      delattr(flags.FLAGS, name)
  return printed.getvalue()


class CommandTest(parameterized.TestCase):
  @parameterized.parameters(
    ('ffp_jax.benchmarks.search_step --tokens=16 --repeats=1', 'search step'),
    ('ffp_jax.benchmarks.latency --tokens=8 --out=FOLDER/table.json', 'ffn'),
    ('ffp_jax.evaluate --tasks=FOLDER/lines.yaml --context=32', 'tasks'),
  )
  def test_figures(self, line, key):
    self.assertIn(key, json.loads(_call_here(f'{line} --model=FOLDER/model')))

  def test_load(self):
    found = json.loads(_call_here('ffp_jax.benchmarks.load --params=1e6'))
    self.assertGreater(found['load_params, bfloat16']['seconds'], 0.0)
    # Embeddings of 128 and a layer, where a width of 2,048 has 176 million.
    self.assertBetween(found['load_params, float32']['weights, GB'], 0.03, 0.04)

  def test_inference(self):
    self.enterContext(mock.patch.dict('os.environ', tiny_run.ENVIRONMENT))
    found = json.loads(
      _call_here(
        'ffp_jax.benchmarks.inference --dense=FOLDER/model '
        '--pruned=FOLDER/model --prompt_tokens=4 --new_tokens=3 --repeats=1'
      )
    )
    self.assertLen(found['jax'], 2)

  def test_generate(self):
    said = _call_here(
      'ffp_jax.generate --model=FOLDER/model --dense=FOLDER/model '
      "--prompt='the way' --tokens=2"
    )
    self.assertEqual(said.count('the way'), 2)

  def test_frontier(self):
    said = _call(
      'ffp_jax.frontier --config=FOLDER/config.py --workdir=FOLDER/frontier '
      '--config.model=FOLDER/model --config.data=FOLDER/text.txt '
      '--sparsities=0.3'
    )
    self.assertIn('30', said)
    self.assertTrue((_inputs() / 'frontier' / 'frontier.html').exists())

  def test_compare(self):
    _call(
      'ffp_jax.compare --config=FOLDER/comparison.py --workdir=FOLDER/compare '
      '--config.model=FOLDER/model --config.data=FOLDER/text.txt'
    )
    self.assertIn('uniform', (_inputs() / 'compare' / 'compare.md').read_text())


def _documented():
  """Yields (file name, module, arguments) of every documented command line."""
  sources = [_ROOT / 'README.md', *_ROOT.glob('docs/*.md')]
  sources += [*_ROOT.glob('ffp_jax/**/*.py'), *_ROOT.glob('configs/*.py')]
  for path in sources:
    text = path.read_text()
    for module, rest in _LINE.findall(text):
      yield path.name, module.rstrip('.'), rest
    for module, rest in _SHORT.findall(text) if path.suffix == '.md' else ():
      yield path.name, f'ffp_jax{module}', rest


class DocumentationTest(absltest.TestCase):
  def test_modules_and_flags_exist(self):
    keys = settings.comparison()
    count = 0
    for where, module, rest in _documented():
      path = _ROOT / module.replace('.', '/')
      path = path / '__main__.py' if path.is_dir() else path.with_suffix('.py')
      if not path.exists():
        self.assertEqual(module, 'ffp_jax', f'{where}: no {module}')
        continue
      source = path.read_text()
      for name in re.findall(r'--([\w.]+)', rest):
        flag, *key = name.split('.')
        with self.subTest(f'{where}: {module} --{name}'):
          self.assertRegex(source, rf"DEFINE_\w+\(\s*'{flag}'")
          if key:
            self.assertIn('.'.join(key), _flat(keys))
        count += 1
    self.assertGreater(count, 40)


def _flat(keys):
  return {
    f'{name}.{rest}' if rest else name
    for name, value in keys.items()
    for rest in (_flat(value) if hasattr(value, 'items') else [''])
  }


class LogTest(absltest.TestCase):
  def test_names_what_took_long_to_compile(self):
    compiled = '/jax/core/compile/backend_compile_duration'
    with self.assertLogs('absl', 'INFO') as found:
      cli.log_compilation(compiled, 12.34, fun_name='jit(search_step)')
      cli.log_compilation(compiled, 0.5, fun_name='jit(other)')
      cli.log_compilation('/jax/core/another_duration', 9.0)
    (line,) = found.output
    self.assertIn('compiled search_step in 12.3 s', line)

  def test_jax_still_reports_compilation(self):
    seen = []

    def listen(event, seconds, **about):
      seen.append((event, about.get('fun_name')))

    jax.monitoring.register_event_duration_secs_listener(listen)

    @jax.jit
    def never_compiled_before(x):
      return x + 1

    never_compiled_before(1.0)
    jax.monitoring.unregister_event_duration_listener(listen)
    name = 'jit(never_compiled_before)'
    self.assertIn(('/jax/core/compile/backend_compile_duration', name), seen)


if __name__ == '__main__':
  absltest.main()
