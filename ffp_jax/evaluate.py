"""Perplexity of a model directory, dense or pruned.

python -m ffp_jax.evaluate --model=DIR --data=FILE --context=512
"""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from ffp_jax import data, files, hf, hub
from ffp_jax.config import RequestError, refuse
from ffp_jax.loss import nll
from ffp_jax.model import Decoder, ModelConfig


def apply_of(config, *, remat=False):
  """(params, tokens, masks) -> logits of the decoder with this config."""
  decoder = Decoder(config, remat=remat)
  return lambda params, tokens, masks: decoder.apply(
    {'params': params}, tokens, masks
  )


def captured_of(config, statistic):
  """(params, tokens) -> `statistic` of each output projection's inputs.

  Returns:
    Function to (attention [L,...], ffn [L,...]) of a dense decoder.
  """
  decoder = Decoder(config, capture=statistic)

  def captured(params, tokens):
    _, seen = decoder.apply({'params': params}, tokens, mutable='captured')
    stack = seen['captured']['stack']
    return stack['attention']['inputs'], stack['ffn']['inputs']

  return captured


class Scorer:
  """A decoder's mean loss over windows, compiled once a window shape."""

  def __init__(self, config: ModelConfig):
    apply = apply_of(config)
    self._nll = jax.jit(lambda p, t, m: nll(apply, p, t, m))

  def __call__(self, params, windows_WxT, masks=None, *, label=None) -> float:
    """Mean negative log-likelihood, one window at a time.

    Args:
      params: of the decoder.
      windows_WxT: token ids; T - 1 of each window are scored.
      masks: `Masks` or None.
      label: of the progress bar, None for no bar.
    """
    quiet = label is None or not sys.stderr.isatty()
    bar = tqdm(windows_WxT, desc=label, disable=quiet, leave=False)
    losses = [self._nll(params, w[None], masks)[0].item() for w in bar]
    return float(np.mean(losses))


def tokenize(directory: pathlib.Path, text: str) -> np.ndarray:
  """Token ids of a text by the model's own tokenizer, tokenised once.

  Raises:
    RequestError: the directory has no tokenizer that can be loaded.
  """
  import transformers  # slow to import

  transformers.logging.set_verbosity_error()
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  except (OSError, ValueError, KeyError, TypeError) as error:
    line = str(error).strip().splitlines()[0]
    raise RequestError(f'{directory}: no usable tokenizer ({line})') from error
  return np.asarray(tokenizer(text, verbose=False)['input_ids'], np.int32)


def check_tokens(config: ModelConfig, tokens, context: int):
  """Refuses what a lookup would clamp in silence.

  Raises:
    RequestError: an id beyond the vocabulary, or positions beyond the table.
  """
  if len(tokens) and tokens.max() >= config.vocab:
    raise RequestError(
      f'model: the tokenizer gives id {tokens.max()}, the embedding has '
      f'{config.vocab} rows; the two do not belong together'
    )
  if config.positions == 'learned' and context > config.max_positions:
    raise RequestError(
      f'text.context: {context} is more than the {config.max_positions} '
      'positions of this model'
    )


def dtype_of(name: str):
  """'float32', 'bfloat16', or 'auto': bfloat16 on accelerators."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def evaluate(model, source, *, context, max_windows=None) -> dict:
  """Loads a model and computes its perplexity on a text.

  Args:
    model: directory or hub id, dense or pruned.
    source: text, as `data.read_text` takes it.
    context: tokens a window.
    max_windows: only the first so many, None for all.

  Returns:
    dict of ppl, tokens (scored), windows, seconds, tokens_per_second, and
    the model, text and context they belong to.
  """
  directory = hub.locate(model)
  config = hf.model_config(directory)
  tokens = tokenize(directory, data.read_text(source))
  check_tokens(config, tokens, context)
  windows = data.windows(tokens, context)[:max_windows]
  if not len(windows):
    raise RequestError(
      f'data: {source!r} has {len(tokens)} tokens, fewer than one window; '
      'give more text or a smaller --context'
    )
  params = files.load_params(directory, config, dtype_of('auto'))
  scorer = Scorer(config)
  scorer(params, windows[:1])  # compiles
  start = time.perf_counter()
  mean = scorer(params, windows, label='perplexity')
  seconds = time.perf_counter() - start
  scored = windows.size - len(windows)
  return {
    'model': model,
    'text': source,
    'context': context,
    'windows': len(windows),
    'ppl': float(np.exp(mean)),
    'tokens': scored,
    'seconds': round(seconds, 3),
    'tokens_per_second': round(scored / seconds, 1),
  }


def parse(argv):
  """Reads the flags; refuses what isn't one."""
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    refuse(error)
  if len(rest) > 1:
    refuse(f'unknown argument {rest[1]!r}; options are --NAME=VALUE')
  out = flags.FLAGS.out
  if out and not pathlib.Path(out).resolve().parent.is_dir():
    refuse(f'--out: no directory for {out!r}')
  return rest


def main(argv):
  del argv
  args = flags.FLAGS
  try:
    result = evaluate(
      args.model,
      args.data,
      context=args.context,
      max_windows=args.max_windows,
    )
    line = json.dumps(result, indent=2)
    if args.out:
      pathlib.Path(args.out).write_text(line + '\n')
  except (RequestError, OSError) as error:
    refuse(error)
  print(line)


if __name__ == '__main__':
  flags.DEFINE_string('model', 'demo', 'Model directory or hub id.')
  flags.DEFINE_string('data', 'pydoc', 'Text: built-in or file.')
  flags.DEFINE_integer('context', 512, 'Tokens a window.', lower_bound=2)
  flags.DEFINE_integer(
    'max_windows', None, 'First windows only.', lower_bound=1
  )
  flags.DEFINE_string('out', None, 'JSON file to write.')
  app.run(main, flags_parser=parse)
