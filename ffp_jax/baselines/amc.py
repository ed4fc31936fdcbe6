"""AMC: a DDPG agent that walks the sublayers and gives each its ratio.

Source: He et al., arXiv 1802.03494, algorithm 1 and its authors' settings;
DDPG, arXiv 1509.02971.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffp_jax.baselines.problem import Problem

_STATE = 8  # numbers that describe a sublayer on the way
_BATCH = 64  # transitions an update


class Mlp(nn.Module):
  """Two hidden layers; one output, small at first."""

  hidden: int

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.Dense(self.hidden)(x))
    init = nn.initializers.uniform(6e-3)
    return nn.Dense(1, kernel_init=init)(x)[..., 0]


class Agent(NamedTuple):
  """Actor and critic, what they move towards, and their optimisers."""

  params: dict
  target: dict
  opt_state: tuple


def amc(
  problem: Problem,
  seed: int,
  *,
  hidden: int,
  actor_rate: float,
  critic_rate: float,
  tau: float,
  noise: float,
  decay: float,
  warmup: float,
  memory: int,
  rows: int,
):
  """Deep deterministic policy gradient over a walk through the sublayers.

  The action is a sublayer's ratio, cut so that the sublayers still to come can
  meet the budget at their lowest (algorithm 1); the reward of all steps of an
  episode is minus its loss, less a moving mean. Departs in
  that actions are drawn around the target instead of from all of [0, 1]
  while the memory fills, over the share `warmup` of the budget, that every
  episode has the same text, and that what the walk leaves over is spent by
  the shared rounding. The answer is the best episode.
  """
  source = np.random.default_rng(seed)
  agent, update = _agent(seed, hidden, actor_rate, critic_rate, tau)
  text = problem.draw(source, rows)
  past, best, mean, std = [], np.inf, None, noise
  yield problem.fit(np.full(len(problem.sublayers.units), problem.keep))
  while True:
    warm = problem.used >= warmup * problem.tokens
    ratio_S, states, actions = _walk(
      problem, source, agent.params['actor'] if warm else None, hidden, std
    )
    counts = problem.fit(ratio_S)
    loss = float(problem.score([counts], text)[0])
    if loss < best:
      best = loss
      yield counts
    if np.isfinite(loss):
      mean = -loss if mean is None else 0.95 * mean - 0.05 * loss
      past.append((states, actions, -loss - mean))
    if warm and past:
      std *= decay
      agent = update(agent, _sampled(source, past[-memory:], len(actions)))


def _walk(problem, source, actor, hidden, std):
  """One episode: ratios [S], states [S+1,8], actions [S], front to back."""
  sublayers, min_ratio = problem.sublayers, problem.min_ratio
  cost_S = sublayers.units * sublayers.unit_cost
  lowest_S = np.maximum(min_ratio, sublayers.floor / sublayers.units)
  order = np.arange(len(cost_S)).reshape(2, -1).T.reshape(-1)
  ratio_S, states, actions, last = lowest_S.copy(), [], [], 1.0
  total = cost_S.sum()
  for t, s in enumerate(order):
    rest = order[t + 1 :]
    state = (
      t / len(order),
      s < sublayers.layers,
      sublayers.units[s] / sublayers.units.max(),
      sublayers.unit_cost[s] / sublayers.unit_cost.max(),
      cost_S[s] / cost_S.max(),
      (1.0 - ratio_S[order[:t]]) @ cost_S[order[:t]] / total,
      cost_S[rest].sum() / total,
      last,
    )
    states.append(np.array(state, np.float32))
    centre = problem.keep if actor is None else _act(hidden)(actor, states[-1])
    action = _truncated(source, float(centre), std, min_ratio)
    others = ratio_S @ cost_S - ratio_S[s] * cost_S[s]
    most = (problem.limit - others) / cost_S[s]
    last = float(np.clip(action, lowest_S[s], max(most, lowest_S[s])))
    ratio_S[s] = min(last, 1.0)
    actions.append(ratio_S[s])
  return ratio_S, np.array([*states, states[-1]]), np.array(actions, np.float32)


def _truncated(source, centre, std, min_ratio):
  """A normal draw from [min_ratio, 1]."""
  for _ in range(100):
    value = source.normal(centre, std)
    if min_ratio <= value <= 1.0:
      return value
  return float(np.clip(centre, min_ratio, 1.0))


def _sampled(source, past, updates):
  """Transitions for so many updates, [U,64] each, of all episodes alike."""
  states, actions, rewards = (np.stack(x) for x in zip(*past, strict=True))
  steps = actions.shape[1]
  episode = source.integers(len(past), size=(updates, _BATCH))
  step = source.integers(steps, size=(updates, _BATCH))
  return (
    states[episode, step],
    actions[episode, step],
    rewards[episode].astype(np.float32),
    states[episode, step + 1],
    step == steps - 1,
  )


@functools.cache
def _act(hidden):
  """(actor, state) -> ratio in (0, 1)."""
  net = Mlp(hidden)
  return jax.jit(lambda params, x: jax.nn.sigmoid(net.apply(params, x)))


def _agent(seed, hidden, actor_rate, critic_rate, tau):
  """A new agent, and (agent, transitions) -> agent."""
  net, act = Mlp(hidden), _act(hidden)
  keys = jax.random.split(jax.random.key(seed))
  params = {
    'actor': net.init(keys[0], jnp.zeros(_STATE)),
    'critic': net.init(keys[1], jnp.zeros(_STATE + 1)),
  }
  optim = optax.multi_transform(
    {'actor': optax.adam(actor_rate), 'critic': optax.adam(critic_rate)},
    {'actor': 'actor', 'critic': 'critic'},
  )

  def value(critic, state, action):
    pair = jnp.concatenate([state, action[..., None]], axis=-1)
    return net.apply(critic, pair)

  def loss(params, target, batch):
    state, action, reward, after, last = batch
    then = value(target['critic'], after, act(target['actor'], after))
    aim = reward + jnp.where(last, 0.0, then)
    error = value(params['critic'], state, action) - aim
    fixed = jax.lax.stop_gradient(params['critic'])
    gain = value(fixed, state, act(params['actor'], state))
    return jnp.mean(jnp.square(error)) - jnp.mean(gain)

  def step(agent, batch):
    grads = jax.grad(loss)(agent.params, agent.target, batch)
    change, opt_state = optim.update(grads, agent.opt_state, agent.params)
    params = optax.apply_updates(agent.params, change)
    target = optax.incremental_update(params, agent.target, tau)
    return Agent(params, target, opt_state), None

  @jax.jit
  def update(agent, batches):
    return jax.lax.scan(step, agent, batches)[0]

  return Agent(params, params, optim.init(params)), update
