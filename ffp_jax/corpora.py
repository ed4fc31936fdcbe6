"""Where text comes from: built in, files, or corpora of the hub by name."""

import itertools
import pathlib
import pydoc_data.topics
from collections.abc import Iterable
from typing import NamedTuple

import huggingface_hub
from absl import logging

from ffp_jax import documents
from ffp_jax.config import TEXT_BYTES, RequestError


class Text(NamedTuple):
  """A text, and what a figure made with it has to say of it."""

  content: str
  name: str  # a corpus and its split, or the path or name as given
  extent: str  # 'the text', or how much of it
  windows: int | None = None  # at most so many are scored, by convention


class _Split(NamedTuple):
  """One file of a corpus, and how much of it is used."""

  file: str
  documents: int | None = None
  windows: int | None = None


class _Corpus(NamedTuple):
  """A data set on the hub; fetched as files, no script of it is run."""

  repository: str
  join: str  # between documents
  # The first is for pruning, the last is what papers report.
  splits: dict[str, _Split]
  revision: str | None = None


def _splits(pattern, *names):
  return {name: _Split(pattern.format(name)) for name in names}


# As in the evaluation scripts of GPTQ, SparseGPT, Wanda and FLAP: rows of
# WikiText-2, empty ones too, joined by blank lines; sentences of the Penn
# Treebank and documents of C4 by spaces, of C4's validation text the first
# 1,100 documents, and of these the first 256 windows.
CORPORA = {
  'wikitext2': _Corpus(
    'Salesforce/wikitext',
    '\n\n',
    _splits(
      'wikitext-2-raw-v1/{}-00000-of-00001.parquet',
      *('train', 'validation', 'test'),
    ),
  ),
  'ptb': _Corpus(
    'ptb-text-only/ptb_text_only',
    ' ',
    _splits('penn_treebank/{}/0000.parquet', 'train', 'validation', 'test'),
    revision='refs/convert/parquet',
  ),
  'c4': _Corpus(
    'allenai/c4',
    ' ',
    {
      'train': _Split('en/c4-train.00000-of-01024.json.gz'),
      'validation': _Split(
        'en/c4-validation.00000-of-00008.json.gz', documents=1100, windows=256
      ),
    },
  ),
}


def _pydoc():
  """Python's own language reference, in English."""
  topics = pydoc_data.topics.topics
  return (topics[key] for key in sorted(topics))


_BUILTIN = {'pydoc': _pydoc}


def read(
  source: str, *, field='', report=False, limit: int = TEXT_BYTES
) -> Text:
  """The text that `config.data` or --data names.

  Args:
    source: 'pydoc'; one of CORPORA, with a split as in 'wikitext2:test'; or
      a path, see `documents.files` and `documents.read`. Files and their
      documents are joined by blank lines.
    field: what holds a document, see `documents.read`; no matter for a corpus.
    report: a corpus without a split means the one that papers report, test
      (validation for C4), instead of train.
    limit: bytes; what follows is not read.

  Raises:
    RequestError: there is no such text, it can't be fetched, is empty or
      unreadable.
  """
  name, _, split = source.partition(':')
  if name in CORPORA:
    return _read_corpus(name, split, report=report, limit=limit)
  if source in _BUILTIN:
    return _text(_BUILTIN[source](), source, limit=limit)
  # Not Path(''), which is the working directory.
  path = pathlib.Path(source).expanduser()
  files = documents.files(path) if source else []
  if not files:
    raise RequestError(
      f'data: {source!r} is neither {", ".join([*_BUILTIN, *CORPORA])} nor a '
      f'directory or file of {documents.FORMATS}'
    )
  found = (documents.read(file, limit, field) for file in files)
  found = itertools.chain.from_iterable(found)
  return _text(found, source, limit=limit)


def _read_corpus(name, split, *, report, limit) -> Text:
  corpus = CORPORA[name]
  split = split or list(corpus.splits)[-1 if report else 0]
  if split not in corpus.splits:
    raise RequestError(
      f'data: {name} has no split {split!r}, only {", ".join(corpus.splits)}'
    )
  part = corpus.splits[split]
  found = documents.read(_fetch(name, corpus, part.file), limit)
  found = itertools.islice(found, part.documents)
  text = _text(found, f'{name}:{split}', join=corpus.join, limit=limit)
  return text._replace(windows=part.windows)


def _fetch(name, corpus, file) -> pathlib.Path:
  # Its warnings about every retry say no more than the refusal.
  huggingface_hub.logging.set_verbosity_error()
  try:
    return pathlib.Path(
      huggingface_hub.hf_hub_download(
        corpus.repository,
        file,
        repo_type='dataset',
        revision=corpus.revision,
      )
    )
  except Exception as error:  # its HTTP library's too, which is one of two
    raise RequestError(
      f'data: {name!r} is not to be had from the hub ({corpus.repository}, '
      f'{type(error).__name__}); give a local file'
    ) from error


def _text(found: Iterable[str | None], name, *, limit, join='\n\n') -> Text:
  """Joins documents until there are `limit` bytes, and cuts there.

  Those that are None are left out, which is logged.
  """
  parts, size, cut, null = [], -len(join), False, 0
  for document in found:
    if document is None:
      null += 1
      continue
    parts.append(document)
    size += len(join) + len(document.encode())
    if cut := size > limit:
      break
  content = join.join(parts)
  if cut:
    content = content.encode()[:limit].decode(errors='ignore')
    logging.warning('%s: only the first %s bytes are used', name, f'{limit:,}')
  said = f'documents that are null: {null:,}'
  if not content.strip():
    raise RequestError(f'data: {name!r} is empty{null and f" ({said})" or ""}')
  if null:
    logging.warning('%s: %s, left out', name, said)
  extent = f'the first {limit / 1e6:g} MB' if cut else 'the text'
  return Text(content, name, extent)
