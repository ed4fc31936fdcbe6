"""Perplexity in JAX beside PyTorch transformers, the same tokens in float32.

    python -m ffp_jax.benchmarks.parity --model=demo --data=pydoc

Needs torch, which is no requirement of ffp_jax.
"""

import json

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


def torch_perplexity(directory, windows_WxT) -> float:
  """exp of PyTorch's mean next-token loss, one window at a time.

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


def compare(model, source, *, field='', context, windows) -> dict:
  """Both perplexities on the first windows of a text, and the protocol."""
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


def main(argv):
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
  flags.DEFINE_string('model', 'demo', 'Model directory or hub id.')
  flags.DEFINE_string('data', 'pydoc', 'Text: built-in or file.')
  flags.DEFINE_string('field', '', 'Of --data, what holds a document.')
  flags.DEFINE_integer('context', 512, 'Tokens a window.', lower_bound=2)
  flags.DEFINE_integer('windows', 4, 'First windows only.', lower_bound=1)
  app.run(main, flags_parser=cli.parse_flags)
