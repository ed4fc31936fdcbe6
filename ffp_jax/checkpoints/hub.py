"""Resolution of a model name to a local directory.

A name is 'demo', a directory, a GGUF file, or an id of the Hugging Face hub.
"""

import codecs
import fnmatch
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import huggingface_hub
from huggingface_hub import errors

from ffp_jax.checkpoints import demo_model, gguf_model, gguf_tokenizer, stored
from ffp_jax.errors import RequestError
from ffp_jax.runtime.storage import staged

_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CACHE_VERSION = 2  # part of the key; to be raised when `_describe` changes
_NOT_WEIGHTS = ('*.json', '*.txt', '*.jinja', 'tokenizer*')


def resolve_model(model: str) -> pathlib.Path:
  """Returns the local directory of a model, downloading it if needed.

  Args:
    model: 'demo', a directory, a .gguf file, or a hub id with or without
      '@revision'.

  Raises:
    RequestError: there is no such model and it can't be fetched.
  """
  if model == 'demo':
    return demo_model.cached_directory()
  path = pathlib.Path(model).expanduser()
  if path.is_file() and path.suffix == '.gguf':
    return gguf_directory(path)
  if path.is_dir():
    return _without_marks(_unless_gguf(path))
  name, _, revision = model.partition('@')
  local = path.is_absolute() or model.startswith(('.', '~'))
  if local or '/' not in name or path.suffix == '.gguf':
    raise RequestError(f'model: no directory {model!r}; check the path')
  return _without_marks(_download_snapshot(name, revision or None))


def _unless_gguf(path: pathlib.Path) -> pathlib.Path:
  """Returns the directory itself, or that of the GGUF file that it holds."""
  found = list(path.glob('*.gguf'))
  if (path / 'config.json').exists() or not found:
    return path
  if len(found) > 1:
    raise RequestError(
      f'model: {len(found)} .gguf files in {path}; give the path of one'
    )
  return gguf_directory(found[0])


def gguf_directory(path: pathlib.Path) -> pathlib.Path:
  """Makes a model directory for a GGUF file, with a link to it.

  It is in ~/.cache/ffp_jax/gguf, and made once per path, size and time of
  change of the file.

  Raises:
    RequestError: the file is damaged, or its model or tokenizer is not
      supported.
  """
  path = path.resolve()

  def fill(stage):
    _describe(path, stage)
    (stage / 'model.gguf').symlink_to(path)

  return _cached('gguf', path.stem, [path], fill)


def _without_marks(directory: pathlib.Path) -> pathlib.Path:
  """Returns a directory whose JSON files have no byte-order marks.

  Editors and shells of Windows write such marks, and tokenizer libraries
  refuse them. Without any, it is the directory itself; else one of links, and
  of JSON files rewritten without their marks.

  Raises:
    RequestError: a file is not in the encoding of its mark.
  """
  marked = {x for x in directory.glob('*.json') if _has_mark(x)}
  if not marked:
    return directory
  paths = sorted(directory.absolute().iterdir())
  names = {x.name for x in marked}

  def fill(stage):
    for path in paths:
      if path.name in names:
        content = path.read_bytes()
        try:
          text = content.decode(json.detect_encoding(content))
        except ValueError as error:
          raise RequestError(f'{path}: not valid JSON ({error})') from error
        (stage / path.name).write_text(text, encoding='utf-8')
      else:
        (stage / path.name).symlink_to(path)

  return _cached('json', directory.name, paths, fill)


def _has_mark(path) -> bool:
  if not path.is_file():
    return False
  with path.open('rb') as file:
    return file.read(3).startswith(_BYTE_ORDER_MARKS)


def _cached(
  kind: str,
  name: str,
  sources: Sequence[pathlib.Path],
  fill: Callable[[pathlib.Path], None],
) -> pathlib.Path:
  """Returns a directory in ~/.cache/ffp_jax, made once per state of sources.

  Args:
    kind: the folder in the cache.
    name: how the directory's own name begins.
    sources: files whose paths, sizes and times of change are the key.
    fill: writes the content into an empty directory.
  """
  stats = [(str(x), x.lstat().st_size, x.lstat().st_mtime_ns) for x in sources]
  cache = pathlib.Path.home() / '.cache' / 'ffp_jax' / kind
  key = hashlib.sha256(repr((stats, _CACHE_VERSION)).encode()).hexdigest()[:12]
  out = cache / f'{name}-{key}'
  if out.exists():
    return out
  cache.mkdir(parents=True, exist_ok=True)
  try:
    with staged(out) as stage:
      stage.mkdir()
      fill(stage)
  except OSError:
    if not out.exists():  # else another process was faster
      raise
  return out


def _describe(path: pathlib.Path, out: pathlib.Path) -> None:
  """Writes config and tokenizer of the GGUF file `path` to `out`."""
  reader = gguf_model.open_file(path)
  settings = gguf_tokenizer.tokenizer_config(reader)
  gguf_tokenizer.tokenizer(reader).save(str(out / 'tokenizer.json'))
  for name, content in (
    ('config.json', gguf_model.hf_config(reader)),
    # `tokenization.load_tokenizer` looks for this key.
    ('tokenizer_config.json', settings | {'ffp_jax': 'gguf'}),
    (gguf_tokenizer.SCORES, gguf_tokenizer.scores(reader)),
  ):
    if content is not None:
      (out / name).write_text(json.dumps(content, indent=2), encoding='utf-8')


def _download_snapshot(name: str, revision: str | None) -> pathlib.Path:
  """Downloads the snapshot of a hub id, with weights in one format.

  Without a connection, it is the snapshot that an earlier run has downloaded.
  """
  at = f'{name!r}' + (f' at revision {revision!r}' if revision else '')
  try:
    try:
      listed = huggingface_hub.list_repo_files(name, revision=revision)
    except errors.HfHubHTTPError:  # an answer of the hub
      raise
    except (ConnectionError, errors.HTTPError):  # no answer, or offline mode
      wanted, cached = list(_NOT_WEIGHTS), True
    else:
      wanted, cached = _wanted(listed, at), False
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name,
        revision=revision,
        allow_patterns=wanted,
        local_files_only=cached,
      )
    )
  except RequestError:
    raise
  except (OSError, ValueError, errors.HTTPError) as error:
    raise RequestError(f'model: {at} {_explain_error(error)}') from error


def _wanted(listed: list[str], at: str) -> list[str]:
  """Returns the files to download: config, tokenizer and preferred weights."""
  for name in stored.formats():
    stem, suffix = name.rsplit('.', 1)
    shards = fnmatch.filter(listed, f'{stem}-*-of-*.{suffix}')
    if weights := [name] if name in listed else shards:
      others = {
        x for glob in _NOT_WEIGHTS for x in fnmatch.filter(listed, glob)
      }
      return sorted(x for x in {*others, *weights} if '/' not in x)
  raise RequestError(
    f'model: {at} holds none of {", ".join(stored.FORMATS)}; '
    'give another model, or download a .gguf and give its path'
  )


def _explain_error(error: Exception) -> str:
  """Returns what is wrong with a hub id and what to do, in half a line."""
  match error:
    case errors.GatedRepoError():
      return (
        'is gated: accept its terms on huggingface.co and log in with '
        "'hf auth login', or set HF_TOKEN"
      )
    case errors.RevisionNotFoundError():
      return 'does not exist on the hub; check the revision after the @'
    case errors.LocalEntryNotFoundError():
      return (
        'is neither a directory nor in the cache, and the hub cannot be '
        'reached; give a local directory, or connect'
      )
    case errors.RepositoryNotFoundError():
      return (
        'is neither a directory nor on the hub; check the name, and log in '
        "with 'hf auth login' if it is private"
      )
  return (
    f'is neither a directory nor to be had from the hub '
    f'({type(error).__name__}); give a local directory'
  )
