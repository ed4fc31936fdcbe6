"""Recovery as a stage of a run, alone on a finished run, and in memory."""

import functools
import json
import pathlib
import shutil
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

import ffp_jax
from ffp_jax import prune, recover, report
from ffp_jax.checkpoints import model as model_lib
from ffp_jax.errors import RequestError
from ffp_jax.export import slicing
from ffp_jax.export.unslicing import unslice_params
from ffp_jax.models.decoder import Decoder
from tests import testing, tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_RECOVERY = {
  'recovery.tokens': 512,
  'recovery.rows': 2,
  'recovery.every': 128,
  'recovery.learning_rate': 1e-3,
}


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


@functools.cache
def _inputs() -> dict:
  return tiny_run.inputs(pathlib.Path(_FOLDER.name), topics=12)


def _config(**overrides):
  return tiny_run.config(**(_inputs() | overrides))


@functools.cache
def _run(recovers: bool) -> pathlib.Path:
  """Workdir of a finished run, which tests copy before they change it."""
  workdir = pathlib.Path(_FOLDER.name) / f'run{recovers}'
  more = _RECOVERY if recovers else {}
  prune.prune_workdir(_config(**more), workdir, command='')
  return workdir


def _lines(workdir) -> list[dict]:
  lines = (workdir / 'recovery.jsonl').read_text().splitlines()
  return [json.loads(line) | {'seconds': None} for line in lines]


def _weights(workdir) -> bytes:
  return (workdir / 'recovered' / 'model.safetensors').read_bytes()


class _TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.workdir = self.folder / 'run'

  def copy_run(self, recovers=False):
    shutil.copytree(_run(recovers), self.workdir)
    return self.workdir

  def refused(self, pattern):
    return self.assertRaisesRegex(RequestError, rf'\A{pattern}.*\Z')


class RunTest(_TestCase):
  def test_what_a_run_leaves(self):
    workdir = _run(True)
    results = json.loads((workdir / 'results.json').read_text())
    made, lines = results['recovery'], _lines(workdir)
    self.assertEqual((made['tokens'], made['rank']), (512, 0))
    self.assertEqual([x['tokens'] for x in lines], [*range(0, 513, 64)])
    tested = [x['validation'] for x in lines if 'validation' in x]
    self.assertLen(tested, 5)  # before the first step, and four times
    np.testing.assert_allclose(
      [made['validation_ppl']['start'], made['validation_ppl']['best']],
      np.exp([tested[0], min(tested)]),
    )
    self.assertLess(results['recovered']['ppl'], results['calibrated']['ppl'])
    self.assertFalse((workdir / 'recovery' / 'checkpoints').exists())
    # The figure is that of the model in the directory.
    model = ffp_jax.load_model(str(workdir / 'recovered'))
    job = prune.prepare_job(_config())
    windows = job.text.heldout
    found = [
      ffp_jax.perplexity(model, row, context=windows.shape[1])
      for row in windows
    ]
    np.testing.assert_allclose(
      np.exp(np.mean(np.log(found))), results['recovered']['ppl'], rtol=1e-5
    )

  def test_the_pruned_model_stays_and_has_the_same_units(self):
    before, after = (
      safetensors.numpy.load_file(_run(True) / name / 'model.safetensors')
      for name in ('pruned', 'recovered')
    )
    self.assertEqual(
      {k: x.shape for k, x in before.items()},
      {k: x.shape for k, x in after.items()},
    )
    changed = [k for k in before if not np.array_equal(before[k], after[k])]
    self.assertLen(changed, len(before))

  def test_alone_it_is_as_in_the_run(self):
    workdir = self.copy_run()
    results = recover.recover_workdir(workdir, _RECOVERY)
    self.assertEqual(_weights(workdir), _weights(_run(True)))
    self.assertEqual(_lines(workdir), _lines(_run(True)))
    whole = json.loads((_run(True) / 'results.json').read_text())
    self.assertEqual(results['recovered'], whole['recovered'])
    config = json.loads((workdir / 'config.json').read_text())
    self.assertEqual(config['recovery']['tokens'], 512)
    # Again, there is nothing to do.
    with mock.patch.object(recover.stages, 'recover') as again:
      recover.recover_workdir(workdir, _RECOVERY)
    again.assert_not_called()

  def test_in_memory_it_is_as_in_the_run(self):
    config = _config(**_RECOVERY)
    model = ffp_jax.load_model(config.model)
    seen = []
    found = ffp_jax.prune_model(
      model,
      config.data,
      sparsity=config.budget.sparsity,
      config=config,
      on_step=seen.append,
    )
    loaded = ffp_jax.load_pruned(_run(True))
    jax.tree.map(
      np.testing.assert_array_equal, found.model.params, loaded.model.params
    )
    self.assertEqual(found.perplexity, loaded.perplexity)
    self.assertLen(found.recovery, len(loaded.recovery))
    self.assertEqual(seen, found.metrics)
    self.assertEqual([x['step'] for x in found.recovery], [*range(9)])

  @parameterized.parameters(0, 2)
  def test_of_a_model_in_memory(self, rank):
    config = _config(**_RECOVERY, **{'recovery.rank': rank})
    dense = ffp_jax.load_model(config.model)
    pruned = ffp_jax.load_model(str(_run(False) / 'pruned'))
    found = ffp_jax.recover_model(
      pruned, dense, config.data, tokens=512, config=config
    )
    self.assertEqual(found.model.config, pruned.config)
    tested = [x['validation'] for x in found.metrics if 'validation' in x]
    self.assertLess(min(tested), tested[0])
    # A model that was trained already goes on from where it is.
    again = ffp_jax.recover_model(
      found.model, dense, config.data, tokens=64, config=config
    )
    np.testing.assert_allclose(
      again.metrics[0]['validation'], min(tested), rtol=1e-5
    )

  def test_nothing_better_leaves_the_model(self):
    workdir = self.copy_run()
    # Steps of this size only do harm.
    settings = _RECOVERY | {'recovery.learning_rate': 30.0}
    with self.assertLogs('absl', 'WARNING') as logs:
      results = recover.recover_workdir(workdir, settings)
    said = '\n'.join(logs.output)
    self.assertIn('diverged', said)
    self.assertIn('stays as it was', said)
    self.assertEqual(results['recovered'], results['calibrated'])
    before, after = (
      safetensors.numpy.load_file(workdir / name / 'model.safetensors')
      for name in ('pruned', 'recovered')
    )
    jax.tree.map(np.testing.assert_array_equal, after, before)

  def test_report(self):
    text = (_run(True) / 'report.md').read_text()
    self.assertIn('## Recovery', text)
    self.assertIn('512 tokens', text)
    self.assertTrue((_run(True) / 'plot_recovery.png').exists())
    self.assertIn('recovered', (_run(True) / 'report.html').read_text())
    results = json.loads((_run(True) / 'results.json').read_text())
    allocation = json.loads((_run(True) / 'allocation.json').read_text())
    self.assertIn('\nrecovered  ', report.summary(results, allocation))
    self.assertNotIn('Recovery', (_run(False) / 'report.md').read_text())


class TextTest(_TestCase):
  def _prepare(self, **overrides):
    config = _config(**(_RECOVERY | overrides))
    job = prune.prepare_job(config)
    return job, recover.prepare(config, job)

  def test_own_text_without_what_validates_or_tests(self):
    job, text = self._prepare(**{'recovery.tokens': 10**5})
    (source,) = text.sources
    taken = {source.windows[i].tobytes() for i in text.order[:, 1]}
    for part in (job.text.reward, job.text.validation, job.text.heldout):
      self.assertEmpty(taken & {row.tobytes() for row in part})
    own = {row.tobytes() for row in job.text.calibration}
    self.assertNotEmpty(taken & own)
    self.assertGreater(len(taken), 10 * len(own))

  def test_held_out_text_in_another_file_is_left_out(self):
    """The same text at another place, so that windows are cut elsewhere."""
    path = self.folder / 'again.txt'
    path.write_text('Moved on. ' + pathlib.Path(_inputs()['data']).read_text())
    job, text = self._prepare(
      **{'recovery.data': str(path), 'recovery.tokens': 10**5}
    )
    tested = np.concatenate([job.text.heldout, job.text.validation])
    runs = {
      tuple(row[i : i + 13]) for row in tested for i in range(len(row) - 12)
    }
    (source,) = text.sources
    taken = np.unique(text.order[:, 1])
    self.assertBetween(len(taken), 10, len(source.windows) - 5)
    for row in source.windows[taken]:
      found = {tuple(row[i : i + 13]) for i in range(len(row) - 12)}
      self.assertEmpty(found & runs)

  def test_several_texts_by_weight(self):
    for name, word in (('a', 'apple '), ('b', 'pear ')):
      words = (f'{word}{i} ' for i in range(2000))
      (self.folder / f'{name}.txt').write_text(''.join(words))
    data = f'{self.folder}/a.txt:3,{self.folder}/b.txt:1'
    with self.assertLogs('absl', 'WARNING') as logs:
      _, text = self._prepare(
        **{'recovery.data': data, 'recovery.tokens': 32768}
      )
    np.testing.assert_array_equal(np.bincount(text.order[:, 0]), [768, 256])
    self.assertIn('a.txt:3', text.name)
    self.assertIn('times; more text', logs.output[0])

  def test_no_more_is_read_than_trained_on(self):
    path = self.folder / 'long.jsonl'
    line = json.dumps({'text': tiny_run.text(1)[:2000]})
    broken = '{"text": "never read"'
    path.write_text('\n'.join([line] * 40 + [broken]))
    _, text = self._prepare(**{'recovery.data': str(path)})
    (source,) = text.sources
    self.assertLen(source.windows, 17)  # of 32 tokens, one more than 512
    with self.refused('data: .*long.jsonl'):
      self._prepare(**{'recovery.data': str(path), 'recovery.tokens': 10**6})


class ResumeTest(_TestCase):
  def interrupt(self, step, workdir=None):
    """Ends a recovery just after it has written a step's metrics."""
    real = recover.Workdir.append

    def append(files, line, *args):
      real(files, line, *args)
      if args and line['step'] == step:
        raise KeyboardInterrupt

    with mock.patch.object(recover.Workdir, 'append', append):
      with self.assertRaises(KeyboardInterrupt):
        recover.recover_workdir(workdir or self.copy_run(), _RECOVERY)
    return self.workdir / 'recovery' / 'checkpoints'

  def finish(self):
    recover.recover_workdir(self.workdir, _RECOVERY)
    self.assertEqual(_weights(self.workdir), _weights(_run(True)))
    self.assertEqual(_lines(self.workdir), _lines(_run(True)))

  @parameterized.parameters(0, 1, 3, 5, 8)
  def test_as_undisturbed(self, step):
    saved = self.interrupt(step)
    steps = sorted(int(x.name) for x in saved.iterdir())
    self.assertEqual(steps, [*range(2, step, 2)][-2:])
    self.finish()

  def test_the_newest_checkpoint_is_damaged(self):
    saved = self.interrupt(7)
    for path in (saved / '6' / 'default' / 'd').iterdir():
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)
    with self.assertLogs('absl', 'WARNING') as logs:
      self.finish()
    self.assertIn('damaged', '\n'.join(logs.output))

  def test_all_checkpoints_are_damaged(self):
    saved = self.interrupt(7)
    for step in saved.iterdir():
      shutil.rmtree(step / 'default')
    with self.refused(f'workdir: no checkpoint in {saved} can be read'):
      recover.recover_workdir(self.workdir, _RECOVERY)

  def test_checkpoints_hold_what_is_trained(self):
    saved = self.interrupt(5)
    size = sum(x.stat().st_size for x in (saved / '4').rglob('*'))
    model = ffp_jax.load_model(_inputs()['model'])
    params = sum(x.size for x in jax.tree.leaves(model.params))
    # Parameters, two moments and the best parameters, and no dense model.
    self.assertBetween(size / (4 * params), 2.5, 4.6)

  def test_other_settings(self):
    self.interrupt(5)
    with self.refused(
      f'workdir: {self.workdir} .*recovery.rows, recovery.tokens.*recovery'
    ):
      recover.recover_workdir(
        self.workdir, _RECOVERY | {'recovery.tokens': 64, 'recovery.rows': 1}
      )
    recover.recover_workdir(self.workdir, _RECOVERY | {'recovery.remat': True})
    self.assertLess(_lines(self.workdir)[-1]['tokens'], 513)

  def test_killed_between_the_model_and_the_results(self):
    real = recover.Workdir.write_json

    def write_json(files, name, content):
      if name == 'results.json':
        raise KeyboardInterrupt
      real(files, name, content)

    workdir = self.copy_run()
    with mock.patch.object(recover.Workdir, 'write_json', write_json):
      with self.assertRaises(KeyboardInterrupt):
        recover.recover_workdir(workdir, _RECOVERY)
    self.assertTrue((workdir / 'recovered').exists())
    self.finish()


class UnsliceTest(_TestCase):
  @parameterized.product(name=[*testing.CASES], whole=[False, True])
  def test_is_the_masked_model(self, name, whole):
    pair = testing.pair(name)
    keep = testing.random_masks(pair.config)
    keep = testing.without_sublayers(keep) if whole else keep
    keep = jax.tree.map(jnp.asarray, keep)
    small = slicing.slice_params(pair.params, pair.config, keep)
    params, found = unslice_params(*small, pair.params, pair.config)
    jax.tree.map(np.testing.assert_array_equal, found, keep)
    shared = [
      ours is theirs
      for ours, theirs in zip(
        jax.tree.leaves(params), jax.tree.leaves(pair.params), strict=True
      )
    ]
    # All but output projections, which are zero where units are gone.
    removed = sum(bool(np.any(mask == 0.0)) for mask in keep)
    self.assertEqual(shared.count(False), removed)
    tokens = np.arange(8)[None]
    decoder = Decoder(pair.config)
    for masks in (keep, found):
      logits = [
        decoder.apply({'params': x}, tokens, masks)
        for x in (params, pair.params)
      ]
      np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)

  def _models(self):
    dense = ffp_jax.load_model(_inputs()['model'])
    pruned = ffp_jax.load_model(str(_run(False) / 'pruned'))
    return pruned, dense

  def test_units_are_found_after_training(self):
    pruned, dense = self._models()
    _, expected = unslice_params(
      pruned.params, pruned.config, dense.params, dense.config
    )
    trained = ffp_jax.load_model(str(_run(True) / 'recovered'))
    params, found = unslice_params(
      trained.params, trained.config, dense.params, dense.config
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    small, _ = slicing.slice_params(params, dense.config, found)
    jax.tree.map(np.testing.assert_array_equal, small, trained.params)

  def test_another_model(self):
    pruned, dense = self._models()
    noise = np.random.default_rng(7)
    other = jax.tree.map(
      lambda x: noise.standard_normal(x.shape).astype(np.float32), dense.params
    )
    with self.refused('dense: .*not a part of'):
      unslice_params(pruned.params, pruned.config, other, dense.config)

  def test_another_size(self):
    pruned, _ = self._models()
    tiny_run.write_model(self.folder / 'wide', num_hidden_layers=2)
    wide = model_lib.load_model(str(self.folder / 'wide'))
    with self.refused('dense: .*layers 3.*2'):
      unslice_params(pruned.params, pruned.config, wide.params, wide.config)

  def test_pruned_twice(self):
    pruned, dense = self._models()
    with self.refused('dense: .*itself pruned'):
      unslice_params(dense.params, dense.config, pruned.params, pruned.config)


class BadInputTest(_TestCase):
  @parameterized.parameters(
    (
      {'recovery.tokens': 63},
      'recovery.tokens: 63 is less than one step of 64',
    ),
    ({'recovery.tokens': -1}, 'recovery.tokens: must be 0 or more'),
    ({'recovery.rows': 0}, 'recovery.rows: 0 must be positive'),
    (
      {'recovery.cross_entropy': 1.5},
      'recovery.cross_entropy: 1.5 is outside',
    ),
    ({'recovery.rank': 33}, 'recovery.rank: 33 is more than 16'),
    ({'recovery.data': 'missing.txt'}, "data: no file 'missing.txt'"),
    ({'recovery.data': 'pydoc:0'}, 'data: the weights .* sum to 0'),
  )
  def test_before_anything_heavy(self, overrides, pattern):
    config = _config(**(_RECOVERY | overrides))
    with mock.patch.object(
      prune.weights_lib, 'load_params', side_effect=AssertionError
    ):
      with self.refused(pattern):
        prune.prune_workdir(config, self.workdir, command='')
    self.assertFalse(self.workdir.exists())

  def test_no_text_left(self):
    path = self.folder / 'short.txt'
    path.write_text('Too short.')
    with self.refused('recovery.data: .*short.txt is shorter than one window'):
      recover.recover_workdir(
        self.copy_run(), _RECOVERY | {'recovery.data': str(path)}
      )
    # All of it tests.
    job = prune.prepare_job(_config())
    held = job.text.heldout
    job = job._replace(text=job.text._replace(calibration=held, rest=held[:0]))
    with self.refused('recovery.data: all of .* give another text'):
      recover.prepare(_config(**_RECOVERY), job)

  def test_an_unfinished_run(self):
    workdir = self.copy_run()
    (workdir / 'results.json').unlink()
    with self.refused(f'report: {workdir} is not .* a finished run'):
      recover.recover_workdir(workdir, _RECOVERY)

  def test_the_pruned_model_is_gone(self):
    workdir = self.copy_run()
    shutil.rmtree(workdir / 'pruned')
    with self.refused('model: .*pruned'):
      recover.recover_workdir(workdir, _RECOVERY)

  def test_another_dense_model(self):
    workdir = self.copy_run()
    tiny_run.write_model(self.folder / 'other', seed=1)
    path = workdir / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {'model': str(self.folder / 'other')}))
    with self.refused('dense: .*not a part of'):
      recover.recover_workdir(workdir, _RECOVERY)

  def test_a_run_without_recovery_asks_for_tokens(self):
    with self.refused('recovery.tokens: is 0 in this run'):
      recover.recover_workdir(self.copy_run(), {})

  def test_other_keys_of_the_run(self):
    with self.refused('workdir: .*budget.sparsity'):
      recover.recover_workdir(
        self.copy_run(), _RECOVERY | {'budget.sparsity': 0.5}
      )


if __name__ == '__main__':
  absltest.main()
