"""Recovery: trains the pruned model to predict what the dense model predicts.

The loss is a weighted mean of the KL divergence of the next-token distributions
of the masked model and the dense model on the same text, and of the masked
model's cross-entropy of that text. Either every kept weight is trained, or
low-rank updates of the weights (LoRA, arXiv 2106.09685) while the weights
themselves stay shared with the dense model. Removed units have no gradient, and
so stay as they are, bit for bit.
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

_DIVERGED_NATS = 0.25  # above the best validation loss, training has diverged
_MAX_HALVINGS = 1  # of the rate; training ends when it diverges once more


class RecoveryState(NamedTuple):
  """The complete, resumable state of recovery; one pytree of arrays."""

  trained: dict  # float32 parameters, see `begin`
  opt_state: optax.OptState
  step: jax.Array  # int32, steps taken; also the position in the text
  rate_scale: jax.Array  # float32, factor of the learning rate
  halvings: jax.Array  # int32, how often training has diverged
  best: dict  # the trained parameters with the lowest validation loss
  best_loss: jax.Array  # float32, their validation loss
  start_loss: jax.Array  # validation loss before the first step, NaN if unknown


def begin(
  params: dict, model: ModelConfig, masks: Masks, *, rank: int, seed: int
) -> tuple[dict, dict]:
  """Splits a calibrated model into trained and frozen parameters.

  Args:
    params: calibrated parameters of the dense decoder; their buffers are kept.
    model: its `ModelConfig`.
    masks: the units to keep.
    rank: of the low-rank updates; 0 to train every kept weight.
    seed: of the updates.

  Returns:
    (trained, frozen): parameters, nested alike; `trained` in float32.
  """
  if rank:
    key = jax.random.key(seed)
    return adapters.draw(model, masks, rank=rank, key=key), params
  # Copies, because the training step donates the buffers of `trained`.
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params), {}


def optimizer(
  *, max_norm: float = 1.0, decays: tuple[float, float] = (0.9, 0.95)
) -> optax.GradientTransformation:
  """Returns Adam on the clipped gradient, without a learning rate.

  Args:
    max_norm: largest norm of the whole gradient.
    decays: Adam's two decay rates.
  """
  return optax.chain(
    optax.clip_by_global_norm(max_norm), optax.scale_by_adam(*decays)
  )


def schedule(*, peak: float, warmup: int, steps: int) -> optax.Schedule:
  """Returns step -> learning rate: a linear rise, then a cosine to zero.

  Args:
    peak: the highest rate.
    warmup: number of steps before the peak, less than `steps`.
    steps: number of all steps, after which the rate is zero.
  """
  low = peak / (warmup + 1)  # not zero, so that no step is wasted
  return optax.warmup_cosine_decay_schedule(low, peak, warmup, steps)


def start(trained: dict, optim: optax.GradientTransformation) -> RecoveryState:
  """Returns the state before the first step."""

  @jax.jit
  def scalars():
    infinite, unknown = jnp.float32(jnp.inf), jnp.float32(jnp.nan)
    return jnp.int32(0), jnp.float32(1.0), jnp.int32(0), infinite, unknown

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


def make_loss(
  model: ModelConfig,
  *,
  rank: int,
  cross_entropy: float,
  remat: bool,
  chunk: int = 512,
  student: ModelConfig | None = None,
) -> Callable:
  """Returns the loss of recovery for `make_step`.

  Args:
    model: of the dense decoder.
    rank: as in `begin`.
    cross_entropy: see `distillation_loss`.
    remat: whether to recompute activations in the backward pass.
    chunk: see `distillation_loss`.
    student: of the pruned decoder if it is sliced and takes no masks.

  Returns:
    (trained, frozen, dense params, Masks, tokens [B,T]) -> (mean loss, the
    divergence in it as `kl`), in nats.
  """
  student = dataclasses.replace(student or model, adapter_rank=rank)
  dense_decoder = Decoder(model)
  decoder = Decoder(student, remat=remat)

  def unembed(params, stream):
    return decoder.apply({'params': params}, stream, method='unembed')

  def unembed_params(params):
    names = ('embed_out', 'final_norm', 'embed' if model.tied else 'head')
    return {name: params[name] for name in names if name in params}

  def loss_fn(trained, frozen, dense, masks, tokens_BxT):
    params = join(frozen, trained, dense['embed']['table'].dtype)

    def mean_losses(rows):
      positions = positions_from_zero(rows.shape[1])
      dense_stream, _ = dense_decoder.apply(
        {'params': dense}, rows, positions, method='stream'
      )
      stream, _ = decoder.apply(
        {'params': params}, rows, positions, masks, method='stream'
      )
      return distillation_loss(
        unembed,
        unembed_params(params),
        stream,
        unembed_params(dense),
        dense_stream,
        rows,
        cross_entropy=cross_entropy,
        chunk=chunk,
      )

    loss, divergence = mean_over_rows(mean_losses, tokens_BxT)
    return loss, {'kl': divergence}

  return loss_fn


def make_step(
  loss_fn: Callable,
  optim: optax.GradientTransformation,
  rate: optax.Schedule,
) -> Callable:
  """Returns the jitted training step.

  Args:
    loss_fn: (trained, *others, tokens [B,T]) -> (loss, metrics), the means
      over the rows.
    optim: from `optimizer`.
    rate: from `schedule`.

  Returns:
    (trained, opt_state, step, rate_scale, *others, tokens [A,B,T]) ->
    (trained, opt_state, step, metrics); the buffers of the first two arguments
    are donated. The gradient is the mean over A micro-batches, computed in
    turn. To the metrics it adds `loss`, `gradient_norm` and `rate`.
  """

  def recovery_step(trained, opt_state, step, rate_scale, *others):
    *others, tokens_AxBxT = others

    def add(total, tokens_BxT):
      new = jax.value_and_grad(loss_fn, has_aux=True)(
        trained, *others, tokens_BxT
      )
      losses, gradient = jax.tree.map(jnp.add, total, new)
      return (losses, constrain_params(gradient)), None

    losses = jax.eval_shape(loss_fn, trained, *others, tokens_AxBxT[0])
    zero = jax.tree.map(jnp.zeros_like, (losses, trained))
    total, _ = jax.lax.scan(add, zero, tokens_AxBxT)
    (loss, metrics), gradient = jax.tree.map(
      lambda x: x / len(tokens_AxBxT), total
    )
    change, opt_state = optim.update(gradient, opt_state)
    step_rate = rate(step) * rate_scale
    trained = jax.tree.map(lambda x, u: x - step_rate * u, trained, change)
    metrics = metrics | {
      'loss': loss,
      'gradient_norm': optax.tree.norm(gradient),
      'rate': step_rate,
    }
    trained, opt_state = constrain_params((trained, opt_state))
    return trained, opt_state, step + 1, metrics

  return jax.jit(recovery_step, donate_argnums=(0, 1))


def steps(
  state: RecoveryState,
  step_fn: Callable,
  batch: Callable[[int], jax.Array | np.ndarray],
  validate: Callable[[dict], float],
  optim: optax.GradientTransformation,
  *,
  total: int,
  every: int,
) -> Iterator[tuple[RecoveryState, dict]]:
  """Trains to the end, from the start or from any state that was yielded.

  The parameters with the lowest validation loss are kept as `state.best`; those
  at the start are among the candidates, so the result is never worse.

  Training has diverged if its loss, its gradient or the validation loss is not
  finite, or if the validation loss is more than 0.25 nats above the best (a
  perplexity 28% higher). It then restarts from the best parameters with fresh
  moments of Adam, at half the rate, on the text that comes next; the second
  time, training ends.

  Args:
    state: from `start`, or yielded by the same training. Each state's buffers
      are donated when the next one is asked for.
    step_fn: (trained, opt_state, step, rate_scale, tokens) -> (trained,
      opt_state, step, metrics); see `make_step`.
    batch: step -> tokens [A,B,T].
    validate: trained -> validation loss, in nats.
    optim: from `optimizer`.
    total: number of all steps.
    every: number of steps between validations; there is also one before the
      first step and one after the last.

  Yields:
    (state, metrics) before the first step, and after each. The metrics are
    `step`, the number of steps taken, those of the step and `diverged`; after
    a validation also its loss (`validation`) and the lowest one so far
    (`best`).
  """
  if np.isnan(state.start_loss):
    state, metrics = _validated(state, validate)
    state = state._replace(start_loss=state.best_loss)
    yield state, {'step': 0, **metrics}
  while state.step < total and state.halvings <= _MAX_HALVINGS:
    *new, metrics = step_fn(*state[:4], batch(int(state.step)))
    state = state._replace(
      **dict(zip(('trained', 'opt_state', 'step'), new, strict=True))
    )
    metrics = {name: x.item() for name, x in jax.device_get(metrics).items()}
    metrics['step'] = taken = int(state.step)
    finite = math.isfinite(metrics['loss'] + metrics['gradient_norm'])
    diverged = not finite
    if finite and (taken % every == 0 or taken == total):
      state, validation = _validated(state, validate)
      metrics |= validation
      # Negated, so that a validation loss of NaN has diverged too.
      diverged = (
        not metrics['validation'] <= float(state.best_loss) + _DIVERGED_NATS
      )
    if diverged:
      state = _halved(state, optim)
    yield state, metrics | {'diverged': diverged}


def _validated(state: RecoveryState, validate) -> tuple[RecoveryState, dict]:
  """Validates, and returns the state with its updated best, and metrics."""
  loss = float(np.float32(validate(state.trained)))
  if loss < float(state.best_loss):
    state = state._replace(
      best=_copy(state.trained), best_loss=_like(loss, state.best_loss)
    )
  return state, {'validation': loss, 'best': float(state.best_loss)}


def _halved(state: RecoveryState, optim) -> RecoveryState:
  """Returns the best parameters with a fresh optimiser at half the rate."""
  return state._replace(
    trained=_copy(state.best),
    opt_state=optim.init(state.best),
    rate_scale=_like(float(state.rate_scale) / 2, state.rate_scale),
    halvings=_like(int(state.halvings) + 1, state.halvings),
  )


def _like(value, old):
  """Returns a number as an array with the type and sharding of another."""
  return jax.device_put(np.asarray(value, old.dtype), old.sharding)


def _copy(tree):
  """Copies parameters into new buffers."""
  return jax.tree.map(jnp.copy, tree)
