import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
from absl import logging
from absl.testing import absltest
from matplotlib import image

from ffp_jax import report
from ffp_jax.errors import RequestError
from ffp_jax.runtime import workdir as workdir_lib
from ffp_jax.runtime.workdir import Workdir
from tests import finished_run

_PLOTS = ('plot_kept.png', 'plot_search.png', 'plot_perplexity.png')


def _strict(text):
  def refuse(constant):
    raise ValueError(f'{constant} is not JSON')

  return json.loads(text, parse_constant=refuse)


class _Folder(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.workdir = pathlib.Path(folder.name) / 'made' / 'later'
    self.run_files = Workdir(self.workdir)
    self.metrics = self.workdir / 'metrics.jsonl'

  def lines(self):
    return [_strict(line) for line in self.metrics.read_text().splitlines()]


class BookTest(_Folder):
  def test_construction_writes_nothing(self):
    self.assertFalse(self.workdir.exists())

  def test_append_writes_strict_json_at_once(self):
    line = {'step': np.int32(3), 'a': np.float32(0.5), 'ok': np.bool_(True)}
    self.run_files.append({**line, 'nan': np.nan, 'inf': np.float32(-np.inf)})
    self.assertEqual(
      self.lines(),
      [{'step': 3, 'a': 0.5, 'ok': True, 'nan': None, 'inf': None}],
    )
    self.run_files.append({'step': 4})
    self.assertLen(self.lines(), 2)
    self.assertEndsWith(self.metrics.read_text(), '\n')

  def test_rewind_drops_the_step_and_all_after_it(self):
    for step in range(5):
      self.run_files.append({'step': step, 'x': math.pi})
    self.run_files.rewind(3)
    self.assertEqual(
      self.lines(), [{'step': step, 'x': math.pi} for step in range(3)]
    )
    self.run_files.rewind(0)
    self.assertEqual(self.metrics.read_text(), '')

  def test_rewind_drops_a_torn_line(self):
    for torn in (b'{"st', b'{"step": 1, "x": "\xc3'):
      self.run_files.append({'step': 0})
      with open(self.metrics, 'ab') as file:
        file.write(torn)
      self.run_files.rewind(1)
      self.run_files.append({'step': 1})
      self.assertEqual(self.lines(), [{'step': 0}, {'step': 1}])
      self.metrics.unlink()

  def test_rewind_keeps_a_last_line_that_lacks_only_its_end(self):
    self.run_files.append({'step': 0})
    self.metrics.write_text('{"step": 0}')
    self.run_files.rewind(1)
    self.run_files.append({'step': 1})
    self.assertEqual(self.lines(), [{'step': 0}, {'step': 1}])

  def test_rewind_without_metrics(self):
    self.run_files.rewind(0)
    self.assertFalse(self.metrics.exists())

  def test_json_round_trip(self):
    content = {'a': np.arange(3), 'b': [np.nan, {'c': (np.float64(2), 'x')}]}
    self.run_files.write_json('a.json', content)
    text = (self.workdir / 'a.json').read_text()
    expected = {'a': [0, 1, 2], 'b': [None, {'c': [2.0, 'x']}]}
    self.assertEqual(_strict(text), expected)
    self.assertEqual(self.run_files.read_json('a.json'), expected)
    self.assertStartsWith(text, '{\n  "a"')
    self.assertIsNone(self.run_files.read_json('b.json'))

  def test_a_crash_leaves_the_old_file_whole(self):
    self.run_files.write_json('a.json', {'x': 1})
    self.run_files.append({'step': 0})
    with mock.patch.object(os, 'replace', side_effect=OSError):
      with self.assertRaises(OSError):
        self.run_files.write_json('a.json', {'x': 2})
      with self.assertRaises(OSError):
        self.run_files.rewind(0)
    self.assertEqual(self.run_files.read_json('a.json'), {'x': 1})
    self.assertEqual(self.lines(), [{'step': 0}])
    self.run_files.write_json('a.json', {'x': 3})
    self.assertCountEqual(
      os.listdir(self.workdir),
      ['a.json', 'metrics.jsonl', 'seconds.json', '.metrics.jsonl.tmp'],
    )

  def test_timed_adds_up_in_order(self):
    clock = iter([0.0, 1.25, 10.0, 10.5, 20.0, 20.0004])
    with (
      mock.patch.object(time, 'perf_counter', lambda: next(clock)),
      self.assertLogs('absl', 'INFO') as logs,
    ):
      for stage in ('b', 'a', 'b'):
        with self.run_files.timed(stage):
          pass
    self.assertEqual(
      list(self.run_files.seconds.items()), [('b', 1.25), ('a', 0.5)]
    )
    messages = [record.getMessage() for record in logs.records]
    self.assertEqual(messages[:3], ['b: start', 'b: 1.2 s', 'a: start'])

  def test_importing_it_imports_neither_jax_nor_matplotlib(self):
    code = (
      'import sys, ffp_jax.report as _\n'
      'assert not {"jax", "matplotlib"} & set(sys.modules)'
    )
    root = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, '-c', code], cwd=root, check=True)


class ProgressTest(_Folder):
  def watch(self, seconds, stderr, steps=4):
    """Lines logged by a search of `steps` more steps after 10."""
    with (
      mock.patch.object(workdir_lib, '_LOG_SECONDS', seconds),
      mock.patch.object(sys, 'stderr', stderr),
      # absl's clocks, which outlive a search.
      mock.patch.object(logging, '_log_timer_per_token', {}),
      self.assertLogs('absl', 'INFO') as logs,
    ):
      logging.info('begin')
      with self.run_files.progress('search', 10 + steps, 10) as show:
        for step in range(steps):
          figures = {'reward': f'{0.5 + step / 10:.3f}', 'sparsity': '20.0%'}
          show(11 + step, figures, 2.5)
    return [record.getMessage() for record in logs.records][1:]

  def test_log_lines_are_rare(self):
    stderr = io.StringIO()
    (line,) = self.watch(100, stderr)
    said = 'search 11/14, reward=0.500, sparsity=20.0%, about 8 s left'
    self.assertEqual(line, said)
    self.assertEqual(stderr.getvalue(), '')

  def test_each_step_is_logged_when_slow(self):
    lines = self.watch(0, io.StringIO())
    counts = [line.split(',')[0].split()[1] for line in lines]
    self.assertEqual(counts, ['11/14', '12/14', '13/14', '14/14'])
    self.assertIn('reward=0.600', lines[1])

  def test_a_terminal_gets_a_bar(self):
    class Terminal(io.StringIO):
      def isatty(self):
        return True

    stderr = Terminal()
    self.assertEmpty(self.watch(0, stderr))
    said = 'search 14/14, reward=0.800, sparsity=20.0%'
    self.assertIn(said, stderr.getvalue())


class WriteTest(_Folder):
  def write(self, run):
    finished_run.write(self.workdir, run)
    report.write_report(self.workdir)
    return (self.workdir / 'report.md').read_text()

  def assert_drawn(self, *names):
    self.assertCountEqual(
      [path.name for path in self.workdir.glob('*.png')], names
    )
    for name in names:
      pixels = image.imread(self.workdir / name)
      self.assertGreater(pixels.shape[1], 1000)
      self.assertGreater(pixels[..., :3].std(), 0.05, name)

  def test_report_holds_what_was_found(self):
    text = self.write(finished_run.run())
    self.assert_drawn(*_PLOTS)
    for part in (
      '# Pruning some/model\n',
      '1,000,000 parameters became 850,000 (-15.0%). On held-out text the '
      'perplexity is 19.65, that of the dense model 16.58: 1.19 times as high.',
      '- seed: 7',
      '- device: 4 x TPU v4',
      '- versions: python 3.11.7, jax 0.10.2\n',
      '```\npython -m ffp_jax.main --workdir=/tmp/x\n```',
      '| dense | 16.58 | 1.00 |',
      '| uniform + calibration | 21.03 | 1.27 |',
      '| searched + calibration | 19.65 | 1.19 |',
      'Text: pydoc; split: held-out (end of the text); protocol: gptq, stride '
      '512, no BOS; 32 windows of 512 tokens, 16,352 tokens scored.',
      '| tokens scored | 12,264 | 16,352 |',
      '| perplexity, dense | 15.00 | 16.58 |',
      '| perplexity, pruned | 20.00 | 19.65 |',
      '| dense / pruned | 0.750 | 0.844 |',
      'Sparsity 20.000% asked, 19.998% achieved',
      '15.00% of all parameters',
      '| parameters | 1,000,000 | 850,000 (-15.0%) |',
      '| of them prunable | 750,000 | 600,000 (-20.0%) |',
      '| bytes of weights | 4,000,000 | 3,400,000 (-15.0%) |',
      '- candidates evaluated: 12\n- tokens evaluated: 3,060, a backward '
      'pass counted as two forward ones\n',
      '- compilations of the search step: 2',
      '| search | 30.2 |',
      '| all | 31.8 |',
      '| 3 | 67% (2 / 3) | 65% (1,003 / 1,536) |',
      'the perplexity of the dense model divided by its own',
      '| 1 | 10.0% | 255 | 6 | 0.620 |\n| 2 | 20.0% | 255 | 6 | 0.650 |',
      '<details>\n<summary>Reward of every step</summary>\n\n'
      '| step | stage | mean of the step | best of the step |\n',
      *(f']({name})' for name in _PLOTS),
    ):
      self.assertIn(part, text)
    page = (self.workdir / 'report.html').read_text()
    self.assertIn('<td>600,000 (-20.0%)</td>', page)

  def test_a_text_of_another_kind(self):
    text = self.write(finished_run.run(other=finished_run.other()))
    for part in (
      '| model | perplexity | x dense | general | x dense |',
      '| dense | 16.58 | 1.00 | 31.25 | 1.00 |',
      '| uniform | 24.57 | 1.48 | - | - |',
      '| searched + calibration | 19.65 | 1.19 | 50.00 | 1.60 |',
      'Text: general; split: held-out (end of the text); protocol: gptq, '
      'stride 512, no BOS; 24 windows of 512 tokens, 12,264 tokens scored.',
    ):
      self.assertIn(part, text)
    page = (self.workdir / 'report.html').read_text()
    self.assertIn('<td>50.00</td>', page)

  def test_tables_are_whole(self):
    text = self.write(finished_run.run(lines=1, other=finished_run.other()))
    for table in text.split('\n\n'):
      if table.startswith('|'):
        bars = {line.count('|') for line in table.splitlines()}
        self.assertLen(bars, 1, table)

  def test_without_a_search(self):
    text = self.write(finished_run.run(lines=0, candidates_evaluated=0))
    self.assert_drawn('plot_kept.png', 'plot_perplexity.png')
    self.assertNotIn('plot_search.png', text)
    self.assertIn('No search steps', text)
    self.metrics.unlink()
    report.write_report(self.workdir)

  def test_without_calibration(self):
    run = finished_run.run(lines=1)
    text = self.write(
      run._replace(results=finished_run.uncalibrated(run.results))
    )
    self.assert_drawn(*_PLOTS)
    self.assertNotIn('+ calibration', text)
    self.assertIn('Both are before calibration', text)
    self.assertIn('the perplexity is 21.25', text)

  def test_broken_models_and_odd_paths(self):
    protocol = {**finished_run.results()['protocol'], 'text': '/$a|b_*[c](d)'}
    lines = [
      finished_run.line(0, reward_mean=np.nan),
      finished_run.line(1, reward_max=np.nan),
    ]
    text = self.write(
      finished_run.run(
        lines=lines,
        settings={'model': '<b>`x`'},
        uniform={'ppl': np.inf},
        searched={'ppl': 3e7},
        protocol=protocol,
      )
    )
    self.assert_drawn(*_PLOTS)
    self.assertIn('| uniform | not finite | - |', text)
    self.assertIn('| searched | 3.00e+07 |', text)
    self.assertIn(r'/\$a\|b_\*\[c\](d)', text)
    self.assertStartsWith(text, '# Pruning \\<b>\\`x\\`\n')

  def test_a_torn_line_does_not_stop_the_report(self):
    self.write(finished_run.run(lines=4))
    with open(self.metrics, 'a') as file:
      file.write('{"step": 4, "sta')
    report.write_report(self.workdir)
    self.assert_drawn(*_PLOTS)

  def test_it_holds_what_was_measured_besides(self):
    text = self.write(
      finished_run.run(
        tasks={'arc': {'dense': 0.51234, 'pruned': None}},
        speed={'tokens a second': {'dense': 1234.5, 'pruned': 2000.0}},
      )
    )
    self.assertIn('## Tasks', text)
    self.assertIn('|  | dense | pruned |', text)
    self.assertIn('| arc | 0.5123 | not finite |', text)
    self.assertIn('| tokens a second | 1,234 | 2,000 |', text)

  def test_what_is_measured_later_is_added(self):
    self.write(finished_run.run())
    report.write_report(self.workdir)
    report.add_measurements(self.workdir, 'tasks', {'dense': {'arc, acc': 0.5}})
    report.add_measurements(
      self.workdir, 'tasks', {'pruned': {'arc, acc': 0.4, 'b': 1.0}}
    )
    report.add_measurements(self.workdir, 'tasks', {'dense': {'arc, acc': 0.6}})
    text = (self.workdir / 'report.md').read_text()
    self.assertIn('|  | dense | pruned |', text)
    self.assertIn('| arc, acc | 0.6 | 0.4 |', text)
    self.assertIn('| b | - | 1 |', text)
    with self.assertRaisesRegex(RequestError, 'not the directory'):
      report.add_measurements(self.workdir / 'none', 'tasks', {})

  def test_scalars_where_tensorboardx_is_installed(self):
    self.write(finished_run.run(lines=2))
    self.assertFalse((self.workdir / 'tb').exists())
    site = self.workdir / 'site'
    site.mkdir()
    (site / 'tensorboardX.py').write_text(_TENSORBOARDX)
    with (
      mock.patch.object(sys, 'path', [str(site), *sys.path]),
      mock.patch.dict(sys.modules),
    ):
      report.write_report(self.workdir)
      report.write_report(self.workdir)
    (file,) = (self.workdir / 'tb').iterdir()
    written = [json.loads(line) for line in file.read_text().splitlines()]
    self.assertEqual(written[-1], 'closed')
    self.assertIn(['search/reward_max', 0.61, 1], written)
    names = [name for name, _, step in written[:-1] if step == 0]
    self.assertCountEqual(
      names, [f'search/{key}' for key in finished_run.line(0) if key != 'step']
    )

  def test_refuses_what_is_no_finished_run(self):
    with self.assertRaisesRegex(RequestError, 'not the directory of a finish'):
      report.write_report(self.workdir)
    self.assertFalse(self.workdir.exists())
    finished_run.write(self.workdir, finished_run.run())
    for name, text in (
      ('results.json', '{'),
      ('results.json', '[]'),
      ('results.json', '{"versions": {}, "device": ""}'),
      ('config.json', None),
    ):
      path = self.workdir / name
      path.unlink() if text is None else path.write_text(text)
      with self.assertRaisesRegex(RequestError, str(self.workdir)):
        report.write_report(self.workdir)
    self.assertFalse(list(self.workdir.glob('report.*')))


# Writes what it is told as lines of JSON, into a new file every time.
_TENSORBOARDX = """
import json, pathlib, tempfile

class SummaryWriter:
  def __init__(self, logdir):
    pathlib.Path(logdir).mkdir(parents=True, exist_ok=True)
    self.file = open(tempfile.mkstemp(dir=logdir)[1], 'w')

  def __enter__(self):
    return self

  def __exit__(self, *_):
    print('"closed"', file=self.file)
    self.file.close()

  def add_scalar(self, tag, value, global_step):
    print(json.dumps([tag, value, global_step]), file=self.file)
"""


class CommandTest(_Folder):
  def run_command(self, *arguments):
    root = pathlib.Path(__file__).parents[1]
    return subprocess.run(
      [sys.executable, '-m', 'ffp_jax.report', *map(str, arguments)],
      cwd=self.enterContext(tempfile.TemporaryDirectory()),
      env=os.environ | {'PYTHONPATH': str(root)},
      capture_output=True,
      text=True,
    )

  def assert_refused(self, done, pattern):
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertRegex(done.stderr, rf'^ffp_jax: .*{pattern}.*\n$')
    self.assertEqual(done.stdout, '')

  def test_one_is_redrawn(self):
    finished_run.write(self.workdir, finished_run.run())
    done = self.run_command(self.workdir)
    path = self.workdir / 'report.html'
    self.assertEqual((done.stdout, done.stderr), (f'{path}\n', ''))
    self.assertIn('some/model', path.read_text())

  def test_several_are_compared(self):
    other = self.workdir.with_name('other')
    for workdir in (self.workdir, other):
      finished_run.write(workdir, finished_run.run())
    path = self.workdir.with_name('new.html')
    done = self.run_command(self.workdir, other, f'--out={path}')
    self.assertEqual((done.stdout, done.stderr), (f'{path}\n', ''))
    self.assertIn(str(other), path.read_text())
    self.assertFalse((other / 'report.html').exists())

  def test_refuses(self):
    finished_run.write(self.workdir, finished_run.run())
    other = self.workdir.with_name('other')
    out = self.workdir.with_name('out.html')
    self.assert_refused(self.run_command(), 'directory of a finished run')
    self.assert_refused(
      self.run_command(self.workdir, other, f'--out={out}'), str(other)
    )
    self.assertFalse(out.exists())
    self.assert_refused(self.run_command(self.workdir, '--nme=1'), 'nme')
    self.assert_refused(self.run_command(self.workdir, f'--out={out}'), '--out')
    self.assert_refused(
      self.run_command(self.workdir, self.workdir, f'--out={other}/x.html'),
      '--out',
    )


class VersionsTest(absltest.TestCase):
  def test_they_are_those_installed(self):
    found = report.versions()
    self.assertEqual(list(found), ['python', 'jax', 'flax', 'ffp_jax'])
    self.assertStartsWith(sys.version, found['python'])
    self.assertEqual(found['jax'], jax.__version__)


class SummaryTest(absltest.TestCase):
  def check(self, results):
    text = report.summary(results, finished_run.allocation())
    self.assertLess(len(text.splitlines()), 16)
    self.assertLessEqual(max(map(len, text.splitlines())), 80)
    return text

  def test_it_holds_the_findings(self):
    text = self.check(finished_run.results())
    for name, ppl in (
      ('dense', '16.58'),
      ('uniform', '24.57'),
      ('uniform + calibration', '21.03'),
      ('searched', '21.25'),
      ('searched + calibration', '19.65'),
    ):
      self.assertRegex(text, rf'(?m)^{name.replace("+", "[+]")} +{ppl} ')
    for part in ('16,352 tokens', '19.998%', '1,000,000 -> 850,000', '4.0 MB'):
      self.assertIn(part, text)

  def test_a_text_of_another_kind(self):
    results = finished_run.results(
      other=finished_run.other('/a/long/path' * 9 + '/of/books.txt')
    )
    text = self.check(results)
    name = '.../path/of/books.txt'[-20:]
    for line in (
      f'{"":24}  perplexity   x dense  ...{name[3:]}   x dense',
      f'{"dense":24}       16.58      1.00                 31.25      1.00',
      f'{"searched":24}       21.25      1.28                     -         -',
      f'{"searched + calibration":24}       19.65      1.19                 '
      '50.00      1.60',
      f'...{name[3:]}: likewise, 24 windows, 12,264 tokens scored.',
    ):
      self.assertIn(line, text.splitlines())

  def test_without_calibration(self):
    results = finished_run.uncalibrated(finished_run.results())
    self.assertNotIn('+ calibration', self.check(results))

  def test_it_fits_when_all_is_large_or_broken(self):
    large = 999_999_999_999
    protocol = {
      'text': '/a/long/path' * 20 + '/wiki.txt',
      'split': 'held-out (end of the text)',
      'name': 'sliding',
      'context': 131072,
      'stride': 131072,
      'bos': True,
      'windows': 99999,
      'tokens': large,
    }
    text = self.check(
      finished_run.results(
        uniform={'ppl': math.inf},
        uniform_calibrated={'ppl': 1e300},
        searched={'ppl': math.nan},
        calibrated={'ppl': None},
        protocol=protocol,
        other={
          'dense': {'ppl': 1e300},
          'calibrated': {'ppl': math.nan},
          'protocol': protocol,
        },
        params_dense=large,
        params_pruned=large // 2,
        bytes_dense=4 * large,
        bytes_pruned=2 * large,
      )
    )
    self.assertEqual(text.count('not finite'), 4)
    self.assertIn('/wiki.txt', text)


if __name__ == '__main__':
  absltest.main()
