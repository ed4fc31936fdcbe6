"""AMC: a DDPG agent that visits the sublayers and gives each its ratio.

Source: He et al., arXiv 1802.03494, algorithm 1 and its authors' settings;
DDPG, arXiv 1509.02971.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffp_jax.baselines.problem import Problem

_STATE_SIZE = 8  # features of a sublayer when it is visited
_BATCH_SIZE = 64  # transitions per update


class Mlp(nn.Module):
  """Two hidden layers and one output, which is small at first."""

  hidden: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(2):
      x = nn.relu(nn.Dense(self.hidden)(x))
    init = nn.initializers.uniform(6e-3)
    return nn.Dense(1, kernel_init=init)(x)[..., 0]


class Agent(NamedTuple):
  """The learnt state of DDPG.

  Attributes:
    params: of 'actor' and 'critic'.
    target: moving averages of them, the target networks.
    opt_state: of both optimisers.
  """

  params: Any
  target: Any
  opt_state: Any


def amc(
  problem: Problem,
  seed: int,
  *,
  hidden: int = 300,
  actor_rate: float = 1e-4,
  critic_rate: float = 1e-3,
  tau: float = 0.01,
  noise: float = 0.5,
  decay: float = 0.95,
  warmup: float = 0.25,
  memory: int = 100,
  rows: int = 4,
) -> Iterator[np.ndarray]:
  """Runs deep deterministic policy gradient, one sublayer per action.

  The action is a sublayer's ratio, bounded so that the sublayers still to
  come can meet the budget at their lowest (algorithm 1). The reward of all
  steps of an episode is minus its loss, less a moving mean. Departs from the
  paper in that actions are drawn around the target instead of from all of
  [0, 1] while the replay memory fills, that every episode has the same text,
  and that the shared rounding spends what an episode leaves over.

  Args:
    problem: scores the episodes.
    seed: seeds all draws and the networks.
    hidden: width of the hidden layers of actor and critic.
    actor_rate: learning rate of the actor.
    critic_rate: learning rate of the critic.
    tau: share by which the target networks move per update.
    noise: initial standard deviation of an action.
    decay: factor of the standard deviation per episode after the warm-up.
    warmup: share of the token budget before the first update.
    memory: number of episodes in the replay memory.
    rows: rows of reward text.

  Yields:
    The uniform counts [S], then those of each best episode so far.
  """
  rng = np.random.default_rng(seed)
  agent, update = _make_agent(seed, hidden, actor_rate, critic_rate, tau)
  text = problem.draw(rng, rows)
  past, best, mean, std = [], np.inf, None, noise
  yield problem.round_ratios(
    np.full(len(problem.sublayers.units), problem.keep)
  )
  while True:
    warm = problem.used >= warmup * problem.tokens
    ratio_S, states, actions = _run_episode(
      problem, rng, agent.params['actor'] if warm else None, hidden, std
    )
    counts = problem.round_ratios(ratio_S)
    loss = float(problem.score([counts], text)[0])
    if loss < best:
      best = loss
      yield counts
    if np.isfinite(loss):
      mean = -loss if mean is None else 0.95 * mean - 0.05 * loss
      past.append((states, actions, -loss - mean))
    if warm and past:
      std *= decay
      batches = _sample_batches(rng, past[-memory:], len(actions))
      agent = update(agent, batches)


def _run_episode(
  problem: Problem,
  rng: np.random.Generator,
  actor: Any,
  hidden: int,
  std: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Visits all sublayers, front to back.

  Args:
    problem: the budget and the sublayers.
    rng: draws the actions.
    actor: parameters of the actor; None draws around the target ratio.
    hidden: width of the actor's hidden layers.
    std: standard deviation of an action.

  Returns:
    (ratios [S], states [S+1,8] and actions [S] in the order of the visits).
  """
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
    centre = (
      problem.keep if actor is None else _make_actor(hidden)(actor, states[-1])
    )
    action = _truncated(rng, float(centre), std, min_ratio)
    others = ratio_S @ cost_S - ratio_S[s] * cost_S[s]
    most = (problem.limit - others) / cost_S[s]
    last = float(np.clip(action, lowest_S[s], max(most, lowest_S[s])))
    ratio_S[s] = min(last, 1.0)
    actions.append(ratio_S[s])
  return ratio_S, np.array([*states, states[-1]]), np.array(actions, np.float32)


def _truncated(rng, centre, std, min_ratio):
  """Draws from a normal distribution, truncated to [min_ratio, 1]."""
  for _ in range(100):
    value = rng.normal(centre, std)
    if min_ratio <= value <= 1.0:
      return value
  return float(np.clip(centre, min_ratio, 1.0))


def _sample_batches(rng, past: list[tuple], updates: int) -> tuple:
  """Draws the transitions of some updates, uniformly from all episodes.

  Args:
    rng: draws.
    past: (states, actions, reward) of each episode.
    updates: number of batches, U.

  Returns:
    (states [U,64,8], actions, rewards, next states, whether a transition is
    the last of its episode), all [U,64] but for the states.
  """
  states, actions, rewards = (np.stack(x) for x in zip(*past, strict=True))
  steps = actions.shape[1]
  episode = rng.integers(len(past), size=(updates, _BATCH_SIZE))
  step = rng.integers(steps, size=(updates, _BATCH_SIZE))
  return (
    states[episode, step],
    actions[episode, step],
    rewards[episode].astype(np.float32),
    states[episode, step + 1],
    step == steps - 1,
  )


@functools.cache
def _make_actor(hidden: int) -> Callable:
  """Returns the jitted actor: (params, states [...,8]) -> ratios in (0, 1)."""
  net = Mlp(hidden)

  @jax.jit
  def act(params, state: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(jnp.asarray(net.apply(params, state)))

  return act


def _make_agent(
  seed: int, hidden: int, actor_rate: float, critic_rate: float, tau: float
) -> tuple[Agent, Callable]:
  """Returns a new agent and its jitted updates, (agent, batches) -> agent.

  The critic learns reward + target value of the next state (DDPG, eq. 4 and
  5, no discount), the actor ascends the critic's value (eq. 6).
  """
  net, act = Mlp(hidden), _make_actor(hidden)
  keys = jax.random.split(jax.random.key(seed))
  params = {
    'actor': net.init(keys[0], jnp.zeros(_STATE_SIZE)),
    'critic': net.init(keys[1], jnp.zeros(_STATE_SIZE + 1)),
  }
  optim = optax.multi_transform(
    {'actor': optax.adam(actor_rate), 'critic': optax.adam(critic_rate)},
    {'actor': 'actor', 'critic': 'critic'},
  )

  def value(critic, state, action):
    pair = jnp.concatenate([state, action[..., None]], axis=-1)
    return net.apply(critic, pair)

  def loss(params, target, batch):
    state, action, reward, next_state, last = batch
    next_action = act(target['actor'], next_state)
    next_value = value(target['critic'], next_state, next_action)
    goal = reward + jnp.where(last, 0.0, next_value)
    error = value(params['critic'], state, action) - goal
    fixed = jax.lax.stop_gradient(params['critic'])
    actor_value = value(fixed, state, act(params['actor'], state))
    return jnp.mean(jnp.square(error)) - jnp.mean(actor_value)

  def step(agent, batch):
    grads = jax.grad(loss)(agent.params, agent.target, batch)
    updates, opt_state = optim.update(grads, agent.opt_state, agent.params)
    params = optax.apply_updates(agent.params, updates)
    target = optax.incremental_update(params, agent.target, tau)
    return Agent(params, target, opt_state), None

  @jax.jit
  def update(agent, batches):
    return jax.lax.scan(step, agent, batches)[0]

  return Agent(params, params, optim.init(params)), update
