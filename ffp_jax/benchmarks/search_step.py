"""What a candidate costs, beside one dense forward of PyTorch.

    python -m ffp_jax.benchmarks.search_step --model=demo --tokens=512

Prints medians over repeats that take turns, so that a machine whose speed
drifts treats all alike. PyTorch's row needs torch, which is no requirement.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ffp_jax.checkpoints import hub, model_config, weights
from ffp_jax.config import defaults
from ffp_jax.errors import RequestError, refuse
from ffp_jax.evaluation import scoring
from ffp_jax.evaluation.loss import nll
from ffp_jax.models import functional
from ffp_jax.pruning import allocation, masks, refit, search, sublayers
from ffp_jax.runtime import cli


def torch_forward(directory, tokens):
  """A dense forward with loss in PyTorch transformers, or None."""
  try:
    import torch
    import transformers
  except ImportError:
    return None
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32
  ).eval()
  ids = torch.tensor(np.asarray(tokens), dtype=torch.long)

  def run():
    with torch.no_grad():
      return model(ids, labels=ids).loss.item()

  return run


def search_steps(config, job_sites, model, params, tokens):
  """One search step of the model, and the same step with a free loss."""
  rank = masks.Masks(
    jnp.tile(jnp.arange(model.groups), (model.layers, 1)),
    jnp.tile(jnp.arange(model.ffn), (model.layers, 1)),
  )
  model, params = refit.refit_model(
    params, model, rank, tokens[:, None], strength=config.search.refit
  )
  apply = functional.make_apply(model)
  device_sublayers = allocation.to_device(job_sites, rank)
  goal = allocation.make_target(job_sites, config.budget.sparsity)
  net, optim = search.make_policy(config, job_sites)
  prior = search.initial_priorities(job_sites, config.search.attention_prior)
  dense = np.float32(1.0)  # its value doesn't matter to the time

  def real(params, tokens, masks):
    return nll(apply, params, tokens, masks)

  def free(params, tokens, masks):
    if masks is None:
      return jnp.ones(len(tokens))
    return sum(jnp.mean(x) for x in masks) * jnp.ones(len(tokens))

  def stepper(loss):
    step = search.make_step(net, optim, loss, config, block=1)
    key = jax.random.key(0)
    holder = [search.init(key, net, optim, prior, size=config.search.finalists)]

    def run():
      holder[0], metrics = step(
        holder[0], params, tokens, dense, goal, device_sublayers
      )
      jax.block_until_ready(metrics)

    return run

  return stepper(real), stepper(free)


def medians(runs: dict, repeats: int) -> dict:
  """Median seconds of each, taking turns, after one warm-up each."""
  spent = {name: [] for name in runs}
  for i in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if i:
        spent[name].append(time.perf_counter() - start)
  return {name: statistics.median(times) for name, times in spent.items()}


def measure(source: str, *, tokens: int, repeats: int) -> dict:
  """What a search step of a model costs by the default configuration.

  Args:
    source: model directory or hub id.
    tokens: a candidate is scored on.
    repeats: timed.
  """
  config = defaults()
  directory = hub.resolve_model(source)
  model = model_config.read_model_config(directory)
  where = sublayers.find_sublayers(
    model, round_heads=1, round_ffn=config.budget.round_ffn
  )
  params = weights.load_params(
    directory, model, functional.resolve_dtype('auto')
  )
  rng = np.random.default_rng(0)
  drawn = rng.integers(0, model.vocab, (1, tokens), dtype=np.int32)
  short = drawn.reshape(-1, min(tokens, config.search.context))
  scorer = scoring.Scorer(model)
  ones = masks.ones(model.layers, model.groups, model.ffn)
  full, free = search_steps(config, where, model, params, short)
  runs = {
    'masked forward, JAX': lambda: scorer(params, drawn, ones),
    'search step': full,
    'search step outside the model': free,
  }
  if reference := torch_forward(directory, drawn):
    runs['dense forward, PyTorch'] = reference
  found = medians(runs, repeats)
  step, forward = found['search step'], found['masked forward, JAX']
  found['outside the model, share of a step'] = (
    found['search step outside the model'] / step
  )
  if reference:
    found['masked JAX / dense PyTorch'] = (
      forward / found['dense forward, PyTorch']
    )
  found['candidates a step'] = config.search.candidates
  return {'device': jax.devices()[0].device_kind, **found}


def main(argv):
  del argv
  args = flags.FLAGS
  try:
    found = measure(args.model, tokens=args.tokens, repeats=args.repeats)
  except (RequestError, OSError) as error:
    refuse(error)
  print(json.dumps(found, indent=2))


if __name__ == '__main__':
  flags.DEFINE_string('model', 'demo', 'Model directory or hub id.')
  flags.DEFINE_integer(
    'tokens', 512, 'Tokens a candidate is scored on.', lower_bound=2
  )
  flags.DEFINE_integer('repeats', 7, 'Timed repeats.', lower_bound=1)
  app.run(main, flags_parser=cli.parse_flags)
