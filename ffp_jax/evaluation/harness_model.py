"""A JAX decoder behind the interface of the LM Evaluation Harness (lm_eval).

The harness defines the meaning of a request. Here the texts of requests are
tokenised and computed together in a few padded shapes.
"""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import lm_eval.utils
from lm_eval.api.model import TemplateLM
from lm_eval.models import utils as harness
from tqdm import tqdm

from ffp_jax.errors import RequestError
from ffp_jax.evaluation import batches, likelihood
from ffp_jax.models import decoding
from ffp_jax.models.decoder import ModelConfig

_NEW_TOKENS = 256  # for tasks without a number, as in the harness's own models
_DECODING = {'do_sample', 'temperature'}
_SAMPLING = {'top_k', 'top_p'}  # without effect on greedy decoding


class JaxLM(TemplateLM):
  """A decoder, dense or sliced, behind lm_eval's interface of a model.

  Its methods answer lm_eval's requests in their order.
  """

  tokenizer: Any

  def __init__(
    self,
    params: dict,
    config: ModelConfig,
    tokenizer: Any,
    *,
    max_length: int,
    batch_tokens: int,
    ends: Iterable[int] = (),
  ):
    """Takes a loaded model.

    Args:
      params: of the decoder.
      config: its `ModelConfig`.
      tokenizer: of transformers, with an EOS.
      max_length: tokens of its context; longer requests lose their start.
      batch_tokens: approximate number of tokens that are computed together.
      ends: token ids that end an answer, besides the tokenizer's EOS.
    """
    super().__init__()
    self._params, self._config, self.tokenizer = params, config, tokenizer
    self.max_length, self._batch_tokens = max_length, batch_tokens
    self._ends = {tokenizer.eos_token_id, *ends}

  @property
  def eot_token_id(self) -> int:
    """The token id that ends a text."""
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    """The token id that stands before a text: BOS, or EOS if there is none."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_
  ) -> list[int]:
    """Tokenises a text; None adds special tokens unless it begins with them."""
    if add_special_tokens is None:
      prefix = self.tokenizer.decode(self.prefix_token_id)
      add_special_tokens = not string.startswith(prefix)
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_) -> list:
    """Returns (log-likelihood, whether greedy) of tokenised continuations."""
    answers: list = [None] * len(requests)
    bar = tqdm(total=len(requests), disable=disable_tqdm, leave=False)
    for rows in likelihood.plan_rows(
      requests,
      max_length=self.max_length,
      batch_tokens=self._batch_tokens,
      share=self._config.rope_scaling.kind != 'dynamic',
    ):
      for i, answer in likelihood.score(
        self._params, rows, config=self._config
      ):
        answers[i] = answer
        bar.update()
    return answers

  def loglikelihood_rolling(
    self, requests, disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-likelihoods of whole texts, in nats."""
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

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Returns the texts that continue prompts, up to their stops."""
    answers: list = [None] * len(requests)
    bar = tqdm(total=len(requests), disable=disable_tqdm, leave=False)
    by_settings = {}
    for i, request in enumerate(requests):
      by_settings.setdefault(repr(request.args[1]), []).append(i)
    for index in by_settings.values():
      settings = _generation_settings(requests[index[0]].args[1], self)
      max_prompt = self.max_length - settings.max_tokens
      rows = [self.tok_encode(requests[i].args[0])[-max_prompt:] for i in index]
      for batch in batches.make_batches(
        rows,
        max_length=max_prompt,
        batch_tokens=self._batch_tokens,
        new_tokens=settings.max_tokens,
      ):
        texts = self._generate(batch, settings)
        for i, text in zip(batch.index, texts, strict=True):
          answers[index[i]] = text
        bar.update(len(batch.index))
    return answers

  def _generate(
    self, batch: batches.Batch, settings: '_GenerationSettings'
  ) -> list[str]:
    """Returns the text that continues each prompt, up to its stop."""
    steps = decoding.generate_tokens(
      self._params,
      batch.tokens,
      batch.lengths,
      config=self._config,
      slots=batch.tokens.shape[1] + settings.max_tokens,
      temperature=settings.temperature,
    )
    generated = [[] for _ in batch.index]
    unfinished = set(range(len(generated)))
    for token_Bx1 in itertools.islice(steps, settings.max_tokens):
      tokens = token_Bx1[:, 0].tolist()
      for row in tuple(unfinished):
        generated[row].append(tokens[row])
        text = self.tokenizer.decode(generated[row])
        if tokens[row] in self._ends or any(
          stop and stop in text for stop in settings.stops
        ):
          unfinished.remove(row)
      if not unfinished:
        break
    return [
      harness.postprocess_generated_text(
        self.tokenizer.decode(row, skip_special_tokens=True),
        settings.stops,
        None,
      )
      for row in generated
    ]


class _GenerationSettings(NamedTuple):
  """A task's settings of generation."""

  stops: list[str]  # texts that end an answer, EOS included
  max_tokens: int
  temperature: float


def _generation_settings(gen_kwargs: dict, model: JaxLM) -> _GenerationSettings:
  """Reads the harness's keyword arguments of a generation.

  Raises:
    RequestError: they ask for something that is not supported.
  """
  kwargs: dict[str, Any] = dict(
    harness.normalize_gen_kwargs(gen_kwargs, _NEW_TOKENS)
  )
  eos = model.tokenizer.decode(model.eot_token_id)
  stops = harness.handle_stop_sequences(kwargs.pop('until'), eos)
  max_tokens = kwargs.pop('max_gen_toks')
  known = _DECODING if kwargs['do_sample'] else _DECODING | _SAMPLING
  if unknown := kwargs.keys() - known:
    raise RequestError(
      f'tasks: generation by {", ".join(sorted(unknown))} is not supported'
    )
  if max_tokens >= model.max_length:
    raise RequestError(
      f'tasks: {max_tokens} new tokens leave no room for a prompt in '
      f'{model.max_length}'
    )
  return _GenerationSettings(stops, max_tokens, kwargs.get('temperature', 0.0))
