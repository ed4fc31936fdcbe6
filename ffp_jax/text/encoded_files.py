"""Decompression of files, and decoding of their UTF-8 text."""

import bz2
import codecs
import gzip
import io
import lzma
import pathlib
from collections.abc import Callable
from typing import IO, Any

from ffp_jax.errors import RequestError

_UTF16 = 'UTF-16; convert it: iconv -f UTF-16 -t UTF-8'
# First bytes of files that are not UTF-8 text, with what they are and advice.
_NOT_UTF8 = {
  codecs.BOM_UTF32_LE: 'UTF-32; convert it: iconv -f UTF-32 -t UTF-8',
  codecs.BOM_UTF16_LE: _UTF16,
  codecs.BOM_UTF16_BE: _UTF16,
  b'\x1f\x8b': 'packed by gzip; end its name in .gz',
  b'\x28\xb5\x2f\xfd': 'packed by zstd; end its name in .zst',
  b'\xfd7zXZ\0': 'packed by xz; end its name in .xz',
  b'PK\x03\x04': 'a ZIP archive; unpack it',
  b'%PDF-': 'PDF; convert it to text',
}


def _open_zstd(path, mode):
  import pyarrow

  return io.BufferedReader(pyarrow.CompressedInputStream(str(path), 'zstd'))


PACKED: dict[str, Callable[..., Any]] = {
  '.gz': gzip.open,
  '.bz2': bz2.open,
  '.xz': lzma.open,
  '.zst': _open_zstd,
}


def open_packed(path: pathlib.Path) -> IO[bytes]:
  """Opens a file to read bytes, decompressing it if its name says so."""
  return PACKED.get(path.suffix.lower(), open)(path, 'rb')


def decoded(
  path: pathlib.Path | str, raw: bytes, *, start: int = 0, final: bool = True
) -> str:
  """Decodes UTF-8 bytes of a file, dropping a byte-order mark.

  Args:
    path: of the file, for messages.
    raw: the bytes.
    start: their offset in the file.
    final: whether the last character must be complete.

  Raises:
    RequestError: they are not UTF-8 text.
  """
  for magic, kind in _NOT_UTF8.items():
    if not start and raw.startswith(magic):
      raise RequestError(f'data: {path} is not UTF-8 text but {kind}')
  nul = raw.find(b'\0')
  if nul >= 0:
    raise RequestError(
      f'data: {path} is binary or UTF-16, not UTF-8 text (a NUL at byte '
      f'{start + nul:,})'
    )
  try:
    text = codecs.getincrementaldecoder('utf-8')().decode(raw, final)
  except UnicodeDecodeError as error:
    raise RequestError(
      f'data: {path} is not UTF-8 text (byte {start + error.start:,}); '
      'convert it to UTF-8'
    ) from error
  return text if start else text.removeprefix('\ufeff')
