"""Measures what a candidate costs beside one dense forward pass of PyTorch.

    python -m ffp_jax.benchmarks.search_step --model=demo --tokens=512

Prints medians. The measurements take turns, so that a drift of the machine's
speed affects all alike. PyTorch's row needs torch, which is not a requirement
of ffp_jax.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags

from ffp_jax.checkpoints.model import load_model
from ffp_jax.config import defaults
from ffp_jax.errors import RequestError, refuse
from ffp_jax.evaluation import scoring
from ffp_jax.evaluation.loss import nll
from ffp_jax.models import functional
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning import allocation, masks, refit, search, sublayers
from ffp_jax.runtime import cli


def torch_forward(
  directory: pathlib.Path, tokens_BxT: np.ndarray
) -> Callable[[], float] | None:
  """Returns a dense forward pass with loss in PyTorch, None without torch."""
  try:
    import torch
    import transformers
  except ImportError:
    return None
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32
  ).eval()
  ids = torch.tensor(np.asarray(tokens_BxT), dtype=torch.long)

  def run():
    with torch.no_grad():
      return model(ids, labels=ids).loss.item()

  return run


def search_steps(
  config: ml_collections.ConfigDict,
  where: sublayers.Sublayers,
  model: ModelConfig,
  params: dict,
  tokens_BxT: np.ndarray,
) -> tuple[Callable[[], None], Callable[[], None]]:
  """Makes search steps to time, all on the same tokens.

  Returns:
    (function that takes one step and waits for it, the same with a loss that
    does not run the model).
  """
  rank = masks.Masks(
    jnp.tile(jnp.arange(model.groups), (model.layers, 1)),
    jnp.tile(jnp.arange(model.ffn), (model.layers, 1)),
  )
  model, params = refit.refit_model(
    params, model, rank, tokens_BxT[:, None], strength=config.search.refit
  )
  apply = functional.make_apply(model)
  device_sublayers = allocation.to_device(where, rank)
  target = allocation.make_target(where, config.budget.sparsity)
  net, optim = search.make_policy(config, where)
  prior = search.initial_priorities(where, config.search.attention_prior)
  dense = np.float32(1.0)  # does not affect the time

  def model_loss(params, tokens, masks):
    return nll(apply, params, tokens, masks)

  def free_loss(params, tokens, masks):
    if masks is None:
      return jnp.ones(len(tokens))
    return sum(jnp.mean(x) for x in masks) * jnp.ones(len(tokens))

  def stepper(loss):
    step = search.make_step(net, optim, loss, config, block=1)
    key = jax.random.key(0)
    state = search.init(key, net, optim, prior, size=config.search.finalists)

    def run():
      nonlocal state
      state, metrics = step(
        state, params, tokens_BxT, dense, target, device_sublayers
      )
      jax.block_until_ready(metrics)

    return run

  return stepper(model_loss), stepper(free_loss)


def medians(
  runs: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
  """Returns median seconds of functions that take turns, after a warm-up."""
  spent = {name: [] for name in runs}
  for i in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if i:
        spent[name].append(time.perf_counter() - start)
  return {name: statistics.median(times) for name, times in spent.items()}


def measure(source: str, *, tokens: int, repeats: int) -> dict:
  """Measures a search step of a model with the default configuration.

  Args:
    source: model directory or hub id.
    tokens: number of tokens that a candidate is scored on.
    repeats: timed turns.

  Returns:
    Seconds and their ratios, with the device's name.
  """
  config = defaults()
  loaded = load_model(source)
  model, params = loaded.config, loaded.params
  where = sublayers.find_sublayers(
    model, round_heads=1, round_ffn=config.budget.round_ffn, floor=1
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
  if reference := torch_forward(loaded.directory, drawn):
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


def main(argv: list[str]) -> None:
  """Measures the model that the flags name and prints the figures as JSON."""
  del argv
  args = flags.FLAGS
  try:
    found = measure(args.model, tokens=args.tokens, repeats=args.repeats)
  except (RequestError, OSError) as error:
    refuse(error)
  print(json.dumps(found, indent=2))


if __name__ == '__main__':
  flags.DEFINE_string('model', 'demo', 'Directory or hub id of the model.')
  flags.DEFINE_integer(
    'tokens', 512, 'Tokens that a candidate is scored on.', lower_bound=2
  )
  flags.DEFINE_integer(
    'repeats', 7, 'Timed turns of each measurement.', lower_bound=1
  )
  app.run(main, flags_parser=cli.parse_flags)
