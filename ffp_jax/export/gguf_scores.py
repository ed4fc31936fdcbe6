"""SentencePiece's scores of a tokenizer that is a list of merges."""

import collections
import itertools
import json
import pathlib

from ffp_jax.checkpoints import gguf_tokenizer
from ffp_jax.errors import RequestError


def of(vocab: dict, merges: list, directory: pathlib.Path) -> dict[str, float]:
  """SentencePiece's scores, from which it works out the same merges.

  It joins whichever neighbours make the token of the best score; a list of
  merges is its own only if it holds every such pair, the best first. The
  scores are those that came with the tokenizer, or else worked out.

  Args:
    vocab: token to id.
    merges: pairs of tokens, the best first.
    directory: of the model.

  Returns:
    Token to score.

  Raises:
    RequestError: no scores make these merges.
  """
  for scores in (
    _scores_of_gguf(vocab, directory),
    _scores_of_model(vocab, directory),
  ):
    if scores and _fits(vocab, merges, scores):
      return scores
  scores = _implied_scores(merges)
  if not _fits(vocab, merges, scores) or not _converted(vocab, merges, scores):
    raise RequestError(
      f'{directory}: the tokenizer merges unlike SentencePiece, and llama.cpp '
      'knows byte fallback only from there; use --format=hf or hf_dense'
    )
  return scores


def _scores_of_gguf(vocab: dict, directory) -> dict[str, float]:
  """Those of the GGUF file that the tokenizer was made from, if any."""
  try:
    content = json.loads((directory / gguf_tokenizer.SCORES).read_bytes())
    return {token: float(content[i]) for token, i in vocab.items()}
  except (OSError, ValueError, TypeError, LookupError):
    return {}


def _scores_of_model(vocab: dict, directory) -> dict[str, float]:
  """Those of SentencePiece's own file, if it is there and can be read."""
  path = directory / 'tokenizer.model'
  try:
    import sentencepiece  # not every installation has it

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (ImportError, OSError, RuntimeError):
    return {}
  size = model.get_piece_size()
  pieces = {model.id_to_piece(i): model.get_score(i) for i in range(size)}
  return {token: pieces.get(token, 0.0) for token in vocab}


def _implied_scores(merges: list) -> dict[str, float]:
  """Scores of the tokens that are merged; 0 is the best.

  Tokens whose merges lie among each other's share a score.
  """
  last = {left + right: i for i, (left, right) in enumerate(merges)}
  scores, score, end = {}, 0.0, -1
  for i, (left, right) in enumerate(merges):
    token = left + right
    if token not in scores and i > end:
      score = -float(i)
    end = max(end, last[token])
    scores.setdefault(token, score)
  return scores


def _fits(vocab: dict, merges: list, scores: dict) -> bool:
  """Whether merges are all that there can be, none before a better one."""
  values = [scores.get(token, 0.0) for token in vocab]
  ids = {token: i for i, token in enumerate(vocab)}
  order = [scores[left + right] for left, right in merges]
  falling = all(a >= b for a, b in itertools.pairwise(order))
  return falling and set(gguf_tokenizer.merges_of(ids, values)) == set(merges)


def _converted(vocab: dict, merges: list, scores: dict) -> bool:
  """Whether merges of a shared score are in an order that converters give.

  SentencePiece has no order there, it takes the left-most pair in the text.
  The orders are those of transformers, before and since its version 4.34,
  and of `gguf_tokenizer.merges_of`.
  """
  sharing = collections.Counter(scores.values())
  tied = [x for x in merges if sharing[scores[x[0] + x[1]]] > 1]

  def by_id(pair):
    return -scores[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]

  def by_token(pair):
    score, *ids = by_id(pair)
    return score, vocab[pair[0] + pair[1]], *ids

  def by_length(pair):
    score, *rest = by_token(pair)
    return score, -len(pair[0]), -len(pair[1]), *rest

  orders = by_id, by_token, by_length
  return any(tied == sorted(tied, key=order) for order in orders)
