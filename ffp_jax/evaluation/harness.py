"""Tasks of the LM Evaluation Harness (lm_eval), answered in JAX.

What a request means is the harness's own; here its texts become tokens, and
those a handful of padded shapes.
"""

import contextlib
import itertools
import os
import random
import sys
from typing import NamedTuple

import lm_eval.tasks
import lm_eval.utils
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models import utils as harness
from tqdm import tqdm

from ffp_jax.errors import RequestError
from ffp_jax.evaluation import likelihood
from ffp_jax.models import decoding
from ffp_jax.models.decoder import ModelConfig

HARNESS = f'lm_eval {lm_eval.__version__}'
_RESAMPLES = 1000  # for standard errors without a formula
_NEW_TOKENS = 256  # of a task that doesn't say, as for the harness's models
# What it seeds with, so that its examples and shots are the same ones here.
_SEED, _NUMPY_SEED = 0, 1234
_DECODING = {'do_sample', 'temperature'}
_SAMPLING = {'top_k', 'top_p'}  # of no account for the likeliest token


def load_tasks(names: list[str], tokenizer, fewshot: int | None = None) -> dict:
  """The tasks of these names, with their examples.

  Args:
    names: of tasks, groups or tags, or paths of .yaml files.
    tokenizer: of the model that will be asked.
    fewshot: examples in each prompt, for tasks that allow it; None for the
      tasks' own number.

  Raises:
    RequestError: there is no such task, its examples can't be fetched, or
      the tokenizer has no EOS.
  """
  if tokenizer.eos_token_id is None:
    raise RequestError('tasks: the tokenizer has no end-of-sequence token')
  random.seed(_SEED)
  np.random.seed(_NUMPY_SEED)
  # The harness's own tasks are thousands of files to look through.
  own = not all(name.endswith('.yaml') for name in names)
  try:
    loaded = lm_eval.tasks.TaskManager(include_defaults=own).load(names)
  except Exception as error:  # of many kinds: files, formats, the network
    raise RequestError(
      f'tasks: cannot load {",".join(names)} '
      f'({type(error).__name__}: {error}); see lm_eval ls tasks'
    ) from error
  for task in loaded['tasks'].values():
    shots = task.get_config('num_fewshot')
    if fewshot is not None and shots != 0:  # a 0 of the task's own stands
      shots = fewshot
    task.set_config(key='num_fewshot', value=shots or 0)
    task.set_fewshot_seed(seed=_NUMPY_SEED)
  return loaded


def score_tasks(model: TemplateLM, loaded: dict, limit: int | None) -> dict:
  """Every task's and group's figures.

  Args:
    model: such as `JaxLM`.
    loaded: from `load`.
    limit: only the first so many examples of each task, None for all.

  Returns:
    dict from task to its metrics with standard errors, `examples`,
    `fewshot` and `version`.
  """
  # It would resample in forks, which the threads of JAX may not survive.
  os.environ['DISABLE_MULTIPROC'] = '1'
  with contextlib.redirect_stdout(sys.stderr):
    found = lm_eval.evaluate(
      model,
      loaded,
      limit=limit,
      log_samples=False,
      bootstrap_iters=_RESAMPLES,
    )
  counts = found['n-samples']
  return {
    name: {
      key.removesuffix(',none').replace('_stderr,none', '_stderr'): value
      for key, value in figures.items()
      if isinstance(value, float)
    }
    | {
      'examples': counts[name]['effective'] if name in counts else None,
      'fewshot': found['n-shot'].get(name),
      'version': found['versions'].get(name),
    }
    for name, figures in found['results'].items()
  }


class Batch(NamedTuple):
  """Requests that are computed together."""

  index: list[int]  # of the requests
  tokens: np.ndarray  # int32 [B,T]; the last rows may be of no request
  real: np.ndarray  # int32 [B], tokens that are no padding, 1 or more


def make_batches(
  rows: list[list[int]], *, most: int, tokens: int, extra: int = 0
):
  """Rows sorted by length, longest first, and padded to few shapes.

  Args:
    rows: token ids, none empty.
    most: tokens of the longest shape; other shapes are powers of two.
    tokens: about so many in a batch.
    extra: tokens that each row will grow by.

  Yields:
    `Batch`es.
  """

  def shape(length):
    return min(most, max(likelihood.SHORTEST, 1 << (length - 1).bit_length()))

  order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
  for time, group in itertools.groupby(order, lambda i: shape(len(rows[i]))):
    same, count = list(group), max(1, tokens // (time + extra))
    for start in range(0, len(same), count):
      index = same[start : start + count]
      padded = np.zeros((count, time), np.int32)
      real = np.ones(count, np.int32)
      for row, i in enumerate(index):
        real[row] = len(rows[i])
        padded[row, : real[row]] = rows[i]
      yield Batch(index, padded, real)


class JaxLM(TemplateLM):
  """What lm_eval asks of a model, dense or sliced."""

  def __init__(
    self,
    params,
    config: ModelConfig,
    tokenizer,
    *,
    max_length,
    batch_tokens,
    ends=(),
  ):
    """Takes a loaded model.

    Args:
      params: of the decoder.
      config: its `ModelConfig`.
      tokenizer: of transformers, with an EOS.
      max_length: tokens of its context; longer requests lose their start.
      batch_tokens: about so many are computed together.
      ends: ids that end an answer, besides the tokenizer's EOS.
    """
    super().__init__()
    self._params, self._config, self.tokenizer = params, config, tokenizer
    self.max_length, self._batch_tokens = max_length, batch_tokens
    self._ends = {tokenizer.eos_token_id, *ends}

  @property
  def eot_token_id(self):
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self):
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  def tok_encode(self, string, add_special_tokens=None, **_):
    if add_special_tokens is None:
      prefix = self.tokenizer.decode(self.prefix_token_id)
      add_special_tokens = not string.startswith(prefix)
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
    answers = [None] * len(requests)
    bar = tqdm(total=len(requests), disable=disable_tqdm, leave=False)
    kinds = {}
    for sequence in likelihood.plan_sequences(
      requests,
      most=self.max_length,
      tokens=self._batch_tokens,
      share=self._config.rope_scaling.kind != 'dynamic',
    ):
      kinds.setdefault(sequence.suffixes_NxC.shape, []).append(sequence)
    for (count, size), alike in kinds.items():
      for batch in make_batches(
        [sequence.prefix for sequence in alike],
        most=self.max_length,
        tokens=self._batch_tokens,
        extra=count * size,
      ):
        for i, answer in likelihood.score(
          self._params,
          [alike[i] for i in batch.index],
          batch.tokens,
          batch.real,
          config=self._config,
        ):
          answers[i] = answer
          bar.update()
    return answers

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    windows, owners = [], []
    for i, request in enumerate(requests):
      for window in lm_eval.utils.get_rolling_token_windows(
        self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      ):
        windows.append((None, *lm_eval.utils.make_disjoint_window(window)))
        owners.append(i)
    totals = [0.0] * len(requests)
    scored = self._loglikelihood_tokens(windows, disable_tqdm)
    for i, (total, _) in zip(owners, scored, strict=True):
      totals[i] += total
    return totals

  def generate_until(self, requests, disable_tqdm=False):
    answers = [None] * len(requests)
    bar = tqdm(total=len(requests), disable=disable_tqdm, leave=False)
    kinds = {}
    for i, request in enumerate(requests):
      kinds.setdefault(repr(request.args[1]), []).append(i)
    for index in kinds.values():
      settings = _settings(requests[index[0]].args[1], self)
      room = self.max_length - settings.new
      rows = [self.tok_encode(requests[i].args[0])[-room:] for i in index]
      for batch in make_batches(
        rows, most=room, tokens=self._batch_tokens, extra=settings.new
      ):
        texts = self._generate(batch, settings)
        for i, text in zip(batch.index, texts, strict=True):
          answers[index[i]] = text
        bar.update(len(batch.index))
    return answers

  def _generate(self, batch, settings) -> list[str]:
    """The text that follows each request, up to where it stops."""
    steps = decoding.generate_tokens(
      self._params,
      batch.tokens,
      batch.real,
      config=self._config,
      slots=batch.tokens.shape[1] + settings.new,
      temperature=settings.temperature,
    )
    made = [[] for _ in batch.index]
    open_rows = set(range(len(made)))
    for chosen in itertools.islice(steps, settings.new):
      chosen = chosen[:, 0].tolist()
      for row in tuple(open_rows):
        made[row].append(chosen[row])
        text = self.tokenizer.decode(made[row])
        if chosen[row] in self._ends or any(
          stop and stop in text for stop in settings.until
        ):
          open_rows.remove(row)
      if not open_rows:
        break
    return [
      harness.postprocess_generated_text(
        self.tokenizer.decode(row, skip_special_tokens=True),
        settings.until,
        None,
      )
      for row in made
    ]


class _Settings(NamedTuple):
  """How a task wants its answers."""

  until: list[str]  # what ends one, EOS included
  new: int  # most tokens
  temperature: float


def _settings(asked: dict, model: JaxLM) -> _Settings:
  """The harness's keyword arguments of a generation.

  Raises:
    RequestError: they ask for what isn't there.
  """
  kwargs = dict(harness.normalize_gen_kwargs(asked, _NEW_TOKENS))
  eos = model.tokenizer.decode(model.eot_token_id)
  until = harness.handle_stop_sequences(kwargs.pop('until'), eos)
  new = kwargs.pop('max_gen_toks')
  known = _DECODING if kwargs['do_sample'] else _DECODING | _SAMPLING
  if unknown := kwargs.keys() - known:
    raise RequestError(
      f'tasks: generation by {", ".join(sorted(unknown))} is not supported'
    )
  if new >= model.max_length:
    raise RequestError(
      f'tasks: {new} new tokens leave no room for a prompt in '
      f'{model.max_length}'
    )
  return _Settings(until, new, kwargs.get('temperature', 0.0))
