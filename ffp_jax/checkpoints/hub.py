"""Where a model lies: the demo, a directory, a GGUF file, the hub."""

import codecs
import fnmatch
import hashlib
import json
import pathlib
import tempfile

import huggingface_hub
from huggingface_hub import errors

from ffp_jax.checkpoints import demo_model, gguf_model, gguf_tokenizer, stored
from ffp_jax.errors import RequestError

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DESCRIBED = 2  # counts what `_describe` has written: old ones are not read
_PLAIN = ('*.json', '*.txt', '*.jinja', 'tokenizer*')


def resolve_model(model: str) -> pathlib.Path:
  """The local directory of a model.

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
    return _unmarked(_directory(path))
  name, _, revision = model.partition('@')
  local = path.is_absolute() or model.startswith(('.', '~'))
  if local or '/' not in name or path.suffix == '.gguf':
    raise RequestError(f'model: no directory {model!r}; check the path')
  return _unmarked(_download_snapshot(name, revision or None))


def _directory(path: pathlib.Path) -> pathlib.Path:
  """The directory itself, unless all it holds is a GGUF file."""
  found = list(path.glob('*.gguf'))
  if (path / 'config.json').exists() or not found:
    return path
  if len(found) > 1:
    raise RequestError(
      f'model: {len(found)} .gguf files in {path}; give the path of one'
    )
  return gguf_directory(found[0])


def gguf_directory(path: pathlib.Path) -> pathlib.Path:
  """A directory with config and tokenizer of a GGUF file, and a link to it.

  Made once, in ~/.cache/ffp_jax/gguf, for a file of this path, size and time
  of change.

  Raises:
    RequestError: the file is damaged, or its model or tokenizer unknown.
  """
  path = path.resolve()

  def fill(stage):
    _describe(path, stage)
    (stage / 'model.gguf').symlink_to(path)

  return _cached('gguf', path.stem, [path], fill)


def _unmarked(directory: pathlib.Path) -> pathlib.Path:
  """The directory itself, unless JSON in it begins with a byte-order mark.

  Editors and shells of Windows write one, and no tokenizer library reads it.
  Then it is a directory of links, but for the JSON, which is as it should be.

  Raises:
    RequestError: a file is not in the encoding that its mark says.
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
    return file.read(3).startswith(_MARKS)


def _cached(kind: str, name: str, sources, fill) -> pathlib.Path:
  """A directory in ~/.cache/ffp_jax, made once for files as they are now.

  Args:
    kind, name: begin its path.
    sources: the files; their paths, sizes and times of change are the key.
    fill: makes the content, given an empty directory.
  """
  stats = [(str(x), x.lstat().st_size, x.lstat().st_mtime_ns) for x in sources]
  cache = pathlib.Path.home() / '.cache' / 'ffp_jax' / kind
  key = hashlib.sha256(repr((stats, _DESCRIBED)).encode()).hexdigest()[:12]
  out = cache / f'{name}-{key}'
  if out.exists():
    return out
  cache.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=cache, prefix='.new.') as tmp:
    stage = pathlib.Path(tmp) / 'model'
    stage.mkdir()
    fill(stage)
    try:
      stage.rename(out)
    except OSError:
      if not out.exists():  # else another process was faster: fine
        raise
  return out


def _describe(path: pathlib.Path, out: pathlib.Path):
  """Writes what every command needs beside the weights."""
  reader = gguf_model.open_file(path)
  settings = gguf_tokenizer.tokenizer_config(reader)
  gguf_tokenizer.tokenizer(reader).save(str(out / 'tokenizer.json'))
  for name, content in (
    ('config.json', gguf_model.hf_config(reader)),
    # The mark is for tokenization.load.
    ('tokenizer_config.json', settings | {'ffp_jax': 'gguf'}),
    (gguf_tokenizer.SCORES, gguf_tokenizer.scores(reader)),
  ):
    if content is not None:
      (out / name).write_text(json.dumps(content, indent=2), encoding='utf-8')


def _download_snapshot(name: str, revision: str | None) -> pathlib.Path:
  """The snapshot of a hub id, one weight format of it.

  Without a connection, what an earlier run has fetched.
  """
  at = f'{name!r}' + (f' at revision {revision!r}' if revision else '')
  try:
    try:
      listed = huggingface_hub.list_repo_files(name, revision=revision)
    except errors.HfHubHTTPError:  # the hub's own answer
      raise
    except (ConnectionError, errors.HTTPError):  # none; offline mode too
      wanted, cached = list(_PLAIN), True
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
  """Config and tokenizer files, and the weights that will be read of them."""
  for name in stored.formats():
    stem, suffix = name.rsplit('.', 1)
    shards = fnmatch.filter(listed, f'{stem}-*-of-*.{suffix}')
    if weights := [name] if name in listed else shards:
      plain = {x for pattern in _PLAIN for x in fnmatch.filter(listed, pattern)}
      return sorted(x for x in {*plain, *weights} if '/' not in x)
  raise RequestError(
    f'model: {at} holds none of {", ".join(stored.FORMATS)}; '
    'give another model, or download a .gguf and give its path'
  )


def _explain_error(error: Exception) -> str:
  """What is wrong with a hub id and what to do, in half a line."""
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
