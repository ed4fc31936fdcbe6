"""Log-likelihoods of continuations, side by side in rows of few lengths.

The continuations of a context follow it as branches that don't see each other,
so that the context is computed once. Such trees, of any length, lie one after
another in rows, so that little is padding and few shapes are compiled.

Shape letters as in decoder.py; P scored positions.
"""

import bisect
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.evaluation.batches import power_of_two
from ffp_jax.models.attention import in_reach
from ffp_jax.models.decoder import Decoder, ModelConfig

_MIN_ROW = 256  # tokens of the shortest row
_MIN_SCORED = 256  # scored positions of the smallest shape


class Query(NamedTuple):
  """A request, and the places in its `Tree` where it is scored."""

  request: int  # index of the request
  at: tuple[int, ...]  # indices of the tokens that predict the targets
  targets: tuple[int, ...]  # token ids


class Tree(NamedTuple):
  """A context, the continuations that follow it, and what they answer."""

  tokens: list[int]  # token ids: the context, then one continuation by one
  positions: list[int]  # in the text that ends with the context or a branch
  branch: list[int]  # 0 in the context, else the number of the continuation
  queries: list[Query]


class Rows(NamedTuple):
  """Trees that are computed together, in rows that are padded at the end."""

  tokens_BxT: np.ndarray  # int32, as all of them
  positions_BxT: np.ndarray
  tree_BxT: np.ndarray  # number of the tree in its row, from 1; 0 for padding
  branch_BxT: np.ndarray
  queries: list[Query]  # whose places are indices into B x T


def plan_rows(
  requests: Iterable[tuple],
  *,
  max_length: int,
  batch_tokens: int,
  share: bool = True,
) -> Iterator[Rows]:
  """Plans the forward passes that answer requests.

  Requests that differ only in their last token need a single one.

  Args:
    requests: (anything, context, continuation); the latter two are token ids
      and not empty.
    max_length: tokens of the longest input; longer ones lose their start.
    batch_tokens: approximate number of tokens that are computed together.
    share: False for a row to each continuation with its context, for positions
      that depend on the length of the row.

  Yields:
    `Rows`; each request is in exactly one of them.
  """
  trees = _trees(requests, max_length, share)
  trees.sort(key=lambda x: len(x.tokens), reverse=True)
  packed = _pack(trees, max_length) if share else [[tree] for tree in trees]
  length = functools.partial(_row_length, most=max_length)
  for time, group in itertools.groupby(packed, length):
    same, count = list(group), max(1, batch_tokens // time)
    for start in range(0, len(same), count):
      yield _lay_out(same[start : start + count], count, time)


def _trees(requests, max_length, share) -> list[Tree]:
  """Groups requests by their context."""
  by_context = {}
  for i, (_, context, continuation) in enumerate(requests):
    # The last token is scored, but is no input.
    row = (context + continuation)[-max_length - 1 : -1]
    targets = tuple(continuation[-len(row) :])
    prefix = tuple(row[: len(row) - len(targets) + 1])
    by_context.setdefault(prefix, []).append((i, targets))
  trees = []
  for prefix, asked in by_context.items():
    by_suffix = {}
    for i, targets in asked:
      by_suffix.setdefault(targets[:-1], []).append((i, targets))
    # A single token is predicted by the context, whatever follows it.
    single = by_suffix.pop((), [])
    suffixes = list(by_suffix) or [()]
    if share and len(prefix) + sum(map(len, suffixes)) <= max_length:
      trees.append(_tree(prefix, suffixes, asked))
      continue
    for suffix in suffixes:
      trees.append(_tree(prefix, [suffix], by_suffix.get(suffix, []) + single))
      single = []
  return trees


def _tree(prefix, suffixes, asked) -> Tree:
  """Returns the tree of a context and its distinct continuations.

  Args:
    prefix: token ids of the context.
    suffixes: of the continuations without their last.
    asked: (index, targets) of the requests that they answer.
  """
  size = len(prefix)
  tokens, positions, branch = list(prefix), list(range(size)), [0] * size
  start = {(): size}
  for number, suffix in enumerate(suffixes, 1):
    start[suffix] = len(tokens)
    tokens += suffix
    positions += range(size, size + len(suffix))
    branch += [number] * len(suffix)
  queries = []
  for i, targets in asked:
    rest = start[targets[:-1]]
    at = size - 1, *range(rest, rest + len(targets) - 1)
    queries.append(Query(i, at, targets))
  return Tree(tokens, positions, branch, queries)


def _row_length(trees: list[Tree], most: int) -> int:
  """Returns the length of the row that its first tree, the longest, needs."""
  return min(most, power_of_two(len(trees[0].tokens), _MIN_ROW))


def _pack(trees: list[Tree], max_length: int) -> list[list[Tree]]:
  """Puts each tree into the row that it leaves the least space in.

  Args:
    trees: the longest first.
    max_length: tokens of the longest row.

  Returns:
    The trees of each row, the row with the longest first.
  """
  rows: list[list[Tree]] = []
  free: list[tuple[int, int]] = []  # space and index of each row, least first
  for tree in trees:
    size = len(tree.tokens)
    place = bisect.bisect_left(free, (size,))
    if place < len(free):
      space, row = free.pop(place)
    else:
      space, row = _row_length([tree], max_length), len(rows)
      rows.append([])
    rows[row].append(tree)
    bisect.insort(free, (space - size, row))
  return rows


def _lay_out(packed: list[list[Tree]], rows: int, time: int) -> Rows:
  """Returns rows of trees as arrays; rows after the last are padding."""
  tokens, tree, branch = np.zeros((3, rows, time), np.int32)
  positions = np.tile(np.arange(time, dtype=np.int32), (rows, 1))
  queries = []
  for row, trees in enumerate(packed):
    start = 0
    for number, each in enumerate(trees, 1):
      place = row, slice(start, start + len(each.tokens))
      tokens[place], positions[place] = each.tokens, each.positions
      tree[place], branch[place] = number, each.branch
      first = row * time + start
      queries += [
        query._replace(at=tuple(first + i for i in query.at))
        for query in each.queries
      ]
      start += len(each.tokens)
  return Rows(tokens, positions, tree, branch, queries)


def score(
  params: dict, rows: Rows, *, config: ModelConfig
) -> Iterator[tuple[int, tuple[float, bool]]]:
  """Answers the requests of rows.

  Args:
    params: of the decoder.
    rows: from `plan_rows`.
    config: of the decoder.

  Yields:
    (index of a request, (sum of its targets' log-probabilities in nats, whether
    every target is the likeliest token)).
  """
  at_P = np.concatenate([query.at for query in rows.queries])
  target_P = np.concatenate([query.targets for query in rows.queries])
  padding = 0, power_of_two(len(at_P), _MIN_SCORED) - len(at_P)
  x_BxTxD = _stream(params, *rows[:-1], config=config)
  log_prob_P, is_likeliest_P = jax.device_get(
    _predict(
      params,
      x_BxTxD,
      np.pad(at_P, padding),
      np.pad(target_P, padding),
      config=config,
    )
  )
  end = 0
  for query in rows.queries:
    start, end = end, end + len(query.targets)
    total = log_prob_P[start:end].sum(dtype=np.float64)
    all_likeliest = is_likeliest_P[start:end].all()
    yield query.request, (total.item(), all_likeliest.item())


@functools.partial(jax.jit, static_argnames='config')
def _stream(params, tokens_BxT, positions_BxT, tree_BxT, branch_BxT, *, config):
  """Returns the last residual stream [B,T,D] of `Rows`."""

  def pairs(x_BxT):
    return x_BxT[:, :, None], x_BxT[:, None, :]

  position, other_position = pairs(positions_BxT)
  tree, other_tree = pairs(tree_BxT)
  branch, other_branch = pairs(branch_BxT)
  visible_BxTxT = in_reach(position - other_position, config.window)
  visible_BxTxT &= tree == other_tree
  visible_BxTxT &= (other_branch == 0) | (other_branch == branch)
  return Decoder(config).apply(
    {'params': params},
    tokens_BxT,
    positions_BxT,
    visible_BxTxT=visible_BxTxT,
    method='stream',
  )[0]


@functools.partial(jax.jit, static_argnames='config')
def _predict(params, x_BxTxD, at_P, target_P, *, config):
  """Predicts targets from a residual stream.

  It is compiled apart from the layers, which take long to compile, because the
  number of positions varies more.

  Args:
    params: of the decoder.
    x_BxTxD: the last residual stream.
    at_P: the positions that predict the targets, into B x T.
    target_P: token ids.
    config: `ModelConfig`.

  Returns:
    (log-probabilities, float32 [P], and whether each target is the likeliest
    token, bool [P]).
  """
  x_PxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])[at_P]
  logits_PxV = Decoder(config).apply(
    {'params': params}, x_PxD[None], method='unembed'
  )[0]
  picked = jnp.take_along_axis(logits_PxV, target_P[:, None], axis=-1)[:, 0]
  is_likeliest_P = jnp.argmax(logits_PxV, axis=-1) == target_P
  return picked - jax.nn.logsumexp(logits_PxV, axis=-1), is_likeliest_P
