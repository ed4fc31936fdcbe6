"""Computes perplexity in JAX and in PyTorch transformers on the same tokens.

    python -m ffp_jax.benchmarks.parity --model=demo --data=pydoc

Both compute in float32. Needs torch, which is not a requirement of ffp_jax.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.errors import RequestError, refuse
from ffp_jax.evaluation import scoring
from ffp_jax.runtime import cli
from ffp_jax.text import corpora, tokenization
from ffp_jax.text import windows as windows_lib


def torch_perplexity(directory: pathlib.Path, windows_WxT: np.ndarray) -> float:
  """Returns exp of PyTorch's mean next-token loss, window by window.

  Raises:
    RequestError: torch is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise RequestError('parity needs PyTorch: pip install torch') from error
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32
  ).eval()
  losses = []
  with torch.no_grad():
    for window in tqdm(windows_WxT, desc='PyTorch', leave=False):
      ids = torch.tensor(window, dtype=torch.long)
      # The model's own loss adds up in float32 and is off by 2e-5.
      logits = model(ids[None]).logits[0, :-1].double()
      losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
  return float(np.exp(np.mean(losses)))


def compare(
  model: str, source: str, *, field: str = '', context: int, windows: int
) -> dict:
  """Computes both perplexities on the first windows of a text.

  Args:
    model: directory or hub id.
    source: built-in text or file.
    field: what holds a document, where the file has fields.
    context: tokens per window.
    windows: number of windows, counted from the beginning.

  Returns:
    Perplexities, their relative difference, and the protocol.

  Raises:
    RequestError: the model or the text cannot be read, or torch is missing.
  """
  directory = hub.resolve_model(model)
  config = model_config.read_model_config(directory)
  content = corpora.read_text(source, field=field).content
  tokens = tokenization.tokenize(directory, content).ids
  tokenization.check_tokens(config, tokens, context)
  text = windows_lib.windows(tokens, context)[:windows]
  theirs = torch_perplexity(directory, text)
  params = weights.load_params(directory, config, jnp.dtype(jnp.float32))
  ours = float(np.exp(scoring.Scorer(config)(params, text, label='JAX')))
  return {
    'model': model,
    'text': source,
    'context': context,
    'windows': len(text),
    'tokens': text.size - len(text),
    'ppl, JAX': ours,
    'ppl, PyTorch': theirs,
    'relative difference': abs(ours - theirs) / theirs,
  }


def main(argv: list[str]) -> None:
  """Compares what the flags name and prints the figures as JSON."""
  del argv
  args = flags.FLAGS
  try:
    result = compare(
      args.model,
      args.data,
      field=args.field,
      context=args.context,
      windows=args.windows,
    )
  except (RequestError, OSError) as error:
    refuse(error)
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  flags.DEFINE_string('model', 'demo', 'Directory or hub id of the model.')
  flags.DEFINE_string('data', 'pydoc', 'Built-in text, or a file.')
  flags.DEFINE_string(
    'field', '', 'Field of --data that holds a document, if it has fields.'
  )
  flags.DEFINE_integer('context', 512, 'Tokens per window.', lower_bound=2)
  flags.DEFINE_integer(
    'windows', 4, 'Number of windows, from the beginning.', lower_bound=1
  )
  app.run(main, flags_parser=cli.parse_flags)
