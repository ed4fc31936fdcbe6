"""The policy: target sparsity to a distribution over priorities.

Single-step: one proposal, one reward, no trajectory. Pure functions around
one flax module. There are two learning signals: PPO's clipped score function
(arXiv 1707.06347, equation 7) with a value and an entropy term (equation 9),
the published one; and the reparameterised gradient of the reward (SVG(0),
arXiv 1510.09142), the default.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Proposal(NamedTuple):
  """The distribution over priorities at one sparsity, and its value."""

  mean_S: jax.Array
  log_std_S: jax.Array
  value: jax.Array  # expected reward, scalar


class Policy(nn.Module):
  """A free mean plus what an MLP adds to it for the target sparsity."""

  size: int  # S
  hidden: tuple[int, ...]
  std: float  # initial standard deviation of a priority

  @nn.compact
  def __call__(self, sparsity) -> Proposal:
    x = jnp.stack([sparsity, jnp.square(sparsity)])
    for width in self.hidden:
      x = nn.tanh(nn.Dense(width)(x))
    mean_S = self.param('mean', nn.initializers.zeros, (self.size,))
    # Zero at first, so that the search starts exactly at the free mean.
    add = nn.Dense(self.size, kernel_init=nn.initializers.zeros, name='add')
    log_std = nn.initializers.constant(jnp.log(self.std))
    value = nn.Dense(1, name='value')(x)[0]
    return Proposal(
      mean_S + add(x), self.param('log_std', log_std, (self.size,)), value
    )


def init(policy: Policy, key, prior_S) -> dict:
  """Parameters whose proposal has mean `prior_S` at every sparsity."""
  params = policy.init(key, jnp.float32(0.0))['params']
  return {**params, 'mean': jnp.asarray(prior_S, jnp.float32)}


def sample(key, proposal: Proposal, candidates: int, *, antithetic: bool):
  """Draws priorities from a proposal.

  Args:
    key: PRNG key, typed.
    proposal: of the policy.
    candidates: N.
    antithetic: in pairs of opposite noise, and the mean if N is odd; else
      each for itself, as published.

  Returns:
    (priorities [N,S], the standard noise behind them [N,S]).
  """
  size = len(proposal.mean_S)
  if not antithetic:
    noise_NxS = jax.random.normal(key, (candidates, size))
    return reparameterise(proposal, noise_NxS), noise_NxS
  half = jax.random.normal(key, (candidates // 2, size))
  mean = jnp.zeros((candidates % 2, size))
  noise_NxS = jnp.concatenate([half, -half, mean])
  return reparameterise(proposal, noise_NxS), noise_NxS


def reparameterise(proposal: Proposal, noise_NxS):
  """The reparameterised priorities, mean + std * noise."""
  return proposal.mean_S + jnp.exp(proposal.log_std_S) * noise_NxS


def log_prob(proposal: Proposal, priority_NxS):
  """Log density of priorities, summed over sublayers, [N]."""
  scaled = (priority_NxS - proposal.mean_S) * jnp.exp(-proposal.log_std_S)
  each = 0.5 * jnp.square(scaled) + proposal.log_std_S
  return -jnp.sum(each + 0.5 * jnp.log(2.0 * jnp.pi), axis=-1)


def entropy(proposal: Proposal):
  """Differential entropy of a proposal, in nats."""
  return jnp.sum(proposal.log_std_S + 0.5 * jnp.log(2.0 * jnp.pi * jnp.e))


def normalise(advantage_N):
  """To mean 0 and standard deviation 1 over a step's candidates."""
  shifted = advantage_N - advantage_N[0]
  centred = shifted - jnp.mean(shifted)
  return centred / (jnp.std(centred) + 1e-8)


class Batch(NamedTuple):
  """One step's candidates."""

  priority_NxS: jax.Array
  noise_NxS: jax.Array
  log_prob_N: jax.Array  # under the policy that proposed them
  value: jax.Array  # the reward that this policy expected, scalar
  reward_N: jax.Array
  gradient_NxS: jax.Array  # d reward / d priority, zeros if not known


def loss(
  proposal: Proposal,
  batch: Batch,
  *,
  clip,
  score_weight,
  pathwise_weight,
  value_weight,
  entropy_weight,
):
  """Returns what one epoch minimises.

  A term of weight 0 is not computed. With the ratio r = p / p_old and the
  advantage A = reward - value of the policy that proposed, normalised over the
  batch, the terms are

    loss_score = -mean(min(r A, clip(r, 1 - clip, 1 + clip) A))
    loss_value = mean(max((v - reward)^2, (v_clipped - reward)^2))
    loss_pathwise = -mean(gradient . (mean + std * noise)),

  v_clipped no further than `clip` from the value before the update, less the
  entropy.

  Args:
    proposal: of the policy being trained.
    batch: of the policy that proposed.
    clip: PPO's epsilon.
    score_weight, pathwise_weight, value_weight, entropy_weight: of the terms;
      Python numbers.

  Returns:
    (scalar loss, dict of its terms), with the score function also of
    approx_kl = mean(r - 1 - log r), how far the policy has moved (Schulman,
    http://joschu.net/blog/kl-approx.html).
  """
  total, spread = 0.0, entropy(proposal)
  terms = {'entropy': spread}
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
    moved_NxS = reparameterise(proposal, batch.noise_NxS)
    each_N = jnp.sum(batch.gradient_NxS * moved_NxS, axis=-1)
    terms['loss_pathwise'] = -jnp.mean(each_N)
    total += pathwise_weight * terms['loss_pathwise']
  if value_weight:
    near = batch.value + jnp.clip(proposal.value - batch.value, -clip, clip)
    misses = (jnp.square(v - batch.reward_N) for v in (proposal.value, near))
    terms['loss_value'] = jnp.mean(jnp.maximum(*misses))
    total += value_weight * terms['loss_value']
  if entropy_weight:
    total -= entropy_weight * spread
  return total, terms


def optimizer(*, learning_rate, network_learning_rate, decay, steps, max_norm):
  """Adam; the free mean and spread learn faster than the network.

  Both rates fall to zero over `steps` updates along a cosine. `decay` is
  Adam's second, short because a search has tens of updates, not thousands.
  """

  def adam(rate):
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=decay)

  def label(params):
    kind = {'mean': 'free', 'log_std': 'free'}
    return {name: kind.get(name, 'network') for name in params}

  return optax.chain(
    optax.clip_by_global_norm(max_norm),
    optax.multi_transform(
      {'free': adam(learning_rate), 'network': adam(network_learning_rate)},
      label,
    ),
  )


def update(params, opt_state, batch, sparsity, *, apply, optim, epochs, **kw):
  """Several epochs over one batch.

  Args:
    params, opt_state: of the policy and its optimiser.
    batch: a Batch.
    sparsity: the state it was proposed for.
    apply: (params, sparsity) -> Proposal.
    optim: an optax optimiser.
    epochs: gradient steps.
    **kw: what `loss` takes.

  Returns:
    (params, opt_state, dict of the last epoch's loss terms).
  """

  def objective(params):
    return loss(apply(params, sparsity), batch, **kw)

  def epoch(carry, _):
    params, opt_state = carry
    grads, terms = jax.grad(objective, has_aux=True)(params)
    change, opt_state = optim.update(grads, opt_state, params)
    return (optax.apply_updates(params, change), opt_state), terms

  (params, opt_state), terms = jax.lax.scan(
    epoch, (params, opt_state), length=epochs
  )
  return params, opt_state, jax.tree.map(lambda x: x[-1], terms)
