"""Recovers a pruned model: trains it to predict what the dense one predicts.

python -m ffp_jax.recover --workdir=DIR [--config.recovery.tokens=65536 ...]

DIR is a finished run of ffp_jax.main, whose settings hold but for those of
recovery. The model comes to DIR/recovered; DIR/pruned stays. Exit codes are
those of ffp_jax.main: after 74 and 75 the same command goes on.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from ffp_jax import config as config_lib
from ffp_jax import export, jobs, report, stages
from ffp_jax.checkpoints import model as model_lib
from ffp_jax.checkpoints import weights as weights_lib
from ffp_jax.errors import RequestError, refuse
from ffp_jax.evaluation import scoring
from ffp_jax.export.unslicing import unslice_params
from ffp_jax.models import functional
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning.recovery import RecoveryState
from ffp_jax.runtime import cli, run_state, sharding, signals
from ffp_jax.runtime import workdir as workdir_lib
from ffp_jax.runtime.storage import RECOVERY_METRICS, to_json
from ffp_jax.runtime.workdir import Workdir
from ffp_jax.text import recovery_text, tokenization

_FOLDER = 'recovery'  # in a workdir, of settings and checkpoints
_MAY_CHANGE = ('remat',)  # no result depends on it


def prepare(
  config: ml_collections.ConfigDict, job: jobs.PruningJob
) -> recovery_text.RecoveryText | None:
  """Checks what recovery needs, and reads its text; None if there is none.

  Raises:
    RequestError: what is asked can't be done; there is no text left, say.
  """
  settings = config.recovery
  if not settings.tokens:
    return None
  _check_rank(settings.rank, job.model)
  batch = config_lib.recovery_batch(config)
  tokens = settings.tokens // batch * batch
  context = config.text.context
  if settings.data:
    tokenizer = tokenization.load_tokenizer(job.directory)
    sources = recovery_text.read_sources(
      settings.data,
      tokenizer,
      context=context,
      most=tokens + context,
      field=config.text.field,
    )
    for source in sources:
      ids = source.windows.reshape(-1)
      tokenization.check_tokens(job.model, ids, context)
  else:
    own = np.concatenate([job.text.calibration, job.text.rest])
    sources = [recovery_text.Source(job.protocol.text, 1.0, own)]
  reserved = [job.text.reward, job.text.validation, job.text.heldout]
  if job.other:
    reserved.append(job.other.windows)
  return recovery_text.arrange(
    sources, reserved, seed=config.seed, windows=tokens // context
  )


def _check_rank(rank: int, model: ModelConfig) -> None:
  """Refuses low-rank updates that are no smaller than the weights."""
  least = min(model.width, model.head_size * model.groups, model.ffn)
  if rank > least:
    raise RequestError(
      f'recovery.rank: {rank} is more than {least}, the rank '
      "of the model's smallest matrix; give less, or 0 to train every weight"
    )


def recover_run(
  config: ml_collections.ConfigDict,
  job: jobs.PruningJob,
  text: recovery_text.RecoveryText | None,
  workdir: Workdir,
  results: dict,
) -> dict:
  """Recovers the model of a finished run in its workdir, which is ours.

  Args:
    config: see config.py.
    job: what the run works on.
    text: from `prepare`.
    workdir: of the run.
    results: content of its results.json.

  Returns:
    The results with `recovered`; as they were without a text.

  Raises:
    RequestError: the workdir holds another recovery.
  """
  if text is None:
    return results
  begun = _claim(config, workdir)
  if begun and 'recovered' in results:
    logging.info('%s already holds the recovered model', workdir.path)
    return results
  with workdir.timed('load'):
    dtype = functional.resolve_dtype(config.dtype)
    dense = weights_lib.load_params(job.directory, job.model, dtype)
  with workdir.timed('recover'):
    found = stages.recover(
      config,
      job,
      dense,
      load_pruned(workdir.path / 'pruned', job.model, dense, dtype),
      text,
      functools.partial(log_and_save, config, workdir),
    )
    del dense  # makes room
  with workdir.timed('save'):
    small = export.slice_params(found.params, job.model, found.keep)
    if workdir.writes:
      out = workdir.path / 'recovered'
      export.save(*small, job.directory, out, dtype=job.dtype)
  with workdir.timed('evaluate'):
    scorer = scoring.Scorer(job.model)
    stages.measure(results, job, scorer, found.params, found.keep, 'recovered')
  results['recovery'] = describe(config, text, found.losses)
  results['seconds'] = workdir.seconds
  workdir.write_json('results.json', results)
  if workdir.writes:
    epath.Path(workdir.path / _FOLDER / 'checkpoints').rmtree(missing_ok=True)
    report.write_report(workdir.path)
  return results


def describe(config, text, losses) -> dict:
  """Returns `recovery` of results.json: what the model was trained on."""
  return {
    'tokens': len(text.order) * config.text.context,
    'text': text.name,
    'rank': config.recovery.rank,
    'cross_entropy': config.recovery.cross_entropy,
    'validation_ppl': {k: float(np.exp(x)) for k, x in losses.items()},
  }


def load_pruned(
  directory: pathlib.Path, model: ModelConfig, dense: dict, dtype
) -> tuple[dict, Masks]:
  """Loads the pruned model of a run as the dense decoder with masks.

  Raises:
    RequestError: it isn't there, or not a part of the dense model.
  """
  files = model_lib.find_model(str(directory))
  small = weights_lib.load_params(files.directory, files.config, dtype)
  return unslice_params(small, files.config, dense, model)


def _claim(config, workdir: Workdir) -> bool:
  """Writes the settings of recovery, and returns whether they were there.

  Raises:
    RequestError: the workdir holds a recovery with other settings.
  """
  name = f'{_FOLDER}/config.json'
  ours = config.recovery.to_dict()
  theirs = workdir.read_json(name)
  if theirs is None:
    workdir.write_json(name, ours)
    return False
  fixed = [key for key in ours if key not in _MAY_CHANGE]
  differ = [x for x in fixed if to_json(ours[x]) != to_json(theirs.get(x))]
  if differ:
    raise RequestError(
      f'workdir: {workdir.path} holds a recovery with other '
      f'{", ".join(f"recovery.{key}" for key in differ)}; use the same '
      f'settings, or move {workdir.path / _FOLDER} away to do it again'
    )
  return True


def log_and_save(
  config, workdir: Workdir, first: RecoveryState, steps_from: Callable
) -> RecoveryState:
  """Takes a recovery to its end; logs and saves its steps.

  Args:
    config: see config.py.
    workdir: gets metrics and checkpoints.
    first: state before the first step, unless there is a checkpoint.
    steps_from: state -> iterator of (state, metrics), see `recovery.steps`.

  Returns:
    The last state.
  """
  batch = config_lib.recovery_batch(config)
  total = config.recovery.tokens // batch * batch
  directory = workdir.path / _FOLDER / 'checkpoints'
  state = start = _resume(directory, first)
  del first  # its buffers may be gone
  done = int(state.step) + (not np.isnan(state.start_loss))
  workdir.rewind(done, RECOVERY_METRICS)
  with (
    run_state.Checkpoints(
      directory,
      every=max(1, config.recovery.every // batch),
      keep=config.checkpoint.keep,
      ends=(),
      large=True,
    ) as saved,
    signals.save_on_signal(saved.flush),
    workdir.progress('recover', total, int(state.step) * batch) as show,
  ):
    saved.drop_after(int(state.step))
    begun = time.perf_counter()
    for state, metrics in saved.guard(steps_from(start)):
      seconds = time.perf_counter() - begun
      begun += seconds
      step = int(state.step)
      line = metrics | {'tokens': step * batch}
      workdir.append(line | {'seconds': round(seconds, 3)}, RECOVERY_METRICS)
      if metrics.get('diverged'):
        logging.warning(
          'recover: diverged at step %d; goes on from the best model at half '
          'the rate, once',
          step,
        )
      if step:
        if step * batch < total:  # the end is saved as a model
          saved.save(step, state)
        figures = {
          'KL': f'{metrics["kl"]:.3f}',
          'tokens/s': f'{batch / seconds:,.0f}',
        }
        show(step * batch, figures, seconds / batch)
  if not state.best_loss < state.start_loss:
    logging.warning('recover: no step was better, so the model stays as it was')
  return state


def _resume(directory, first: RecoveryState) -> RecoveryState:
  """Returns the state saved last, in the place of `first`; or `first`."""
  if not run_state.steps_in(directory):
    return first
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    first,
  )
  jax.tree.map(lambda x: x.delete(), first)  # makes room
  return run_state.restore_large_state(directory, like)


def recover_workdir(
  workdir: pathlib.Path, overrides: Mapping[str, Any]
) -> dict:
  """Recovers the model of a finished run of ffp_jax.main.

  Args:
    workdir: of the run.
    overrides: keys of config.py that differ from the run's, such as
      {'recovery.tokens': 65536}.

  Returns:
    What results.json holds.

  Raises:
    RequestError: the run isn't finished, or what is asked can't be done.
  """
  run = report.read_run(workdir)
  config = config_lib.from_dict(run.config)
  config.update_from_flattened_dict(overrides)
  if not config.recovery.tokens:
    raise RequestError(
      'recovery.tokens: is 0 in this run; give --config.recovery.tokens=N'
    )
  config_lib.validate(config)
  mesh = sharding.make_mesh(**config.mesh)
  job = jobs.prepare_job(config)
  text = prepare(config, job)
  with jax.set_mesh(mesh):
    claim = workdir_lib.claim
    with sharding.lead_process_first(claim, workdir, config) as leads:
      files = Workdir(workdir, writes=leads)
      return recover_run(config, job, text, files, run.results)


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; without --config they override what the run had."""
  if any(x.startswith('--config=') or x == '--config' for x in argv):
    refuse(
      '--config: the settings are those of the run; override them one by one, '
      'such as --config.recovery.tokens=65536'
    )
  argv = [argv[0], f'--config={config_lib.__file__}', *argv[1:]]
  rest = cli.parse_flags(argv, workdir='the directory of a finished run')
  cli.check_processes()
  return rest


def main(argv: list[str]) -> None:
  """Recovers the model of a run and prints its table."""
  del argv
  args = flags.FLAGS
  workdir, again = cli.begin_command('ffp_jax.recover', args.workdir)
  with cli.report_errors(workdir, again):
    cli.join_processes()
    results = recover_workdir(workdir, cli.overrides())
  if sharding.is_lead_process():
    report.print_run(workdir, results)


if __name__ == '__main__':
  config_flags.DEFINE_config_file(
    'config', None, 'Settings that differ from the run, see --help_config.'
  )
  cli.define_processes()
  flags.DEFINE_string('workdir', None, 'Directory of a finished run.')
  app.run(main, flags_parser=parse)
