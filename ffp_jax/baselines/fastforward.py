"""FastForward Pruning: as this package has it, and as its authors published.

Source of both: arXiv 2511.18977.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffp_jax import config as config_lib
from ffp_jax import curriculum, policy, search
from ffp_jax.baselines.problem import Problem

_LOWEST = 0.1  # ratio, of the published action space


def shipped(problem: Problem, seed: int, *, config):
  """`search.steps` with the numbers of steps that the budget pays for.

  The shares of the stages stay; the finalists are re-scored on the whole
  reward text, as in `prune.rescore`, where that leaves as many steps as are
  configured. Until then the incumbent is the policy's mean.

  Args:
    problem: what scores.
    seed: of the search.
    config: of a run of `prune.py`; its seed, sparsity and steps are not used.
  """
  config = config.copy_and_resolve_references()
  config.seed, config.budget.sparsity = seed, problem.sparsity
  prior = config.search.attention_prior
  yield problem.project(search.prior(problem.sites, prior))
  if config_lib.refits(config):
    problem = problem.refit()
  whole = problem.rows_RxT.size
  room = problem.left - whole
  spare = room - (1 + config.search.remember) * whole
  enough = search.cost(config, curriculum.plan(config))['tokens_evaluated']
  config.search.steps = _affordable(config, spare if spare >= enough else room)
  if not sum(config.search.steps):
    return
  dense = problem.losses([problem.sites.units], problem.rows_RxT)[0]
  steps = search.steps(
    config,
    problem.sites,
    problem.modules,
    problem.nll,
    problem.params,
    search.RewardText(problem.rows_RxT, dense),
    search.start(config, problem.sites),
  )
  # Each is charged before it is taken.
  for tokens in _costs(config):
    problem.charge(tokens)
    state, _ = next(steps)
    found = search.finalists(config, problem.sites, state)
    yield problem.project(found[0])
  counts = list({tuple(c): c for c in map(problem.project, found)}.values())
  yield counts[np.argmin(problem.score(counts, problem.rows_RxT))]


def _affordable(config, tokens: int) -> tuple[int, ...]:
  """The configured steps, scaled to what `tokens` pay for.

  What is left by rounding goes to the last stage.
  """

  def cost(stages):
    return search.cost(config, stages)['tokens_evaluated']

  plan = curriculum.plan(config)
  scale = max(0, tokens) / cost(plan)
  scaled = [stage._replace(steps=int(scale * stage.steps)) for stage in plan]
  rest = max(0, tokens) - cost(scaled)
  *steps, last = (stage.steps for stage in scaled)
  return *steps, last + rest // cost([plan[-1]._replace(steps=1)])


def _costs(config) -> list[int]:
  """Tokens of each step."""
  out = []
  for stage in curriculum.plan(config):
    one = [stage._replace(steps=1)]
    out += stage.steps * [search.cost(config, one)['tokens_evaluated']]
  return out


def published(
  problem: Problem,
  seed: int,
  *,
  candidates: int,
  std: float,
  learning_rate: float,
  hidden: tuple[int, ...],
  epochs: int,
  clip: float,
  entropy: float,
  stages: int,
  first_share: float,
  exact: bool,
):
  """The search as published: plain PPO on actions cut to [0.1, 1].

  A ratio is the absolute value of an action, clipped; `meet` brings the
  ratios to the budget. The sparsity climbs to the target in equal stairs,
  the share of the reward text from `first_share` to all along a cube. The
  answer is the proposal of the last stair with the largest reward, before
  that the mean. Departs in that both schedules run over the budget of
  tokens instead of episodes, that no step takes more than half a stair's
  tokens, so that a small budget gets to the last stair too, and that the
  network is `policy.Policy`. With `exact`, actions are the priorities of
  `Problem.project` in the place of `meet`.
  """
  cut = Problem.project if exact else meet
  source = np.random.default_rng(seed)
  zeros_S = jnp.zeros(len(problem.start_S))
  net = policy.Policy(len(zeros_S), tuple(hidden), std)
  optim = optax.adam(learning_rate)
  params = policy.init(net, jax.random.key(seed), zeros_S)
  opt_state = optim.init(params)
  sample, update = _ppo(
    lambda params, sparsity: net.apply({'params': params}, sparsity),
    optim=optim,
    epochs=epochs,
    clip=clip,
    entropy_weight=entropy,
  )

  row_tokens = candidates * problem.rows_RxT.shape[1]
  most = max(1, problem.tokens // (2 * stages * row_tokens))
  best = math.inf
  yield cut(problem, zeros_S)
  while True:
    progress = problem.used / problem.tokens
    stair = min(stages, 1 + int(progress * stages))
    easier = problem.at(problem.sparsity * stair / stages)
    share = first_share + (1.0 - first_share) * progress**3
    count = min(most, math.ceil(share * len(problem.rows_RxT)))
    rows = problem.draw(source, count)
    noise = source.standard_normal((candidates, len(zeros_S)), np.float32)
    sparsity = jnp.float32(easier.sparsity)
    proposal, action, log_prob = sample(params, sparsity, noise)
    counts = [cut(easier, row) for row in action]
    losses = problem.score(counts, rows)
    reward = jnp.asarray(10.0 * np.exp(-losses), jnp.float32)
    batch = policy.Batch(action, noise, log_prob, reward, 0.0 * action)
    params, opt_state = update(params, opt_state, batch, sparsity)
    if stair < stages:
      yield cut(problem, proposal.mean_S)
    elif losses.min() < best:
      best = losses.min()
      yield counts[int(losses.argmin())]


def _ppo(propose, **settings):
  """Plain PPO, jitted: what samples a batch of actions and what learns.

  Args:
    propose: (params, sparsity) -> `policy.Proposal`.
    **settings: of `policy.update`, but for the weights of the other terms.
  """

  @jax.jit
  def sample(params, sparsity, noise_NxS):
    proposal = propose(params, sparsity)
    action_NxS = policy.act(proposal, noise_NxS)
    return proposal, action_NxS, policy.log_prob(proposal, action_NxS)

  @jax.jit
  def update(params, opt_state, batch, sparsity):
    return policy.update(
      params,
      opt_state,
      batch,
      sparsity,
      apply=propose,
      score_weight=1.0,
      pathwise_weight=0.0,
      value_weight=0.5,
      **settings,
    )[:2]

  return sample, update


def meet(problem: Problem, action_S) -> np.ndarray:
  """Actions to counts, as published.

  What the budget leaves over is spread over the modules in proportion to
  what they lack; what is too much is cut from the first layer on, each
  module down to the lowest ratio, until the budget is met.
  """
  ratio_S = np.clip(np.abs(np.asarray(action_S, np.float64)), _LOWEST, 1.0)
  cost_S = problem.sites.units * problem.sites.unit_cost
  over = ratio_S @ cost_S - problem.limit
  if over < 0:
    lack_S = 1.0 - ratio_S
    return problem.fit(ratio_S - over * lack_S / (lack_S @ cost_S))
  for s in np.arange(len(ratio_S)).reshape(2, -1).T.reshape(-1):
    cut = min(over, (ratio_S[s] - _LOWEST) * cost_S[s])
    ratio_S[s] -= cut / cost_S[s]
    over -= cut
  return problem.fit(ratio_S)
