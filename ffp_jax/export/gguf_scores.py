"""SentencePiece scores for a BPE tokenizer that is stored as merges.

tokenizer.json holds the merges in order; llama.cpp wants the score of each
token, as SentencePiece has it, and derives the merges from those.
"""

import collections
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

from ffp_jax.checkpoints import gguf_tokenizer
from ffp_jax.errors import RequestError

_Merges = Sequence[tuple[str, str]]


def find_scores(
  vocab: Mapping[str, int], merges: _Merges, directory: pathlib.Path
) -> dict[str, float]:
  """Returns scores from which SentencePiece derives these merges.

  SentencePiece joins the neighbours that make the token of the highest score.
  So merges are its own only if they are all pairs that make a token, those of
  higher scores first. Scores that came with the tokenizer are preferred to
  scores that are derived from the merges.

  Args:
    vocab: token to id.
    merges: pairs of tokens, the first to be joined first.
    directory: of the model.

  Returns:
    Token to score; higher is better.

  Raises:
    RequestError: no scores give these merges.
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


def _scores_of_gguf(
  vocab: Mapping[str, int], directory: pathlib.Path
) -> dict[str, float]:
  """Returns the scores of the GGUF file that the tokenizer is from, if any."""
  try:
    content = json.loads((directory / gguf_tokenizer.SCORES).read_bytes())
    return {token: float(content[i]) for token, i in vocab.items()}
  except (OSError, ValueError, TypeError, LookupError):
    return {}


def _scores_of_model(
  vocab: Mapping[str, int], directory: pathlib.Path
) -> dict[str, float]:
  """Returns the scores in tokenizer.model, if there is one."""
  path = directory / 'tokenizer.model'
  try:
    import sentencepiece  # slow to import

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (OSError, RuntimeError):
    return {}
  size = model.get_piece_size()
  pieces = {model.id_to_piece(i): model.get_score(i) for i in range(size)}
  return {token: pieces.get(token, 0.0) for token in vocab}


def _implied_scores(merges: _Merges) -> dict[str, float]:
  """Derives scores of the merged tokens from the order of their merges.

  The highest score is 0. Tokens share a score where the merges of one lie
  between those of the other.
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


def _fits(
  vocab: Mapping[str, int], merges: _Merges, scores: Mapping[str, float]
) -> bool:
  """Returns whether scores fall along the merges, and no pair is missing."""
  values = [scores.get(token, 0.0) for token in vocab]
  ids = {token: i for i, token in enumerate(vocab)}
  order = [scores[left + right] for left, right in merges]
  falling = all(a >= b for a, b in itertools.pairwise(order))
  return falling and set(gguf_tokenizer.merges_of(ids, values)) == set(merges)


def _converted(
  vocab: Mapping[str, int], merges: _Merges, scores: Mapping[str, float]
) -> bool:
  """Returns whether merges of equal score are in the order of a converter.

  SentencePiece has no order among them; it joins the left-most pair in the
  text. So only an order that a converter made can be dropped without loss:
  that of transformers before version 4.34, of transformers since, or of
  `gguf_tokenizer.merges_of`.
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
