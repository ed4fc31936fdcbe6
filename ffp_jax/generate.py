"""What a model says: a first look at a pruned one, beside the dense one.

python -m ffp_jax.generate --model=DIR --dense=DIR2 --prompt='Once upon'
"""

import itertools

import jax
import numpy as np
from absl import app, flags

from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.errors import RequestError, refuse
from ffp_jax.models import decoding, functional
from ffp_jax.runtime import cli, sharding
from ffp_jax.text import tokenization


def prepare(model: str, prompt: str, new: int):
  """Whether a model can go on with a prompt, before its weights are read.

  Returns:
    (directory, `ModelConfig`, tokenizer, token ids, ids that end a text).

  Raises:
    RequestError: it can't.
  """
  directory = hub.resolve_model(model)
  config = model_config.read_model_config(directory)
  tokenizer = tokenization.load_tokenizer(directory)
  ids = tokenization.token_ids(tokenizer, prompt)
  ends = tokenization.end_ids(directory, tokenizer)
  if not ids.size:
    raise RequestError('--prompt: gives no token; say something')
  tokenization.check_tokens(config, ids, 0)
  decoding.check_slots(config, len(ids) + new)
  return directory, config, tokenizer, ids, ends


def pieces(params, config, tokenizer, ids, *, ends, new, temperature, seed):
  """What a model goes on with, as it comes.

  Args:
    params: of the decoder.
    config: its `ModelConfig`.
    tokenizer: of transformers.
    ids: of the prompt, one or more.
    ends: token ids; any of them ends it.
    new: most tokens.
    temperature, seed: see `decoding.generate_tokens`.

  Yields:
    Text that follows the prompt and the text before.
  """
  steps = decoding.generate_tokens(
    params,
    ids[None],
    np.array([len(ids)]),
    config=config,
    slots=len(ids) + new,
    temperature=temperature,
    seed=seed,
  )
  made, said = list(ids), tokenizer.decode(ids)
  for chosen in itertools.islice(steps, new):
    made.append(chosen.item())
    if made[-1] in ends:
      return
    text = tokenizer.decode(made)
    if not text.endswith('\N{REPLACEMENT CHARACTER}'):  # half a character
      yield text[len(said) :]
      said = text


def generate(models, prompt, *, new, temperature, seed, dtype):
  """Prints what each model goes on with.

  Args:
    models: directories or hub ids.
    prompt: text.
    new: most new tokens.
    temperature, seed: see `decoding.generate_tokens`.
    dtype: see `functional.resolve_dtype`.

  Raises:
    RequestError: one of them can't; nothing is printed then.
  """
  ready = [prepare(model, prompt, new) for model in models]
  dtype = functional.resolve_dtype(dtype)
  for model, (directory, config, tokenizer, ids, ends) in zip(
    models, ready, strict=True
  ):
    config = decoding.unroll_layers(config)
    with jax.set_mesh(sharding.make_mesh(1, 1, -1)):
      params = weights.load_params(directory, config, dtype)
      print(f'--- {model}\n{prompt}', end='', flush=True)
      for piece in pieces(
        params,
        config,
        tokenizer,
        ids,
        ends=ends,
        new=new,
        temperature=temperature,
        seed=seed,
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
  flags.DEFINE_string('model', 'demo', 'Model directory or hub id.')
  flags.DEFINE_string('dense', None, 'Another, which speaks before.')
  flags.DEFINE_string('prompt', 'Once upon a time', 'What they go on with.')
  flags.DEFINE_integer('tokens', 64, 'Most new tokens.', lower_bound=1)
  flags.DEFINE_float(
    'temperature', 0.0, '0: always the likeliest token.', lower_bound=0.0
  )
  flags.DEFINE_integer('seed', 0, 'Of the choices, where it is above 0.')
  flags.DEFINE_enum(
    'dtype',
    'auto',
    ('auto', 'float32', 'bfloat16'),
    'auto: float32 on CPU, bfloat16 elsewhere.',
  )
  app.run(main, flags_parser=cli.parse_flags)
