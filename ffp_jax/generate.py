"""Continues a prompt with a pruned model, and with the dense one beside it.

python -m ffp_jax.generate --model=DIR --dense=DIR2 --prompt='Once upon'
"""

from collections.abc import Sequence

import jax
from absl import app, flags

from ffp_jax.checkpoints.model import find_model, load_model
from ffp_jax.errors import RequestError, refuse
from ffp_jax.models import decoding
from ffp_jax.runtime import cli, sharding
from ffp_jax.text import prompts


def generate(
  models: Sequence[str],
  prompt: str,
  *,
  new: int,
  temperature: float,
  seed: int,
  dtype: str,
) -> None:
  """Prints what each model continues a prompt with.

  Args:
    models: names, as `find_model` takes them.
    prompt: the text to continue.
    new: tokens to generate at most.
    temperature, seed: see `prompts.stream_text`.
    dtype: see `load_model`.

  Raises:
    RequestError: one of the models can't; nothing is printed then.
  """
  found = [find_model(name) for name in models]
  ready = [prompts.make_prompt(files, prompt, new) for files in found]
  for name, files, asked in zip(models, found, ready, strict=True):
    config = decoding.unroll_layers(files.config)
    with jax.set_mesh(sharding.make_mesh(1, 1, -1)):
      model = load_model(files._replace(config=config), dtype)
      print(f'--- {name}\n{prompt}', end='', flush=True)
      for piece in prompts.stream_text(
        model.params, config, asked, temperature=temperature, seed=seed
      ):
        print(piece, end='', flush=True)
      print('\n')


def main(argv):
  del argv
  args = flags.FLAGS
  try:
    generate(
      [model for model in (args.dense, args.model) if model],
      args.prompt,
      new=args.tokens,
      temperature=args.temperature,
      seed=args.seed,
      dtype=args.dtype,
    )
  except (RequestError, OSError) as error:
    refuse(error)


if __name__ == '__main__':
  flags.DEFINE_string('model', 'demo', 'Model directory, .gguf file or hub id.')
  flags.DEFINE_string('dense', None, 'Dense model to print beside it, first.')
  flags.DEFINE_string('prompt', 'Once upon a time', 'Prompt to continue.')
  flags.DEFINE_integer(
    'tokens', 64, 'Number of tokens to generate at most.', lower_bound=1
  )
  flags.DEFINE_float(
    'temperature',
    0.0,
    'Sampling temperature; 0 takes the likeliest token each time.',
    lower_bound=0.0,
  )
  flags.DEFINE_integer('seed', 0, 'Seed of the sampling.')
  flags.DEFINE_enum(
    'dtype',
    'auto',
    ('auto', 'float32', 'bfloat16'),
    'Type of the weights; auto: float32 on CPU, bfloat16 elsewhere.',
  )
  app.run(main, flags_parser=cli.parse_flags)
