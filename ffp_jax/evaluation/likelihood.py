"""Log-likelihoods of continuations, without computing a context twice.

Shape letters as in decoder.py; N continuations of a context, C tokens of each
without its last, P scored positions.
"""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models import decoding
from ffp_jax.models.decoder import (
  Cache,
  Decoder,
  ModelConfig,
  positions_from_zero,
)

SHORTEST = 32  # tokens of the smallest shape
_SHORTEST_SUFFIX = 16
_FEWEST = 16  # scored positions of the smallest shape


class Query(NamedTuple):
  """A request, and where in its `Sequence` it is scored."""

  request: int
  start: int  # of the prefix: the position that predicts the first target
  suffix: int  # the one that predicts the other targets, if there are any
  targets: tuple[int, ...]


class Sequence(NamedTuple):
  """Tokens that are computed together, and the requests they answer."""

  prefix: tuple[int, ...]
  suffixes_NxC: np.ndarray  # int32, each follows the prefix; padded behind
  queries: list[Query]


class _Context(NamedTuple):
  """What is asked about one context."""

  prefix: tuple[int, ...]
  suffixes: list[tuple[int, ...]]  # different; one is empty if all would be
  queries: list[Query]


def plan_sequences(
  requests, *, most: int, tokens: int, share: bool = True
) -> list[Sequence]:
  """Plans the forwards of requests so that equal tokens share them.

  Requests that differ in their last token alone need only one forward. The
  continuations of a context follow its cached keys and values if that takes
  fewer tokens, padding included, than to repeat the context, and if there are
  enough of the same shape to fill a batch: each shape has to be compiled.

  Args:
    requests: (anything, context, continuation); the latter two are token ids
      and not empty.
    most: tokens of the longest input; longer ones lose their start.
    tokens: about so many are in a batch.
    share: False to repeat contexts, as for positions that stretch with them.

  Returns:
    `Sequence`s; each request is in one of them.
  """
  contexts = _contexts(requests, most)
  shapes = [_shape(context) if share else None for context in contexts]
  counts = collections.Counter(shapes)
  out = []
  for context, shape in zip(contexts, shapes, strict=True):
    if shape and counts[shape] * shape.tokens >= tokens >= shape.tokens:
      out.append(_shared(context, shape))
    else:
      out.extend(_repeated(context))
  return out


def _contexts(requests, most) -> list[_Context]:
  asked = {}
  for i, (_, context, continuation) in enumerate(requests):
    # The last token is scored, but not read.
    row = (context + continuation)[-most - 1 : -1]
    targets = tuple(continuation[-len(row) :])
    prefix = tuple(row[: len(row) - len(targets) + 1])
    asked.setdefault(prefix, []).append((i, targets))
  out = []
  for prefix, pairs in asked.items():
    different = dict.fromkeys(targets[:-1] for _, targets in pairs)
    suffixes = [suffix for suffix in different if suffix] or [()]
    # A lone token is scored in the prefix, whatever suffix follows.
    which = {(): 0} | {suffix: i for i, suffix in enumerate(suffixes)}
    queries = [
      Query(i, len(prefix) - 1, which[targets[:-1]], targets)
      for i, targets in pairs
    ]
    out.append(_Context(prefix, suffixes, queries))
  return out


class _Shape(NamedTuple):
  """Padded sizes of a prefix and its suffixes."""

  time: int
  count: int
  size: int

  @property
  def tokens(self) -> int:
    return self.time + self.count * self.size


def _shape(context: _Context) -> _Shape | None:
  """What is computed if suffixes follow the cache; None if it doesn't pay."""
  longest, count = max(map(len, context.suffixes)), len(context.suffixes)
  shape = _Shape(
    _rounded(len(context.prefix), SHORTEST),
    _rounded(count, 1),
    _rounded(longest, _SHORTEST_SUFFIX),
  )
  repeated = count * _rounded(len(context.prefix) + longest, SHORTEST)
  return shape if count > 1 and shape.tokens < repeated else None


def _shared(context: _Context, shape: _Shape) -> Sequence:
  padded = np.zeros((shape.count, shape.size), np.int32)
  for row, suffix in zip(padded, context.suffixes, strict=False):
    row[: len(suffix)] = suffix
  return Sequence(context.prefix, padded, context.queries)


def _repeated(context: _Context) -> list[Sequence]:
  none = np.zeros((0, 0), np.int32)
  return [
    Sequence(
      context.prefix + suffix,
      none,
      [query for query in context.queries if query.suffix == i],
    )
    for i, suffix in enumerate(context.suffixes)
  ]


def _rounded(count: int, least: int) -> int:
  """The power of two from `least` on that is no smaller."""
  return max(least, 1 << (count - 1).bit_length())


def score(
  params, batch: list[Sequence], prefix_BxT, real_B, *, config: ModelConfig
):
  """Answers the requests of a batch.

  Args:
    params: of the decoder.
    batch: `Sequence`s whose suffixes have one shape.
    prefix_BxT: their prefixes, padded behind and below.
    real_B: tokens of each prefix, 1 or more.
    config: of the decoder.

  Yields:
    (request, (sum of its targets' log-probabilities, whether each target is
    the likeliest token)).
  """
  count, size = batch[0].suffixes_NxC.shape
  suffix_BxNxC = np.zeros((len(prefix_BxT), count, size), np.int32)
  at, queries = [], []
  time = prefix_BxT.shape[1]
  for row, (_, suffixes, asked) in enumerate(batch):
    suffix_BxNxC[row] = suffixes
    for query in asked:
      rest = time + query.suffix * size if size else query.start + 1
      where = [query.start, *range(rest, rest + len(query.targets) - 1)]
      at.append(np.array(where) + row * (time + count * size))
      queries.append(query)
  at, targets = np.concatenate(at), np.concatenate([q.targets for q in queries])
  padding = 0, _rounded(len(at), _FEWEST) - len(at)
  log_prob, hit = jax.device_get(
    _score(
      params,
      prefix_BxT,
      real_B,
      suffix_BxNxC,
      np.pad(at, padding),
      np.pad(targets, padding),
      config=config,
    )
  )
  end = 0
  for query in queries:
    start, end = end, end + len(query.targets)
    total = log_prob[start:end].sum(dtype=np.float64)
    yield query.request, (total.item(), hit[start:end].all().item())


def _score(params, prefix_BxT, real_B, suffix_BxNxC, at_P, target_P, *, config):
  """Log-probabilities of targets, and whether they are the likeliest tokens.

  Args:
    params: of the decoder.
    prefix_BxT: token ids, padded behind.
    real_B: tokens of each prefix.
    suffix_BxNxC: what follows each prefix, separately; N may be 0.
    at_P: the positions that predict the targets, into B x (T + N C).
    target_P: token ids.
    config: `ModelConfig`.

  Returns:
    (float32 [P], bool [P]).
  """
  x_BxSxD = _stream(params, prefix_BxT, real_B, suffix_BxNxC, config=config)
  return _predict(params, x_BxSxD, at_P, target_P, config=config)


@functools.partial(jax.jit, static_argnames='config')
def _stream(params, prefix_BxT, real_B, suffix_BxNxC, *, config):
  """The last residual stream of prefixes and suffixes, [B,T+NC,D]."""
  rows, time = prefix_BxT.shape
  _, count, size = suffix_BxNxC.shape
  dtype = jax.tree.leaves(params)[0].dtype

  def run(decoder):
    if not count:
      return decoder.stream(prefix_BxT, positions_from_zero(time))[0]
    cache = decoding.empty_cache(config, rows, time + size, dtype)
    x_BxTxD, cache = decoder.extend(prefix_BxT, cache)
    # What padding has left in the slots is overwritten, or lies ahead.
    layers = jax.tree.map(
      lambda past: jnp.repeat(past, count, axis=-4), cache.layers
    )
    cache = Cache(layers, jnp.repeat(real_B, count))
    y, _ = decoder.extend(suffix_BxNxC.reshape(-1, size), cache)
    y = y.reshape(rows, count * size, -1)
    return jnp.concatenate([x_BxTxD, y], axis=1)

  return Decoder(config).apply({'params': params}, method=run)


@functools.partial(jax.jit, static_argnames='config')
def _predict(params, x_BxSxD, at_P, target_P, *, config):
  """See `_score`; apart from the layers, which take long to compile."""
  x_PxD = x_BxSxD.reshape(-1, x_BxSxD.shape[-1])[at_P]
  logits_PxV = Decoder(config).apply(
    {'params': params}, x_PxD[None], method='unembed'
  )[0]
  picked = jnp.take_along_axis(logits_PxV, target_P[:, None], axis=-1)[:, 0]
  hit_P = jnp.argmax(logits_PxV, axis=-1) == target_P
  return picked - jax.nn.logsumexp(logits_PxV, axis=-1), hit_P
