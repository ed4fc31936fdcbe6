"""Measures a model, dense or pruned: perplexity, or scores in tasks.

python -m ffp_jax.evaluate --model=DIR --data=wikitext2:test --context=2048
python -m ffp_jax.evaluate --model=FILE.gguf --run=WORKDIR
python -m ffp_jax.evaluate --model=DIR --tasks=builtin --limit=500
"""

import json
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags

from ffp_jax import config as config_lib
from ffp_jax import jobs, report
from ffp_jax.checkpoints.model import ModelFiles, find_model, load_model
from ffp_jax.errors import RequestError, refuse
from ffp_jax.evaluation import perplexity, protocols
from ffp_jax.runtime import cli, sharding
from ffp_jax.text import tokenization

_OF_A_TEXT = ('data', 'field', 'context', 'protocol', 'stride', 'max_windows')


def evaluate(
  model: str,
  source: str,
  *,
  context: int,
  field: str = '',
  protocol: str = 'gptq',
  stride: int | None = None,
  max_windows: int | None = None,
  dtype: str = 'auto',
) -> dict:
  """Loads a model and computes its perplexity on a text.

  Args:
    model: name, as `find_model` takes it.
    source, field: text, as `corpora.read_text` takes it.
    context, protocol, stride, max_windows: see `perplexity.make_windows`.
    dtype: see `load_model`.

  Returns:
    dict of the model, ppl, `protocols.Protocol`, dtype, seconds and
    tokens_per_second (scored).
  """
  protocols.resolve_stride(protocol, context, stride)  # refuses at once
  files = find_model(model)
  text = tokenization.read_tokens(
    files.directory, source, field=field, report=True
  )
  windows = perplexity.make_windows(
    files,
    text,
    context=context,
    protocol=protocol,
    stride=stride,
    max_windows=max_windows,
  )
  (found,) = _measure(files, [windows], dtype)
  return {'model': model, **found}


def evaluate_heldout(model: str, workdir: pathlib.Path, *, dtype: str) -> dict:
  """Loads a model and computes its perplexity on the held-out text of a run.

  The figures stand beside those in the table of the run: of its model in fewer
  bits, say, or of a smaller model of the same family.

  Args:
    model: name, as `find_model` takes it.
    workdir: of the run, which is finished.
    dtype: see `load_model`.

  Returns:
    That of `evaluate`, with `other` if the run has a text of another kind: ppl,
    protocol, dtype, seconds and tokens_per_second on it.

  Raises:
    RequestError: the run isn't finished, its model or text is gone, or the
      model has another tokenizer.
  """
  config = config_lib.from_dict(report.read_run(workdir).config)
  files = find_model(model)
  job = jobs.prepare_job(config)
  texts = [(job.text.heldout, job.protocol)]
  if job.other:
    texts.append((job.other.windows, job.other.protocol))
  ids = np.concatenate([windows.reshape(-1) for windows, _ in texts])
  ours, theirs = (
    tokenization.load_tokenizer(x.directory).convert_ids_to_tokens(ids.tolist())
    for x in (files, job)
  )
  if ours != theirs:
    raise RequestError(
      f'--model: {model} has another tokenizer than the model of {workdir}, '
      'whose text is in tokens; use --data'
    )
  tokenization.check_tokens(files.config, ids, config.text.context)
  windows = [
    perplexity.Windows(tokens, protocols.full_spans(tokens), used)
    for tokens, used in texts
  ]
  found, *other = _measure(files, windows, dtype)
  return {'model': model, **found} | ({'other': other[0]} if other else {})


def _measure(
  files: ModelFiles, texts: Sequence[perplexity.Windows], dtype: str
) -> list[dict]:
  """Loads a model and returns `perplexity.measure` of texts, with its dtype."""
  with jax.set_mesh(sharding.make_mesh(1, 1, -1)):
    loaded = load_model(files, dtype)
    found = list(perplexity.measure(loaded, texts))
  used = jax.tree.leaves(loaded.params)[0].dtype.name
  return [x | {'dtype': used} for x in found]


def evaluate_tasks(
  model: str,
  names: list[str],
  *,
  fewshot: int | None,
  limit: int | None,
  context: int | None,
  batch_tokens: int,
  dtype: str,
) -> dict:
  """Loads a model and scores it in tasks of the LM Evaluation Harness.

  Args:
    model: name, as `find_model` takes it.
    names, fewshot, limit: see `harness.load_tasks` and `harness.score_tasks`.
    context: tokens per request at most; None for the model's own positions.
    batch_tokens: about as many tokens are computed together.
    dtype: see `load_model`.

  Returns:
    dict of the model, whether it is pruned, tasks, harness, context, dtype
    and seconds.
  """
  try:
    from ffp_jax.evaluation import harness, harness_model
  except ImportError as error:
    raise RequestError(
      f'--tasks needs lm_eval ({error}): pip install "lm_eval>=0.4.13,<0.5"'
    ) from error
  files = find_model(model)
  config = files.config
  tokenizer = tokenization.load_tokenizer(files.directory)
  ends = tokenization.end_ids(files.directory, tokenizer)
  context = context or config.max_positions
  tokenization.check_tokens(config, (), context)
  tasks = harness.load_tasks(names, tokenizer, fewshot)
  with jax.set_mesh(sharding.make_mesh(1, 1, -1)):
    params = load_model(files, dtype).params
    start = time.perf_counter()
    asked = harness_model.JaxLM(
      params,
      config,
      tokenizer,
      max_length=context,
      batch_tokens=batch_tokens,
      ends=ends,
    )
    figures = harness.score_tasks(asked, tasks, limit)
    seconds = time.perf_counter() - start
  return {
    'model': model,
    'pruned': config.sliced,
    'tasks': figures,
    'harness': harness.HARNESS,
    'context': context,
    'dtype': jax.tree.leaves(params)[0].dtype.name,
    'seconds': round(seconds, 3),
  }


def task_rows(found: dict) -> dict[str, float]:
  """Returns every metric of every task, named 'task, metric'."""
  return {
    f'{task}, {metric}': value
    for task, figures in found['tasks'].items()
    for metric, value in figures.items()
    if not metric.endswith(('_stderr', 'examples', 'fewshot', 'version'))
  }


def parse(argv):
  """`cli.parse_flags`, and what goes together."""
  rest = cli.parse_flags(argv)
  args = flags.FLAGS
  given = [name for name in _OF_A_TEXT if args[name].present]
  if args.run and given and not args.tasks:
    refuse(f'--{given[0]} and --run both say the text')
  out = args.out
  if out and not pathlib.Path(out).resolve().parent.is_dir():
    refuse(f'--out: no directory for {out!r}')
  return rest


def main(argv):
  del argv
  args = flags.FLAGS
  try:
    result = _tasks(args) if args.tasks else _perplexity(args)
    line = json.dumps(result, indent=2)
    if args.out:
      pathlib.Path(args.out).write_text(line + '\n')
  except (RequestError, OSError) as error:
    refuse(error)
  print(line)


def _perplexity(args):
  if args.run:
    run = pathlib.Path(args.run).expanduser()
    return evaluate_heldout(args.model, run, dtype=args.dtype)
  return evaluate(
    args.model,
    args.data,
    context=args.context or 512,
    field=args.field,
    protocol=args.protocol,
    stride=args.stride,
    max_windows=args.max_windows,
    dtype=args.dtype,
  )


def _tasks(args):
  run = pathlib.Path(args.run).expanduser() if args.run else None
  if run:
    report.read_run(run)  # fail early if --run is not a finished run
  found = evaluate_tasks(
    args.model,
    args.tasks,
    fewshot=args.fewshot,
    limit=args.limit,
    context=args.context,
    batch_tokens=args.batch_tokens,
    dtype=args.dtype,
  )
  if run:
    column = 'pruned' if found['pruned'] else 'dense'
    report.add_measurements(run, 'tasks', {column: task_rows(found)})
  return found


if __name__ == '__main__':
  flags.DEFINE_string('model', 'demo', 'Model directory, .gguf file or hub id.')
  flags.DEFINE_string(
    'data',
    'pydoc',
    'Text: general, pydoc, wikitext2, ptb or c4 (:SPLIT), a file, a directory, '
    'or several with weights (general:0.7,a.jsonl:0.3).',
  )
  flags.DEFINE_string(
    'field',
    '',
    "Field of --data that holds a document; '' for the first known name.",
  )
  flags.DEFINE_integer(
    'context',
    None,
    "Tokens per window (512), or per request of --tasks (the model's own).",
    lower_bound=2,
  )
  flags.DEFINE_enum(
    'protocol',
    'gptq',
    protocols.NAMES,
    'Windows side by side (gptq), or overlapping.',
  )
  flags.DEFINE_integer(
    'stride',
    None,
    'Stride of --protocol=sliding in tokens; half the context if unset.',
  )
  flags.DEFINE_integer(
    'max_windows',
    None,
    'Number of windows of context tokens to read at most.',
    lower_bound=1,
  )
  flags.DEFINE_enum(
    'dtype',
    'auto',
    ('auto', 'float32', 'bfloat16'),
    'auto: float32 on CPU, bfloat16 elsewhere.',
  )
  flags.DEFINE_list(
    'tasks',
    [],
    'Tasks instead of a text: builtin, or of lm_eval, or their .yaml files.',
  )
  flags.DEFINE_integer(
    'fewshot', None, "Number of examples in a prompt; the task's own if unset."
  )
  flags.DEFINE_integer(
    'limit', None, 'Number of examples to use of each task.', lower_bound=1
  )
  flags.DEFINE_integer(
    'batch_tokens',
    2048,
    'Number of tokens of --tasks to compute together.',
    lower_bound=1,
  )
  flags.DEFINE_string(
    'run',
    None,
    'Workdir of a finished run, in the place of --data: its held-out text; or '
    'with --tasks: whose report is to show them.',
  )
  flags.DEFINE_string('out', None, 'JSON file to write.')
  app.run(main, flags_parser=parse)
