"""The library: load, prune, recover, measure, save, generate in a few lines.

    import ffp_jax
    model = ffp_jax.load_model('demo')
    pruned = ffp_jax.prune_model(model, 'pydoc', sparsity=0.3)
    ffp_jax.perplexity(pruned.model, 'pydoc', context=512)
    ffp_jax.save_model(pruned.model, 'out')
    print(''.join(ffp_jax.generate_text(pruned.model, 'Once upon a time')))

Everything is in memory and runs on all devices of this process; a run that
writes a report and can be resumed is `python -m ffp_jax.main`. The pieces are
pure functions in the packages below: `pruning.projection.project`,
`pruning.importance`, `pruning.search.steps`, `pruning.calibration.calibrate`.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from ffp_jax import config as config_lib
from ffp_jax import jobs, prune, recover, report, stages
from ffp_jax import results as results_lib
from ffp_jax.checkpoints import model as model_lib
from ffp_jax.checkpoints.model import Model, ModelFiles
from ffp_jax.errors import RequestError
from ffp_jax.evaluation import perplexity as perplexity_lib
from ffp_jax.evaluation import scoring
from ffp_jax.export import formats, slicing
from ffp_jax.export.unslicing import unslice_params
from ffp_jax.pruning import search
from ffp_jax.pruning.sublayers import find_sublayers
from ffp_jax.reporting import labels
from ffp_jax.runtime import sharding, storage
from ffp_jax.text import prompts, tokenization
from ffp_jax.text.tokenization import TokenText

# A name or path as --config.data takes it, or token ids.
TextLike = str | pathlib.Path | np.ndarray | Sequence[int]


class PrunedModel(NamedTuple):
  """A pruned model, and how it came about."""

  model: Model
  allocation: dict  # what every layer keeps, as in allocation.json
  perplexity: dict[str, float]  # held-out, by 'dense', 'uniform', ...
  # On `config.text.other`: of the dense and the saved model; {} without one.
  other_perplexity: dict[str, float]
  metrics: list[dict]  # of every step of the search
  recovery: Sequence[dict] = ()  # of every step of recovery


class RecoveredModel(NamedTuple):
  """A model after recovery, and what was measured on the way."""

  model: Model
  metrics: list[dict]  # of every step


def load_model(name: str = 'demo', *, dtype: str | None = 'auto') -> Model:
  """Loads a model, dense or pruned.

  Args:
    name: 'demo' (SmolLM2-135M, fetched once), a Hugging Face directory, a
      pruned directory, a .gguf file or a hub id.
    dtype: 'float32', 'float16' or 'bfloat16' for the parameters; 'auto' for
      float32 on CPU and bfloat16 elsewhere; None for that of the file.

  Raises:
    RequestError: there is no such model, or it is broken.
  """
  with jax.set_mesh(sharding.make_mesh(1, 1, -1)):
    return model_lib.load_model(name, dtype)


def prune_model(
  model: Model,
  text: TextLike,
  *,
  sparsity: float = 0.2,
  config: ml_collections.ConfigDict | None = None,
  on_step: Callable[[dict], None] | None = None,
) -> PrunedModel:
  """Prunes a dense model: searches, calibrates, recovers, slices.

  Args:
    model: from `load_model`, dense.
    text: calibration, reward and held-out text, cut into disjoint parts. With
      `config.text.other` 'auto', a built-in text that it does not hold is
      scored as well, which may have to be downloaded once.
    sparsity: share of the prunable parameters to remove, in [0, 1).
    config: any other setting; None for the defaults, see
      `ffp_jax.config.defaults`.
    on_step: called with the metrics of every step of the search.

  Returns:
    The small model and what was measured.

  Raises:
    RequestError: what is asked can't be done; known before heavy work.
  """
  config = (config or config_lib.defaults()).copy_and_resolve_references()
  config.budget.sparsity = sparsity
  config_lib.validate(config)
  sublayers = jobs.prunable_sublayers(config, model.config)
  tokens = _tokens(model, text, config.text.field)
  job = jobs.make_job(config, model, model.file_dtype, sublayers, tokens)
  text_to_train = recover.prepare(config, job)
  metrics, recovery = [], []
  with jax.set_mesh(sharding.make_mesh(**config.mesh)):
    params = _place(model.params)
    first = search.initial_state(config, sublayers)
    scorer = scoring.Scorer(model.config)
    found = prune.prune(
      config,
      job,
      params,
      first,
      scorer,
      follow=_collect_steps(first, metrics, on_step),
      timed=lambda stage: contextlib.nullcontext(),
    )
    results = stages.evaluate(config, job, params, found, scorer)
    best, keep = found.params['searched'], found.keep['searched']
    if text_to_train:
      follow = stages.collect(recovery)
      best = stages.recover(
        config, job, params, (best, keep), text_to_train, follow
      ).params
      stages.measure(results, job, scorer, best, keep, 'recovered')
    small = slicing.slice_model(model, best, keep)
  return PrunedModel(
    small,
    results_lib.allocation(config, job, found.best),
    *_perplexities(results),
    metrics,
    recovery,
  )


def _place(params: dict) -> dict:
  """Returns parameters on the mesh, which may not be that of their loading."""
  return jax.device_put(params, sharding.param_shardings(params))


def _collect_steps(first, metrics: list[dict], on_step):
  """Returns what `prune.prune` takes as `follow` in memory.

  Args:
    first: where the search begins.
    metrics: gets those of every step.
    on_step: called with them, if given.
  """
  collect = stages.collect(metrics, on_step)

  def follow(steps):
    last = collect(first, lambda _: steps)
    return last, metrics[-1] if metrics else {}

  return follow


def recover_model(
  pruned: Model,
  dense: Model,
  text: TextLike,
  *,
  tokens: int = 65_536,
  config: ml_collections.ConfigDict | None = None,
  on_step: Callable[[dict], None] | None = None,
) -> RecoveredModel:
  """Trains a pruned model to predict what the dense model predicts.

  Args:
    pruned: a pruned model, of whatever tool, whose layers are parts of the
      dense model's.
    dense: the model that it was pruned from.
    text: to train on; a part of it validates, see `config.text`.
    tokens: number of tokens to train on.
    config: any other setting; None for the defaults, see
      `ffp_jax.config.defaults`.
    on_step: called with the metrics of every step.

  Returns:
    The recovered model, of the pruned one's shapes, and the metrics. It is the
    best of all validations, and so never worse than `pruned`.

  Raises:
    RequestError: what is asked can't be done; known before heavy work.
  """
  config = (config or config_lib.defaults()).copy_and_resolve_references()
  config.recovery.tokens = tokens
  config_lib.validate(config)
  ids = _tokens(dense, text, config.text.field)
  sublayers = find_sublayers(dense.config, round_heads=1, round_ffn=1, floor=0)
  job = jobs.make_job(config, dense, pruned.file_dtype, sublayers, ids)
  recovery_text, metrics = recover.prepare(config, job), []
  with jax.set_mesh(sharding.make_mesh(**config.mesh)):
    params = _place(dense.params)
    found = stages.recover(
      config,
      job,
      params,
      unslice_params(pruned.params, pruned.config, params, dense.config),
      recovery_text,
      stages.collect(metrics, on_step),
    )
    model = slicing.slice_model(dense, found.params, found.keep)
  return RecoveredModel(model, metrics)


def load_pruned(workdir: str | pathlib.Path) -> PrunedModel:
  """Loads what a finished run of `python -m ffp_jax.main` left in a directory.

  Raises:
    RequestError: it isn't the directory of a finished run.
  """
  run = report.read_run(pathlib.Path(workdir).expanduser())
  folder = pathlib.Path(workdir).expanduser()
  model = load_model(str(folder / labels.final_directory(run.results)))
  return PrunedModel(
    model,
    run.allocation,
    *_perplexities(run.results),
    run.metrics,
    run.recovery,
  )


def perplexity(
  model: Model,
  text: TextLike,
  *,
  context: int = 512,
  protocol: str = 'gptq',
  stride: int | None = None,
  max_windows: int | None = None,
) -> float:
  """Returns a model's perplexity on a text.

  Args:
    model: dense or pruned.
    text: a corpus such as 'wikitext2:test', a file, or token ids.
    context: tokens per window.
    protocol: 'gptq' for windows side by side, 'sliding' for overlapping ones.
    stride: of 'sliding' in tokens; None for half the context.
    max_windows: windows of `context` tokens to read at most; None for all.

  Raises:
    RequestError: the text can't be read or is too short.
  """
  windows = perplexity_lib.make_windows(
    _files(model),
    _tokens(model, text, '', report=True),
    context=context,
    protocol=protocol,
    stride=stride,
    max_windows=max_windows,
  )
  with jax.set_mesh(sharding.make_mesh(1, 1, -1)):
    (found,) = perplexity_lib.measure(model, [windows])
  return found['ppl']


def save_model(
  model: Model,
  path: str | pathlib.Path,
  *,
  format: str = 'ffp_jax',
  dtype: str | None = None,
) -> list[str]:
  """Writes a model.

  Args:
    model: dense or pruned.
    path: the directory (for 'gguf', the file) to make.
    format: 'ffp_jax' for what `load_model` reads, 'gguf' for llama.cpp, 'hf'
      or 'hf_dense' for transformers, 'orbax' for JAX.
    dtype: of the weights, such as 'float16'; None for that of the file that
      the model comes from.

  Returns:
    What the user should know about the file, one line each.

  Raises:
    RequestError: the format can't hold the model, or `path` exists.
  """
  return formats.write_model(
    model, format, storage.as_path(str(path)), dtype=dtype
  )


def generate_text(
  model: Model,
  prompt: str,
  *,
  tokens: int = 64,
  temperature: float = 0.0,
  seed: int = 0,
) -> Iterator[str]:
  """Continues a prompt.

  Args:
    model: dense or pruned.
    prompt: the text to continue.
    tokens: number of tokens to generate at most.
    temperature: 0 for the likeliest token each time.
    seed: of the sampling.

  Returns:
    An iterator over pieces of text, as they are generated.

  Raises:
    RequestError: the prompt is empty or too long.
  """
  asked = prompts.make_prompt(
    _files(model), prompt, tokens, tokenizer=model.tokenizer
  )
  return prompts.stream_text(
    model.params, model.config, asked, temperature=temperature, seed=seed
  )


def _perplexities(results) -> Iterator[dict[str, float]]:
  """Yields perplexities by model on held-out text, and on the other text."""
  for part in (results, results.get('other', {})):
    yield {
      name: value['ppl']
      for name, value in part.items()
      if isinstance(value, dict) and 'ppl' in value
    }


def _files(model: Model) -> ModelFiles:
  return ModelFiles(model.directory, model.description, model.config)


def _tokens(model: Model, text: TextLike, field: str, *, report=False):
  """Returns a text in tokens, whatever form it has."""
  if isinstance(text, str | pathlib.Path):
    return tokenization.read_tokens(
      model.directory, str(text), field=field, report=report
    )
  ids = np.asarray(text)
  if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
    raise RequestError(
      'text: give a name, a path, or token ids as one row of integers'
    )
  bos = model.tokenizer.bos_token_id
  return TokenText(ids.astype(np.int32), bos, 'token ids', 'the text')
