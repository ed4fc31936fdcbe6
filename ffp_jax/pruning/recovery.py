"""Recovery: the pruned model learns from the dense one what it has lost.

The masked model is trained to predict what the dense model predicts on the
same text, the KL divergence of their next-token distributions. Trained is
every kept weight, or low-rank updates of the weights (LoRA, arXiv 2106.09685)
while the weights themselves stay shared with the dense model. What is removed
has no gradient, and so stays as it is, bit for bit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffp_jax.models import adapters
from ffp_jax.models.adapters import join
from ffp_jax.models.decoder import (
  Decoder,
  Masks,
  ModelConfig,
  positions_from_zero,
)
from ffp_jax.pruning.distillation import distillation_loss
from ffp_jax.runtime.sharding import constrain_params, mean_over_rows

_FAR = 0.25  # nats above the best validation loss, at which training diverges
_MOST_HALVINGS = 1  # of the rate; training that diverges once more ends


class RecoveryState(NamedTuple):
  """All that recovery needs to go on; one pytree."""

  trained: dict  # float32, see `begin`
  opt_state: tuple
  step: jax.Array  # steps taken, which is also the position in the text
  rate_scale: jax.Array  # what the learning rate is multiplied by
  halvings: jax.Array  # how often training has diverged
  best: dict  # the trained parameters with the lowest validation loss
  best_loss: jax.Array
  start_loss: jax.Array  # validation loss before the first step; NaN: unknown


def begin(params, model: ModelConfig, keep: Masks, *, rank: int, seed: int):
  """Splits a calibrated model into what is trained and what isn't.

  Args:
    params: calibrated, of the dense decoder; not used up.
    model: its `ModelConfig`.
    keep: the masks.
    rank: of the low-rank updates; 0 to train every kept weight.
    seed: of the updates.

  Returns:
    (trained, frozen): parameters, nested alike; `trained` in float32.
  """
  if rank:
    key = jax.random.key(seed)
    return adapters.draw(model, keep, rank=rank, key=key), params
  # Copies, as the buffers of what is trained are used again.
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params), {}


def optimizer(*, max_norm, decays):
  """Returns Adam on the clipped gradient, still without a learning rate.

  Args:
    max_norm: of the whole gradient.
    decays: Adam's two.
  """
  return optax.chain(
    optax.clip_by_global_norm(max_norm), optax.scale_by_adam(*decays)
  )


def schedule(*, peak, warmup, steps):
  """Returns step -> learning rate: a linear rise, then a cosine to zero.

  Args:
    peak: the highest rate.
    warmup: steps below it, fewer than `steps`.
    steps: in all, after which the rate is zero.
  """
  low = peak / (warmup + 1)  # not zero, so that no step is wasted
  return optax.warmup_cosine_decay_schedule(low, peak, warmup, steps)


def start(trained, optim) -> RecoveryState:
  """Returns the state before the first step."""

  @jax.jit
  def scalars():
    none, unknown = jnp.float32(jnp.inf), jnp.float32(jnp.nan)
    return jnp.int32(0), jnp.float32(1.0), jnp.int32(0), none, unknown

  step, rate_scale, halvings, best_loss, start_loss = scalars()
  return RecoveryState(
    trained=trained,
    opt_state=optim.init(trained),
    step=step,
    rate_scale=rate_scale,
    halvings=halvings,
    best=_copy(trained),
    best_loss=best_loss,
    start_loss=start_loss,
  )


def make_step(
  model: ModelConfig, optim, rate, *, rank: int, remat: bool, chunk: int
) -> Callable:
  """Returns the jitted training step.

  Args:
    model: of the dense decoder.
    optim: from `optimizer`.
    rate: from `schedule`.
    rank: as in `begin`.
    remat: whether to compute activations again in the backward pass.
    chunk: of `distillation_loss`.

  Returns:
    (trained, opt_state, step, rate_scale, frozen, dense params, Masks, tokens
    [A,B,T]) -> (trained, opt_state, step, metrics); the first two are used
    up. The gradient is the mean over A micro-batches, computed in turn, whose
    rows are split over the mesh.
  """
  dense_decoder = Decoder(model)
  decoder = Decoder(dataclasses.replace(model, adapter_rank=rank), remat=remat)

  def unembed(params, stream):
    return decoder.apply({'params': params}, stream, method='unembed')

  def read(params):
    names = ('embed_out', 'final_norm', 'embed' if model.tied else 'head')
    return {name: params[name] for name in names if name in params}

  def loss_of(trained, frozen, dense, keep, tokens_BxT):
    params = join(frozen, trained, dense['embed']['table'].dtype)

    def mean_divergence(rows):
      at = positions_from_zero(rows.shape[1])
      aim, _ = dense_decoder.apply({'params': dense}, rows, at, method='stream')
      found, _ = decoder.apply(
        {'params': params}, rows, at, keep, method='stream'
      )
      return distillation_loss(
        unembed, read(params), found, read(dense), aim, chunk=chunk
      )

    return mean_over_rows(mean_divergence, tokens_BxT)

  def step(
    trained, opt_state, step, rate_scale, frozen, dense, keep, tokens_AxBxT
  ):
    def add(total, tokens_BxT):
      new = jax.value_and_grad(loss_of)(
        trained, frozen, dense, keep, tokens_BxT
      )
      loss, gradient = jax.tree.map(jnp.add, total, new)
      return (loss, constrain_params(gradient)), None

    zero = jnp.float32(0.0), jax.tree.map(jnp.zeros_like, trained)
    total, _ = jax.lax.scan(add, zero, tokens_AxBxT)
    loss, gradient = jax.tree.map(lambda x: x / len(tokens_AxBxT), total)
    change, opt_state = optim.update(gradient, opt_state)
    speed = rate(step) * rate_scale
    trained = jax.tree.map(lambda x, u: x - speed * u, trained, change)
    metrics = {
      'kl': loss,
      'gradient_norm': optax.tree.norm(gradient),
      'rate': speed,
    }
    return constrain_params(trained), opt_state, step + 1, metrics

  return jax.jit(step, donate_argnums=(0, 1))


def steps(
  state: RecoveryState,
  step_fn: Callable,
  batch: Callable,
  validate: Callable,
  optim,
  *,
  total: int,
  every: int,
) -> Iterator[tuple[RecoveryState, dict]]:
  """Trains to the end, from the start or from any state that was yielded.

  The best state by validation loss is kept, and the start is one of them:
  `state.best` is never worse. Training has diverged if its loss or gradient
  isn't finite, or if the validation loss isn't, or is more than 0.25 above
  the best (a perplexity 28% higher). It then goes on from the best
  parameters, with the moments of Adam forgotten, at half the rate, and with
  the text that comes next; the second time it ends there.

  Args:
    state: to go on from; used up, as each state is when the next is asked
      for.
    step_fn: (trained, opt_state, step, rate_scale, tokens) -> (trained,
      opt_state, step, metrics); see `make_step`.
    batch: step -> tokens [A,B,T].
    validate: trained -> validation loss.
    optim: from `optimizer`.
    total: steps in all.
    every: steps between validations; there is one before the first step and
      after the last as well.

  Yields:
    (state, metrics): before the first step, and after each.
  """
  if np.isnan(state.start_loss):
    state, metrics = _validated(state, validate)
    state = state._replace(start_loss=state.best_loss)
    yield state, metrics
  while state.step < total and state.halvings <= _MOST_HALVINGS:
    *new, metrics = step_fn(*state[:4], batch(int(state.step)))
    state = state._replace(
      **dict(zip(('trained', 'opt_state', 'step'), new, strict=True))
    )
    metrics = {name: x.item() for name, x in jax.device_get(metrics).items()}
    taken = int(state.step)
    finite = math.isfinite(metrics['kl'] + metrics['gradient_norm'])
    diverged = not finite
    if finite and (taken % every == 0 or taken == total):
      state, found = _validated(state, validate)
      metrics |= found
      # Also of a loss that isn't finite.
      diverged = not metrics['validation'] <= float(state.best_loss) + _FAR
    if diverged:
      state = _halved(state, optim)
    yield state, metrics | {'diverged': diverged}


def _validated(state, validate):
  """Returns the state with its best brought up to date, and the metrics."""
  loss = float(np.float32(validate(state.trained)))
  if loss < float(state.best_loss):
    state = state._replace(
      best=_copy(state.trained), best_loss=_like(loss, state.best_loss)
    )
  return state, {'validation': loss, 'best': float(state.best_loss)}


def _halved(state, optim):
  """Returns the best parameters with a fresh optimiser at half the rate."""
  return state._replace(
    trained=_copy(state.best),
    opt_state=optim.init(state.best),
    rate_scale=_like(float(state.rate_scale) / 2, state.rate_scale),
    halvings=_like(int(state.halvings) + 1, state.halvings),
  )


def _like(value, old):
  """Returns a number as an array of the type and place of another."""
  return jax.device_put(np.asarray(value, old.dtype), old.sharding)


def _copy(tree):
  """Returns parameters in buffers of their own."""
  return jax.tree.map(jnp.copy, tree)
