"""Log-likelihoods of continuations that compute a shared context only once.

Shape letters as in decoder.py; N continuations of a context, C tokens of each
without its last, P scored positions.
"""

import collections
import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.evaluation.batches import MIN_LENGTH
from ffp_jax.models import decoding
from ffp_jax.models.decoder import (
  Cache,
  Decoder,
  ModelConfig,
  positions_from_zero,
)

_MIN_SUFFIX = 16  # tokens of the shortest padded suffix
_MIN_SCORED = 16  # scored positions of the smallest shape


class Query(NamedTuple):
  """A request, and the place in its `Sequence` where it is scored."""

  request: int  # index of the request
  start: int  # position in the prefix that predicts the first target
  suffix: int  # index of the suffix that predicts the other targets, if any
  targets: tuple[int, ...]  # token ids


class Sequence(NamedTuple):
  """A prefix with suffixes that share it, and the requests they answer."""

  prefix: tuple[int, ...]  # token ids
  suffixes_NxC: np.ndarray  # int32, each follows the prefix; right-padded
  queries: list[Query]


class _Context(NamedTuple):
  """The requests that share one context."""

  prefix: tuple[int, ...]
  suffixes: list[tuple[int, ...]]  # distinct; a single empty one if all are
  queries: list[Query]


def plan_sequences(
  requests: Iterable[tuple],
  *,
  max_length: int,
  batch_tokens: int,
  share: bool = True,
) -> list[Sequence]:
  """Plans the forward passes of requests so that equal tokens share them.

  Requests that differ only in their last token need a single forward pass. The
  continuations of a context follow its cached keys and values if that takes
  fewer tokens, padding included, than repeating the context, and if there are
  enough of the same shape to fill a batch, because each shape is compiled.

  Args:
    requests: (anything, context, continuation); the latter two are token ids
      and not empty.
    max_length: tokens of the longest input; longer ones lose their start.
    batch_tokens: approximate number of tokens in a batch.
    share: False to repeat contexts always, for positions that depend on the
      length of the input.

  Returns:
    `Sequence`s; each request is in exactly one of them.
  """
  contexts = _contexts(requests, max_length)
  shapes = [_shape(context) if share else None for context in contexts]
  counts = collections.Counter(shapes)
  sequences = []
  for context, shape in zip(contexts, shapes, strict=True):
    if shape and counts[shape] * shape.tokens >= batch_tokens >= shape.tokens:
      sequences.append(_share_prefix(context, shape))
    else:
      sequences.extend(_repeat_prefix(context))
  return sequences


def _contexts(requests, max_length) -> list[_Context]:
  """Groups requests by their context."""
  by_prefix = {}
  for i, (_, context, continuation) in enumerate(requests):
    # The last token is scored, but is no input.
    row = (context + continuation)[-max_length - 1 : -1]
    targets = tuple(continuation[-len(row) :])
    prefix = tuple(row[: len(row) - len(targets) + 1])
    by_prefix.setdefault(prefix, []).append((i, targets))
  contexts = []
  for prefix, pairs in by_prefix.items():
    distinct = dict.fromkeys(targets[:-1] for _, targets in pairs)
    suffixes = [suffix for suffix in distinct if suffix] or [()]
    # A single token is predicted by the prefix, whatever suffix follows.
    index = {(): 0} | {suffix: i for i, suffix in enumerate(suffixes)}
    queries = [
      Query(i, len(prefix) - 1, index[targets[:-1]], targets)
      for i, targets in pairs
    ]
    contexts.append(_Context(prefix, suffixes, queries))
  return contexts


class _Shape(NamedTuple):
  """Padded sizes of a prefix and its suffixes."""

  time: int  # tokens of the prefix
  count: int  # number of suffixes
  size: int  # tokens of a suffix

  @property
  def tokens(self) -> int:
    """Number of tokens computed."""
    return self.time + self.count * self.size


def _shape(context: _Context) -> _Shape | None:
  """Returns the shape of a shared prefix, or None if sharing saves nothing."""
  longest, count = max(map(len, context.suffixes)), len(context.suffixes)
  shape = _Shape(
    _power_of_two(len(context.prefix), MIN_LENGTH),
    _power_of_two(count, 1),
    _power_of_two(longest, _MIN_SUFFIX),
  )
  repeated = count * _power_of_two(len(context.prefix) + longest, MIN_LENGTH)
  return shape if count > 1 and shape.tokens < repeated else None


def _share_prefix(context: _Context, shape: _Shape) -> Sequence:
  """Returns one sequence, whose suffixes are padded to a shape."""
  padded = np.zeros((shape.count, shape.size), np.int32)
  for row, suffix in zip(padded, context.suffixes, strict=False):
    row[: len(suffix)] = suffix
  return Sequence(context.prefix, padded, context.queries)


def _repeat_prefix(context: _Context) -> list[Sequence]:
  """Returns a sequence without suffixes for every suffix of a context."""
  none = np.zeros((0, 0), np.int32)
  return [
    Sequence(
      context.prefix + suffix,
      none,
      [query for query in context.queries if query.suffix == i],
    )
    for i, suffix in enumerate(context.suffixes)
  ]


def _power_of_two(count: int, minimum: int) -> int:
  """Rounds up to a power of two, at least `minimum`."""
  return max(minimum, 1 << (count - 1).bit_length())


def score(
  params: dict,
  batch: list[Sequence],
  prefix_BxT: np.ndarray,
  length_B: np.ndarray,
  *,
  config: ModelConfig,
) -> Iterator[tuple[int, tuple[float, bool]]]:
  """Answers the requests of a batch.

  Args:
    params: of the decoder.
    batch: `Sequence`s whose suffixes have one shape.
    prefix_BxT: their prefixes, right-padded; rows after them are padding.
    length_B: tokens of each prefix, 1 or more.
    config: of the decoder.

  Yields:
    (index of a request, (sum of its targets' log-probabilities in nats, whether
    every target is the likeliest token)).
  """
  count, size = batch[0].suffixes_NxC.shape
  suffix_BxNxC = np.zeros((len(prefix_BxT), count, size), np.int32)
  positions, queries = [], []
  time = prefix_BxT.shape[1]
  for row, sequence in enumerate(batch):
    suffix_BxNxC[row] = sequence.suffixes_NxC
    for query in sequence.queries:
      rest = time + query.suffix * size if size else query.start + 1
      in_row = [query.start, *range(rest, rest + len(query.targets) - 1)]
      positions.append(np.array(in_row) + row * (time + count * size))
      queries.append(query)
  at_P = np.concatenate(positions)
  target_P = np.concatenate([query.targets for query in queries])
  padding = 0, _power_of_two(len(at_P), _MIN_SCORED) - len(at_P)
  log_prob_P, is_likeliest_P = jax.device_get(
    _score(
      params,
      prefix_BxT,
      length_B,
      suffix_BxNxC,
      np.pad(at_P, padding),
      np.pad(target_P, padding),
      config=config,
    )
  )
  end = 0
  for query in queries:
    start, end = end, end + len(query.targets)
    total = log_prob_P[start:end].sum(dtype=np.float64)
    all_likeliest = is_likeliest_P[start:end].all()
    yield query.request, (total.item(), all_likeliest.item())


def _score(
  params, prefix_BxT, length_B, suffix_BxNxC, at_P, target_P, *, config
):
  """Returns the log-probabilities of targets, and whether each is likeliest.

  Args:
    params: of the decoder.
    prefix_BxT: token ids, right-padded.
    length_B: tokens of each prefix.
    suffix_BxNxC: the suffixes that follow each prefix, separately; N may be 0.
    at_P: the positions that predict the targets, into B x (T + N C).
    target_P: token ids.
    config: `ModelConfig`.

  Returns:
    (float32 [P], bool [P]).
  """
  x_BxSxD = _stream(params, prefix_BxT, length_B, suffix_BxNxC, config=config)
  return _predict(params, x_BxSxD, at_P, target_P, config=config)


@functools.partial(jax.jit, static_argnames='config')
def _stream(params, prefix_BxT, length_B, suffix_BxNxC, *, config):
  """Returns the last residual stream of prefixes and suffixes, [B,T+NC,D]."""
  rows, time = prefix_BxT.shape
  _, count, size = suffix_BxNxC.shape
  dtype = jax.tree.leaves(params)[0].dtype

  def run(decoder):
    if not count:
      return decoder.stream(prefix_BxT, positions_from_zero(time))[0]
    cache = decoding.empty_cache(config, rows, time + size, dtype)
    x_BxTxD, cache = decoder.extend(prefix_BxT, cache)
    # Slots of padding are overwritten, or lie after the queries' positions.
    layers = jax.tree.map(
      lambda past: jnp.repeat(past, count, axis=-4), cache.layers
    )
    cache = Cache(layers, jnp.repeat(length_B, count))
    suffix_x, _ = decoder.extend(suffix_BxNxC.reshape(-1, size), cache)
    suffix_x = suffix_x.reshape(rows, count * size, -1)
    return jnp.concatenate([x_BxTxD, suffix_x], axis=1)

  return Decoder(config).apply({'params': params}, method=run)


@functools.partial(jax.jit, static_argnames='config')
def _predict(params, x_BxSxD, at_P, target_P, *, config):
  """Does the last part of `_score`.

  It is compiled apart from the layers, which take long to compile, because the
  number of positions varies more.
  """
  x_PxD = x_BxSxD.reshape(-1, x_BxSxD.shape[-1])[at_P]
  logits_PxV = Decoder(config).apply(
    {'params': params}, x_PxD[None], method='unembed'
  )[0]
  picked = jnp.take_along_axis(logits_PxV, target_P[:, None], axis=-1)[:, 0]
  is_likeliest_P = jnp.argmax(logits_PxV, axis=-1) == target_P
  return picked - jax.nn.logsumexp(logits_PxV, axis=-1), is_likeliest_P
