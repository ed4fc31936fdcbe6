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


def sample(key, proposal: Proposal, candidates: int):
  """Priorities in antithetic pairs, and the mean if their number is odd.

  Returns:
    (priorities [N,S], the standard noise behind them [N,S]).
  """
  size = len(proposal.mean_S)
  half = jax.random.normal(key, (candidates // 2, size))
  mean = jnp.zeros((candidates % 2, size))
  noise_NxS = jnp.concatenate([half, -half, mean])
  return act(proposal, noise_NxS), noise_NxS


def act(proposal: Proposal, noise_NxS):
  """The reparameterised priorities, mean + std * noise."""
  return proposal.mean_S + jnp.exp(proposal.log_std_S) * noise_NxS


def log_prob(proposal: Proposal, priority_NxS):
  """Log density of priorities, summed over modules, [N]."""
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

  A signal of weight 0 is not computed. The value term belongs to the score
  function, whose baseline the value is, and has `value_weight` beside it.

  Args:
    proposal: of the policy being trained.
    batch: of the policy that proposed.
    clip: PPO's epsilon.
    score_weight, pathwise_weight, value_weight, entropy_weight: of the terms;
      Python numbers.

  Returns:
    (scalar loss, dict of its terms).
  """
  total, spread = 0.0, entropy(proposal)
  terms = {'entropy': spread}
  if pathwise_weight:
    moved_NxS = act(proposal, batch.noise_NxS)
    pathwise = -jnp.mean(jnp.sum(batch.gradient_NxS * moved_NxS, axis=-1))
    total += pathwise_weight * pathwise
    terms['loss_pathwise'] = pathwise
  if score_weight:
    found = ppo(proposal, batch, clip=clip)
    total += score_weight * found['loss_score']
    total += value_weight * found['loss_value']
    terms |= found
  if entropy_weight:
    total -= entropy_weight * spread
  return total, terms


def ppo(proposal: Proposal, batch: Batch, *, clip) -> dict:
  """Returns the terms of proximal policy optimisation.

  With the ratio r = p / p_old and the advantage A = reward - value of the
  policy that proposed, normalised over the batch:

    loss_score = -mean(min(r A, clip(r, 1 - clip, 1 + clip) A))
    loss_value = mean(max((v - reward)^2, (v_clipped - reward)^2)),

  v_clipped no further than `clip` from the value before the update; and as a
  measure of how far the policy has moved, approx_kl = mean(r - 1 - log r)
  (Schulman, http://joschu.net/blog/kl-approx.html).
  """
  log_ratio_N = log_prob(proposal, batch.priority_NxS) - batch.log_prob_N
  ratio_N = jnp.exp(log_ratio_N)
  advantage_N = normalise(batch.reward_N - batch.value)
  bounded_N = jnp.clip(ratio_N, 1.0 - clip, 1.0 + clip)
  score_N = jnp.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
  near = batch.value + jnp.clip(proposal.value - batch.value, -clip, clip)
  miss_N, near_miss_N = (
    jnp.square(value - batch.reward_N) for value in (proposal.value, near)
  )
  return {
    'loss_score': -jnp.mean(score_N),
    'loss_value': jnp.mean(jnp.maximum(miss_N, near_miss_N)),
    'approx_kl': jnp.mean(ratio_N - 1.0 - log_ratio_N),
  }


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
