"""Sources of text: built-in texts, files, hub corpora, and mixtures of them."""

import itertools
import pathlib
import pydoc_data.topics
import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import huggingface_hub
from absl import logging

from ffp_jax.errors import RequestError
from ffp_jax.text import general_text, mixture, readers

TEXT_BYTES = 8_000_000  # of UTF-8; the rest of a longer text is not read


class Text(NamedTuple):
  """Holds a text, and what is stated with every result computed on it."""

  content: str
  name: str  # a corpus and its split, or the path or name as given
  extent: str  # 'the text', or how much of it was read
  windows: int | None = None  # most windows to score, as papers do


class _Split(NamedTuple):
  """Describes one file of a corpus, and how much of it is used."""

  file: str
  documents: int | None = None  # the first so many; None for all
  windows: int | None = None  # see Text


class _Corpus(NamedTuple):
  """Describes a data set on the hub, whose files are read without scripts."""

  repository: str
  join: str  # between documents
  # The first split is for pruning, the last one is what papers report.
  splits: dict[str, _Split]
  revision: str | None = None


def _splits(pattern, *names):
  return {name: _Split(pattern.format(name)) for name in names}


# The conventions are those of GPTQ, SparseGPT, Wanda and FLAP: the rows of
# WikiText-2, empty ones included, are joined by blank lines; the sentences of
# the Penn Treebank and the documents of C4 by spaces. Of C4's validation text
# the first 1,100 documents are used, and of these the first 256 windows.
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


def _pydoc() -> Iterator[str]:
  """Yields the topics of Python's language reference, in English."""
  topics = pydoc_data.topics.topics
  return (topics[key] for key in sorted(topics))


def _general() -> Iterator[str | None]:
  """Yields English texts of many kinds, which are downloaded once."""
  try:
    path = general_text.path()
  except (ValueError, OSError, zipfile.BadZipFile) as error:
    raise RequestError(
      f"data: 'general': {error}; 'pydoc' needs no network"
    ) from error
  return readers.read_documents(path, TEXT_BYTES, 'text')


_BUILTIN = {'general': _general, 'pydoc': _pydoc}


def other_builtin(source: str) -> str:
  """Returns a built-in text that a source does not hold; '' if it holds all.

  Where it holds none this is 'pydoc', which needs no network.

  Args:
    source: see `read_text`.
  """
  held = [part.source for part in mixture.parse(source)]
  return next((x for x in ('pydoc', 'general') if x not in held), '')


class Source(NamedTuple):
  """Holds documents that have not been read yet."""

  documents: Iterable[str | None]  # None for a null document
  name: str
  join: str = '\n\n'  # between documents
  windows: int | None = None  # see Text


def read_text(
  source: str,
  *,
  field: str = '',
  report: bool = False,
  limit: int = TEXT_BYTES,
) -> Text:
  """Reads the text that `config.data` or --data names.

  Args:
    source: 'general' or 'pydoc'; one of CORPORA, with a split as in
      'wikitext2:test' or without; or a path, see `readers.list_files` and
      `readers.read_documents`, whose documents are joined by blank lines. Or
      several of these with weights, see `mixture.parse`, each of which has
      its share of the bytes in every stretch of the text.
    field: the field with the document, see `readers.read_documents`; has no
      effect on a corpus.
    report: whether a corpus without a split means the split that papers
      report, test (validation for C4), instead of train.
    limit: bytes to read at most.

  Raises:
    RequestError: there is no such text, it can't be downloaded, is empty or
      unreadable, or the weights are invalid.
  """
  parts = mixture.parse(source)
  sources = [
    open_source(x.source, field=field, report=report, limit=limit)
    for x in parts
  ]
  if len(parts) == 1:
    return _join_documents(sources[0], limit)
  mixed = mixture.interleave(
    [_pieces(x) for x in sources], [x.weight for x in parts]
  )
  name = ','.join(
    f'{x.name}:{part.weight:g}' for x, part in zip(sources, parts, strict=True)
  )
  return _join_documents(Source(mixed, name), limit)


def open_source(
  source: str,
  *,
  field: str = '',
  report: bool = False,
  limit: int = TEXT_BYTES,
) -> Source:
  """Opens a text that is not a mixture, without reading it.

  Args:
    source, field, report: see `read_text`.
    limit: bytes of a document to read at most, or little more.

  Raises:
    RequestError: there is no such text, or it can't be downloaded.
  """
  name, _, split = source.partition(':')
  if name in CORPORA:
    return _open_corpus(name, split, report=report, limit=limit)
  if source in _BUILTIN:
    return Source(_BUILTIN[source](), source)
  # An empty name is no path, though Path('') is the working directory.
  path = pathlib.Path(source).expanduser()
  files = readers.list_files(path) if source else []
  if not files:
    raise RequestError(
      f'data: {source!r} is neither {", ".join([*_BUILTIN, *CORPORA])} nor a '
      f'directory or file of {readers.FORMATS}'
    )
  found = (readers.read_documents(file, limit, field) for file in files)
  return Source(itertools.chain.from_iterable(found), source)


def _open_corpus(name, split, *, report, limit) -> Source:
  corpus = CORPORA[name]
  split = split or list(corpus.splits)[-1 if report else 0]
  if split not in corpus.splits:
    raise RequestError(
      f'data: {name} has no split {split!r}, only {", ".join(corpus.splits)}'
    )
  part = corpus.splits[split]
  found = readers.read_documents(_download(name, corpus, part.file), limit)
  found = itertools.islice(found, part.documents)
  return Source(found, f'{name}:{split}', corpus.join, part.windows)


def _pieces(source: Source) -> Iterator[str | None]:
  """Yields a text in pieces for a mixture, and logs where it ends.

  Raises:
    RequestError: the text is empty.
  """
  size = 0
  for piece in mixture.pieces(source.documents, source.join):
    size += len((piece or '').encode())
    yield piece
  if not size:
    raise RequestError(f'data: {source.name!r} is empty')
  logging.warning(
    '%s: ends after %s bytes; the mixture ends too, so that its weights hold',
    source.name,
    f'{size:,}',
  )


def _download(name, corpus, file) -> pathlib.Path:
  """Returns a file of a corpus in the hub's cache, downloading it if needed."""
  # The warnings about every retry add nothing to the error below.
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
  except Exception as error:  # also of the HTTP library, which varies
    raise RequestError(
      f'data: {name!r} is not to be had from the hub ({corpus.repository}, '
      f'{type(error).__name__}); give a local file'
    ) from error


def _join_documents(source: Source, limit) -> Text:
  """Joins documents until there are `limit` bytes, and cuts the text there.

  Null documents are skipped, and their number is logged.
  """
  name, join = source.name, source.join
  parts, size, cut, nulls = [], -len(join), False, 0
  for document in source.documents:
    if document is None:
      nulls += 1
      continue
    parts.append(document)
    size += len(join) + len(document.encode())
    if cut := size > limit:
      break
  content = join.join(parts)
  if cut:
    content = content.encode()[:limit].decode(errors='ignore')
    logging.warning('%s: only the first %s bytes are used', name, f'{limit:,}')
  note = f'documents that are null: {nulls:,}'
  if not content.strip():
    raise RequestError(f'data: {name!r} is empty{nulls and f" ({note})" or ""}')
  if nulls:
    logging.warning('%s: %s, left out', name, note)
  extent = f'the first {limit / 1e6:g} MB' if cut else 'the text'
  return Text(content, name, extent, source.windows)
