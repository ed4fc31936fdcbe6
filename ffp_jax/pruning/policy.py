"""The policy: maps the target sparsity to a distribution over priorities.

An episode is a single step: one proposal, one reward, no trajectory. There are
two learning signals: PPO's clipped score function (arXiv 1707.06347, equation
7) with a value and an entropy term (equation 9), which is the published one;
and the reparameterised gradient of the reward (SVG(0), arXiv 1510.09142), the
default. Shape letters: N candidates, S sublayers.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.stats import norm


class Proposal(NamedTuple):
  """A diagonal Gaussian over priorities at one sparsity, and its value."""

  mean_S: jax.Array  # [S]
  log_std_S: jax.Array  # [S]
  value: jax.Array  # expected reward, scalar


class Policy(nn.Module):
  """A free mean, plus an MLP's correction of it for the target sparsity.

  Attributes:
    size: number of sublayers, S.
    hidden: widths of the MLP's hidden layers.
    std: initial standard deviation of every priority.
  """

  size: int
  hidden: tuple[int, ...]
  std: float

  @nn.compact
  def __call__(self, sparsity: jax.Array) -> Proposal:
    """Returns the proposal at a sparsity, a float32 scalar."""
    x = jnp.stack([sparsity, jnp.square(sparsity)])
    for width in self.hidden:
      x = nn.tanh(nn.Dense(width)(x))
    mean_S = self.param('mean', nn.initializers.zeros, (self.size,))
    # The correction is zero at first: the search starts at the free mean.
    correction = nn.Dense(
      self.size, kernel_init=nn.initializers.zeros, name='add'
    )
    log_std = nn.initializers.constant(jnp.log(self.std))
    value = nn.Dense(1, name='value')(x)[0]
    return Proposal(
      mean_S + correction(x),
      self.param('log_std', log_std, (self.size,)),
      value,
    )


def init(
  policy: Policy, key: jax.Array, prior_S: jax.Array | np.ndarray
) -> dict:
  """Returns parameters whose proposal has mean `prior_S` at every sparsity.

  Args:
    policy: the network.
    key: typed PRNG key.
    prior_S: priorities, [S].
  """
  params = policy.init(key, jnp.float32(0.0))['params']
  return {**params, 'mean': jnp.asarray(prior_S, jnp.float32)}


def propose(policy: Policy, params: dict, sparsity: jax.Array) -> Proposal:
  """Returns the proposal of a policy at a sparsity, a float32 scalar."""
  return cast(Proposal, policy.apply({'params': params}, sparsity))


def sample(
  key: jax.Array, proposal: Proposal, candidates: int, *, antithetic: bool
) -> tuple[jax.Array, jax.Array]:
  """Draws priorities from a proposal.

  Args:
    key: typed PRNG key.
    proposal: the distribution.
    candidates: number of draws, N.
    antithetic: whether to draw pairs of opposite noise, with the mean itself
      if N is odd; otherwise the draws are independent, as published.

  Returns:
    (priorities [N,S], the standard normal noise behind them [N,S]).
  """
  size = len(proposal.mean_S)
  if not antithetic:
    noise_NxS = jax.random.normal(key, (candidates, size))
    return reparameterise(proposal, noise_NxS), noise_NxS
  half = jax.random.normal(key, (candidates // 2, size))
  mean = jnp.zeros((candidates % 2, size))
  noise_NxS = jnp.concatenate([half, -half, mean])
  return reparameterise(proposal, noise_NxS), noise_NxS


def reparameterise(proposal: Proposal, noise_NxS: jax.Array) -> jax.Array:
  """Returns the priorities mean + std * noise, [N,S]."""
  return proposal.mean_S + jnp.exp(proposal.log_std_S) * noise_NxS


def log_prob(proposal: Proposal, priority_NxS: jax.Array) -> jax.Array:
  """Returns the log density of priorities, summed over the sublayers, [N]."""
  std_S = jnp.exp(proposal.log_std_S)
  return norm.logpdf(priority_NxS, proposal.mean_S, std_S).sum(axis=-1)


def entropy(proposal: Proposal) -> jax.Array:
  """Returns the differential entropy of a proposal, in nats."""
  return jnp.sum(proposal.log_std_S + 0.5 * jnp.log(2.0 * jnp.pi * jnp.e))


def normalise(advantage_N: jax.Array) -> jax.Array:
  """Shifts and scales to mean 0 and standard deviation 1, [N].

  Equal advantages become exactly 0, whatever their size.
  """
  shifted = advantage_N - advantage_N[0]
  centred = shifted - jnp.mean(shifted)
  return centred / (jnp.std(centred) + 1e-8)


class Batch(NamedTuple):
  """The N candidates of one step."""

  priority_NxS: jax.Array
  noise_NxS: jax.Array  # the noise that `sample` drew
  log_prob_N: jax.Array  # under the policy that proposed them
  value: jax.Array  # the reward that this policy expected, scalar
  reward_N: jax.Array
  gradient_NxS: jax.Array  # d reward / d priority; zero where unknown


def loss(
  proposal: Proposal,
  batch: Batch,
  *,
  clip: float,
  score_weight: float,
  pathwise_weight: float,
  value_weight: float,
  entropy_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the loss that one epoch minimises.

  It is the weighted sum of the terms below, less the weighted entropy; a term
  of weight 0 is not computed. With the probability ratio r = p / p_old and the
  advantage A = reward - value, normalised over the batch, where p_old and the
  value are those of the policy that proposed the candidates, the terms are

    loss_score = -mean(min(r A, clip(r, 1 - clip, 1 + clip) A))
    loss_value = mean(max((v - reward)^2, (v_clipped - reward)^2))
    loss_pathwise = -mean(gradient . (mean + std * noise)),

  with v the new value, and v_clipped no further than `clip` from the old one.

  Args:
    proposal: of the policy that is trained.
    batch: of the policy that proposed.
    clip: PPO's epsilon.
    score_weight, pathwise_weight, value_weight, entropy_weight: weights of the
      terms; Python numbers.

  Returns:
    (scalar loss, dict of its terms and of the entropy). With the score function
    the dict also has approx_kl = mean(r - 1 - log r), an estimate of how far
    the policy has moved (Schulman, http://joschu.net/blog/kl-approx.html).
  """
  total, terms = jnp.float32(0.0), {'entropy': entropy(proposal)}
  if score_weight:
    log_ratio_N = log_prob(proposal, batch.priority_NxS) - batch.log_prob_N
    ratio_N = jnp.exp(log_ratio_N)
    advantage_N = normalise(batch.reward_N - batch.value)
    bounded_N = jnp.clip(ratio_N, 1.0 - clip, 1.0 + clip)
    score_N = jnp.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    terms['loss_score'] = -jnp.mean(score_N)
    terms['approx_kl'] = jnp.mean(ratio_N - 1.0 - log_ratio_N)
    total += score_weight * terms['loss_score']
  if pathwise_weight:
    priority_NxS = reparameterise(proposal, batch.noise_NxS)
    ascent_N = jnp.sum(batch.gradient_NxS * priority_NxS, axis=-1)
    terms['loss_pathwise'] = -jnp.mean(ascent_N)
    total += pathwise_weight * terms['loss_pathwise']
  if value_weight:
    change = jnp.clip(proposal.value - batch.value, -clip, clip)
    error_N, clipped_error_N = (
      jnp.square(value - batch.reward_N)
      for value in (proposal.value, batch.value + change)
    )
    terms['loss_value'] = jnp.mean(jnp.maximum(error_N, clipped_error_N))
    total += value_weight * terms['loss_value']
  if entropy_weight:
    total -= entropy_weight * terms['entropy']
  return total, terms


def optimizer(
  *,
  learning_rate: float,
  network_learning_rate: float,
  decay: float,
  steps: int,
  max_norm: float,
) -> optax.GradientTransformation:
  """Returns Adam with two learning rates, on the clipped gradient.

  Args:
    learning_rate: first rate of the free mean and standard deviation.
    network_learning_rate: first rate of the network.
    decay: Adam's second decay rate; short, because a search makes tens of
      updates and not thousands.
    steps: updates over which both rates fall to zero along a cosine.
    max_norm: largest norm of the whole gradient.
  """

  def adam(rate):
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=decay)

  def label(params):
    free = ('mean', 'log_std')
    return {name: 'free' if name in free else 'network' for name in params}

  return optax.chain(
    optax.clip_by_global_norm(max_norm),
    optax.multi_transform(
      {'free': adam(learning_rate), 'network': adam(network_learning_rate)},
      label,
    ),
  )


def update(
  params: dict,
  opt_state: optax.OptState,
  batch: Batch,
  sparsity: jax.Array,
  *,
  apply: Callable[[dict, jax.Array], Proposal],
  optim: optax.GradientTransformation,
  epochs: int,
  **weights: float,
) -> tuple[dict, optax.OptState, dict[str, jax.Array]]:
  """Trains the policy on one batch.

  Args:
    params: of the policy.
    opt_state: of the optimiser.
    batch: candidates with their rewards.
    sparsity: the sparsity that they were proposed for.
    apply: (params, sparsity) -> `Proposal`.
    optim: the optimiser.
    epochs: number of gradient steps.
    **weights: keyword arguments of `loss`.

  Returns:
    (params, opt_state, terms of `loss` in the last epoch).
  """

  def objective(params):
    return loss(apply(params, sparsity), batch, **weights)

  def epoch(carry, _):
    params, opt_state = carry
    grads, terms = jax.grad(objective, has_aux=True)(params)
    change, opt_state = optim.update(grads, opt_state, params)
    return (optax.apply_updates(params, change), opt_state), terms

  (params, opt_state), terms = jax.lax.scan(
    epoch, (params, opt_state), length=epochs
  )
  return params, opt_state, jax.tree.map(lambda x: x[-1], terms)
