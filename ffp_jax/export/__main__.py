"""Takes a pruned model to another runtime.

python -m ffp_jax.export --model=DIR/pruned --format=gguf --out=model.gguf

Exit codes: 0 done, 2 refused, 74 disk full.
"""

import functools
import pathlib

from absl import app, flags, logging

from ffp_jax.errors import RequestError, refuse
from ffp_jax.export import formats
from ffp_jax.runtime import cli, storage


def main(argv):
  del argv
  args = flags.FLAGS
  logging.set_verbosity(logging.WARNING)  # gguf and orbax say a lot
  out = pathlib.Path(args.out).expanduser()
  try:
    notes = formats.export(
      args.model, args.format, out, dtype=args.dtype, pre=args.pre
    )
  except RequestError as error:
    refuse(error)
  except Exception as error:
    if storage.disk_full(error):
      refuse(f'{out}: not written, the disk is full ({error})', 74)
    if isinstance(error, OSError):
      refuse(f'{out}: not written ({error})')
    raise
  for note in notes:
    print(f'note: {note}')
  print(f'{formats.size(out):,} bytes in {out}')


if __name__ == '__main__':
  flags.DEFINE_string('model', None, 'Model directory, .gguf or hub id.')
  flags.DEFINE_enum('format', None, tuple(formats.FORMATS), 'What to make.')
  flags.DEFINE_string('out', None, 'Directory to make; of gguf, a file.')
  flags.DEFINE_string('dtype', None, 'Of the weights; that of the model.')
  flags.DEFINE_string(
    'pre', None, "llama.cpp's name of the pre-tokenizer, if not recognised."
  )
  app.run(
    main,
    flags_parser=functools.partial(
      cli.parse_flags,
      model='a pruned model directory',
      format=f'one of {", ".join(formats.FORMATS)}',
      out='the directory or file to make',
    ),
  )
