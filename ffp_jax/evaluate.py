"""Perplexity of a model directory, dense or pruned, or its score in tasks.

python -m ffp_jax.evaluate --model=DIR --data=wikitext2:test --context=2048
python -m ffp_jax.evaluate --model=DIR --tasks=hellaswag,piqa
"""

import json
import pathlib
import time

import jax
import numpy as np
from absl import app, flags

from ffp_jax import report
from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.errors import RequestError, refuse
from ffp_jax.evaluation import protocols, scoring
from ffp_jax.models import functional
from ffp_jax.runtime import cli, sharding
from ffp_jax.text import corpora, tokenization


def evaluate(
  model,
  source,
  *,
  context,
  field='',
  protocol='gptq',
  stride=None,
  max_windows=None,
  dtype='auto',
) -> dict:
  """Loads a model and computes its perplexity on a text.

  Args:
    model: directory or hub id, dense or pruned.
    source, field: text, as `corpora.read_text` takes it.
    context: tokens a window.
    protocol: see `protocols.arrange_windows`.
    stride: tokens, None for the protocol's own.
    max_windows: only the first so many times `context` tokens, None for all.
    dtype: see `functional.resolve_dtype`.

  Returns:
    dict of the model, ppl, `protocols.Protocol`, dtype, seconds and
    tokens_per_second (scored).
  """
  stride = protocols.resolve_stride(protocol, context, stride)
  directory = hub.resolve_model(model)
  config = model_config.read_model_config(directory)
  text = corpora.read_text(source, field=field, report=True)
  tokens = tokenization.tokenize(directory, text.content)
  tokenization.check_tokens(config, tokens.ids, context)
  limits = [n * context for n in (max_windows, text.windows) if n]
  ids = tokens.ids[: min(limits, default=None)]
  windows, spans = protocols.arrange_windows(protocol, ids, context, stride)
  cut = len(ids) < len(tokens.ids)
  part = f'first {len(ids):,} tokens' if cut else 'all'
  used = protocols.describe_protocol(
    protocol,
    text.name,
    f'{part} of {text.extent}',
    windows,
    spans,
    stride=stride,
    bos=tokens.bos,
  )
  dtype = functional.resolve_dtype(dtype)
  with jax.set_mesh(sharding.make_mesh(1, 1, -1)):
    params = weights.load_params(directory, config, dtype)
    scorer = scoring.Scorer(config)
    scorer(params, windows[:1], spans_Wx2=spans[:1])  # compiles
    start = time.perf_counter()
    mean = scorer(params, windows, spans_Wx2=spans, label='perplexity')
    seconds = time.perf_counter() - start
  return {
    'model': model,
    'ppl': float(np.exp(mean)),
    'protocol': used._asdict(),
    'dtype': dtype.name,
    'seconds': round(seconds, 3),
    'tokens_per_second': round(used.tokens / seconds, 1),
  }


def evaluate_tasks(
  model, names, *, fewshot, limit, context, batch_tokens, dtype
) -> dict:
  """Loads a model and has it do tasks of the LM Evaluation Harness.

  Args:
    model: directory or hub id, dense or pruned.
    names: of the tasks.
    fewshot, limit: see `harness.load_tasks` and `harness.score_tasks`.
    context: most tokens of a request, None for the model's own positions.
    batch_tokens: about so many are computed together.
    dtype: see `functional.resolve_dtype`.

  Returns:
    dict of the model, whether it is pruned, tasks, harness, context, dtype
    and seconds.
  """
  try:
    from ffp_jax.evaluation import harness
  except ImportError as error:
    raise RequestError(
      f'--tasks needs lm_eval ({error}): pip install "lm_eval>=0.4.13,<0.5"'
    ) from error
  directory = hub.resolve_model(model)
  config = model_config.read_model_config(directory)
  tokenizer = tokenization.load_tokenizer(directory)
  ends = tokenization.end_ids(directory, tokenizer)
  context = context or config.max_positions
  tokenization.check_tokens(config, (), context)
  loaded = harness.load_tasks(names, tokenizer, fewshot)
  dtype = functional.resolve_dtype(dtype)
  with jax.set_mesh(sharding.make_mesh(1, 1, -1)):
    params = weights.load_params(directory, config, dtype)
    start = time.perf_counter()
    asked = harness.JaxLM(
      params,
      config,
      tokenizer,
      max_length=context,
      batch_tokens=batch_tokens,
      ends=ends,
    )
    figures = harness.score_tasks(asked, loaded, limit)
    seconds = time.perf_counter() - start
  return {
    'model': model,
    'pruned': config.sliced,
    'tasks': figures,
    'harness': harness.HARNESS,
    'context': context,
    'dtype': dtype.name,
    'seconds': round(seconds, 3),
  }


def task_rows(found: dict) -> dict[str, float]:
  """Every metric of every task, by a name that tells them apart."""
  return {
    f'{task}, {metric}': value
    for task, figures in found['tasks'].items()
    for metric, value in figures.items()
    if not metric.endswith(('_stderr', 'examples', 'fewshot', 'version'))
  }


def parse(argv):
  """`cli.parse_flags`, and what goes together."""
  rest = cli.parse_flags(argv)
  if flags.FLAGS.run and not flags.FLAGS.tasks:
    refuse('--run goes with --tasks')
  out = flags.FLAGS.out
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
    report.read_run(run)  # so that nothing heavy comes to nothing
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
  flags.DEFINE_string('model', 'demo', 'Model directory or hub id.')
  flags.DEFINE_string(
    'data', 'pydoc', 'pydoc, wikitext2, ptb or c4 (:SPLIT), file or directory.'
  )
  flags.DEFINE_string(
    'field', '', "Of --data, what holds a document; '' for the known names."
  )
  flags.DEFINE_integer(
    'context',
    None,
    "Tokens a window, 512; of --tasks' requests, all of the model's.",
    lower_bound=2,
  )
  flags.DEFINE_enum(
    'protocol', 'gptq', protocols.NAMES, 'Windows side by side, or overlapping.'
  )
  flags.DEFINE_integer(
    'stride', None, 'Of --protocol=sliding, in tokens; half the context.'
  )
  flags.DEFINE_integer(
    'max_windows',
    None,
    'Only the first so many x context tokens.',
    lower_bound=1,
  )
  flags.DEFINE_enum(
    'dtype',
    'auto',
    ('auto', 'float32', 'bfloat16'),
    'auto: float32 on CPU, bfloat16 elsewhere.',
  )
  flags.DEFINE_list(
    'tasks', [], "lm_eval's tasks or .yaml files of tasks, instead of a text."
  )
  flags.DEFINE_integer(
    'fewshot', None, "Examples in a task's prompt; its own number."
  )
  flags.DEFINE_integer(
    'limit', None, 'Only so many examples of a task.', lower_bound=1
  )
  flags.DEFINE_integer(
    'batch_tokens', 2048, 'Of tasks, computed together.', lower_bound=1
  )
  flags.DEFINE_string(
    'run', None, 'Workdir of a finished run whose report takes the tasks too.'
  )
  flags.DEFINE_string('out', None, 'JSON file to write.')
  app.run(main, flags_parser=parse)
