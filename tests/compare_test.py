import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax import baselines, compare, config, errors, jobs, stages
from ffp_jax.baselines import fastforward
from ffp_jax.baselines import settings as settings_lib
from ffp_jax.checkpoints import model_config
from ffp_jax.evaluation import scoring
from ffp_jax.pruning import masks, sublayers
from ffp_jax.reporting import method_comparison
from ffp_jax.runtime import workdir
from ffp_jax.runtime import workdir as workdir_lib
from tests import tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_METHODS = (
  *('uniform', 'flap', 'random', 'evopress', 'fastforward'),
  *('fastforward_cut', 'evopress_refit'),
)
_TOKENS = 1200


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


@functools.cache
def _inputs():
  return tiny_run.inputs(pathlib.Path(_FOLDER.name))


def _config(**overrides):
  out = settings_lib.comparison()
  changes = tiny_run.config().to_dict()
  changes['compare'] = {
    'methods': _METHODS,
    'sparsities': (0.25,),
    'seeds': (0,),
    'tokens': _TOKENS,
  }
  out.update(changes)
  out.update_from_flattened_dict(_inputs() | overrides)
  return out


@functools.cache
def _finished():
  """(workdir, results) of a comparison that nothing disturbed."""
  workdir = pathlib.Path(_FOLDER.name) / 'finished'
  return workdir, compare.run_comparison(_config(), workdir)


def _same(run):
  """What doesn't depend on the clock."""
  return {name: value for name, value in run.items() if name != 'seconds'}


class RunTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / 'run'

  def test_every_method_meets_both_budgets(self):
    _, results = _finished()
    self.assertEqual([run['method'] for run in results['runs']], [*_METHODS])
    model = model_config.read_model_config(pathlib.Path(_inputs()['model']))
    found = sublayers.find_sublayers(model, round_heads=1, round_ffn=2, floor=1)
    for run in results['runs']:
      slack = found.limit(0.25) - found.kept_cost(run['counts'])
      self.assertBetween(slack, 0, (found.step * found.unit_cost).min() - 1)
      self.assertLessEqual(run['tokens'], _TOKENS)
      self.assertEqual(run['checkpoints'][-1]['ppl'], run['ppl'])
      self.assertGreater(run['ppl_calibrated'], 1.0)

  def test_costs_are_counted(self):
    used = {run['method']: run['tokens'] for run in _finished()[1]['runs']}
    self.assertEqual(used['uniform'], 0)
    self.assertEqual(used['flap'], 6 * 32)
    # The calibration text, the dense model's losses, 13 steps of a candidate,
    # and 8 rows of reward text for each of up to two finalists.
    rest = used['fastforward'] - 6 * 32 - 8 * 16 - 13 * 3 * 16
    self.assertIn(rest, (128, 256))
    for name in ('random', 'evopress', 'fastforward', 'evopress_refit'):
      self.assertGreater(used[name], 0.6 * _TOKENS)

  def test_refit_candidates_are_scored_calibrated(self):
    one = _config(**{'budget.sparsity': 0.25})
    job = jobs.prepare_job(one)
    model = compare.load_shared_model(one, job)
    device_sublayers = stages.rank_units(job, model.params)
    scored = stages.refit(one, job, model.params, device_sublayers)
    problem = compare.problem_of(
      one, job, model, device_sublayers, lambda _: scored.params
    )
    counts, rows = problem.project(problem.start_S), problem.rows_RxT[:2]
    found = problem.refit().losses([counts], rows)[0]
    keep = masks.from_counts(device_sublayers.rank, counts)
    expected = scoring.Scorer(scored.model).each(scored.params, rows, keep)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    cut = problem.losses([counts], rows)[0]
    self.assertGreater(np.abs(found - cut).min(), 1e-4)
    self.assertEqual(problem.used, 6 * 32 + 2 * rows.size)

  @parameterized.parameters(*baselines.ABLATIONS)
  def test_an_ablation_changes_what_it_says(self, name):
    cell = settings_lib.cell_config(_config(), 0, 0.25, name)
    config.validate(cell)
    changed = workdir.changed_keys(cell, json.loads(_config().to_json()))
    self.assertContainsSubset(baselines.ABLATIONS[name], {*changed})
    plain = settings_lib.cell_config(_config(), 0, 0.25)
    self.assertCountEqual(
      workdir_lib.changed_keys(cell, json.loads(plain.to_json())),
      baselines.ABLATIONS[name],
    )

  def test_every_name_is_a_method_once(self):
    groups = (baselines.METHODS, baselines.VARIANTS, baselines.ABLATIONS)
    names = [name for group in groups for name in group]
    self.assertLen({*names}, len(names))
    config = _config()
    for name in baselines.ABLATIONS:
      self.assertIs(baselines.allocator(name, config).func, fastforward.shipped)

  def test_the_published_variant_has_the_exact_projection(self):
    found = baselines.allocator('fastforward_published_exact', _config())
    self.assertIs(found.func, fastforward.published)
    self.assertEqual(found.keywords['repair'], 'project')

  def test_uniform_is_that_of_a_run(self):
    one = _config(**{'budget.sparsity': 0.25})
    job = jobs.prepare_job(one)
    params, loss, *_ = compare.load_shared_model(one, job)
    device_sublayers = stages.rank_units(job, params)
    keep = {'uniform': stages.uniform_masks(one, job, device_sublayers)}
    repaired = stages.calibrate(one, job, params, keep)
    run = _finished()[1]['runs'][0]
    for name, weights in (
      ('ppl', params),
      ('ppl_calibrated', repaired['uniform']),
    ):
      expected = loss(weights, job.text.heldout, keep['uniform'])
      self.assertAlmostEqual(run[name], np.exp(expected), places=4)

  def test_outputs(self):
    workdir, results = _finished()
    self.assertEqual(
      json.loads((workdir / 'compare.json').read_text()), results
    )
    page = (workdir / 'compare.md').read_text()
    for name in ('plot_curves.png', 'plot_kept.png'):
      self.assertIn(f']({name})', page)
      self.assertStartsWith(
        (workdir / name).read_bytes().hex(), b'\x89PNG'.hex()
      )
    for run in results['runs']:
      row = f'{run["method"]} .*{run["ppl"]:,.2f}'
      self.assertRegex(page.replace('\\_', '_'), row)

  def test_goes_on_where_it_stopped(self):
    def crash(problem, seed, **settings):
      raise KeyboardInterrupt

    methods = {**baselines.METHODS, 'evopress': crash}
    with mock.patch.object(baselines, 'METHODS', methods):
      with self.assertRaises(KeyboardInterrupt):
        compare.run_comparison(_config(), self.workdir)
    left = json.loads((self.workdir / 'compare.json').read_text())
    self.assertLen(left['runs'], 3)
    untouched = {name: crash for name in _METHODS[:3]}
    with mock.patch.object(
      baselines, 'METHODS', {**baselines.METHODS, **untouched}
    ):
      results = compare.run_comparison(_config(), self.workdir)
    self.assertEqual(
      list(map(_same, results['runs'])),
      list(map(_same, _finished()[1]['runs'])),
    )

  def test_more_is_added(self):
    few = {'compare.methods': ('uniform',)}
    compare.run_comparison(_config(**few), self.workdir)
    more = few | {'compare.seeds': (0, 1), 'compare.sparsities': (0.25, 0.4)}
    results = compare.run_comparison(_config(**more), self.workdir)
    self.assertCountEqual(
      [(run['sparsity'], run['seed']) for run in results['runs']],
      [(0.25, 0), (0.25, 1), (0.4, 0), (0.4, 1)],
    )
    self.assertIn('±', (self.workdir / 'compare.md').read_text())
    with self.assertRaisesRegex(errors.RequestError, 'compare.tokens'):
      compare.run_comparison(
        _config(**more, **{'compare.tokens': 999}), self.workdir
      )

  @parameterized.parameters(
    ({'compare.methods': ('uniform', 'none')}, "'none'"),
    ({'compare.methods': ()}, 'compare.methods'),
    ({'compare.tokens': 191}, '192'),
    ({'budget.kv_cache': 0.3}, 'budget.kv_cache'),
    ({'compare.checkpoints': (0.0, 1.0)}, 'compare.checkpoints'),
    ({'compare.sparsities': (0.2, 1.5)}, 'budget.sparsity'),
    ({'compare.sparsities': (0.2, 0.97)}, 'sparsity'),
  )
  def test_refused(self, changes, word):
    with self.assertRaisesRegex(errors.RequestError, word):
      compare.run_comparison(_config(**changes), self.workdir)
    self.assertFalse(self.workdir.exists())


class CommandTest(parameterized.TestCase):
  @parameterized.parameters(
    (['--config=configs/llama.py', '--workdir=x'], 'compare'),
    (['--config=configs/compare.py'], '--workdir'),
    (['--config=configs/compare.py', '--workdir=x', 'y'], "'y'"),
  )
  def test_refused(self, arguments, word):
    done = subprocess.run(
      [sys.executable, '-m', 'ffp_jax.compare', *arguments],
      cwd=pathlib.Path(__file__).parent.parent,
      env=os.environ | tiny_run.ENVIRONMENT,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertLen(done.stderr.splitlines(), 1, done.stderr)
    self.assertStartsWith(done.stderr, 'ffp_jax: ')
    self.assertIn(word, done.stderr)


class OutcomeTest(absltest.TestCase):
  def test_overview_has_every_method_and_sparsity(self):
    runs = [
      {'method': name, 'sparsity': sparsity, 'ppl_calibrated': ppl}
      for name, sparsity, ppl in (
        *(('b', 0.3, 2.0), ('b', 0.2, 4.0), ('b', 0.3, 3.0)),
        *(('a', 0.3, 5.0), ('a', 0.3, None)),
      )
    ]
    table = method_comparison._overview(runs)
    self.assertEqual(table.header, ('method', '20%', '30%'))
    self.assertEqual(
      table.rows,
      [('b', '4.00 (1)', '2.50 ± 0.71 (2)'), ('a', '', 'not finite (2)')],
    )

  def test_behind_is_seed_by_seed(self):
    runs = [
      {'method': name, 'sparsity': 0.3, 'seed': seed, 'ppl_calibrated': ppl}
      for name, seed, ppl in (
        *(('fastforward', 0, 20.0), ('fastforward', 1, 30.0)),
        *(('b', 0, 23.0), ('b', 1, 29.0), ('b', 2, 1.0)),
        *(('a', 0, None), ('a', 1, 32.5)),
      )
    ]
    table = method_comparison._behind(runs)
    self.assertEqual(
      table.rows, [('b', '+1.00 ± 2.83 (1 of 2)'), ('a', '+2.50 (1 of 1)')]
    )
    self.assertIsNone(method_comparison._behind(runs[2:]))

  def test_no_curves_of_single_points(self):
    one, two = ({'runs': [{'checkpoints': [{}] * n}]} for n in (1, 2))
    names = [
      [x[0] for x in method_comparison._pictures(runs)] for runs in (one, two)
    ]
    self.assertEqual(names, [['kept'], ['curves', 'kept']])


if __name__ == '__main__':
  absltest.main()
