"""The search: one state, one jitted step, a generator of both.

A step proposes N candidates at the stage's sparsity, scores them on the same
tokens through masks, and updates the policy. What the loss says about the
units that each sublayer would get back next reaches the policy as the gradient
of the reward with respect to the priorities, through the projection.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import allocation, curriculum, masks, policy
from ffp_jax.pruning.reward import reward as reward_of
from ffp_jax.pruning.sublayers import Sublayers
from ffp_jax.runtime import device_memory
from ffp_jax.runtime.sharding import map_candidates

# What `policy.update` takes by name, straight from the configuration.
_UPDATE_KEYS = (
  'epochs',
  'clip',
  'score_weight',
  'pathwise_weight',
  'value_weight',
  'entropy_weight',
)


class RewardText(NamedTuple):
  """What candidates are scored on."""

  rows_RxT: np.ndarray  # tokens
  dense_R: np.ndarray  # mean loss of the dense model on each row


class Elites(NamedTuple):
  """The best candidates of the current stage."""

  reward_M: jax.Array  # -inf where empty
  priority_MxS: jax.Array


class SearchState(NamedTuple):
  """All that a search needs to go on; one pytree."""

  params: dict
  opt_state: tuple
  key: jax.Array
  step: jax.Array
  elites: Elites


def count_gradient(mask_gradient: Masks, rank: Masks, count_S, *, window):
  """d loss / d count, from the mask gradients of the units next to come back.

  The masked forward runs removed units too, so what they would bring is
  known. What is kept has settled, calibrated or trained, where the loss is
  flat in its masks: a unit's gradient falls from that at mask 0 to about zero
  at 1, and its mean on the way is half of it. A unit kept in part, as whole
  attention groups are while the search goes on, has the gradient it has.

  Args:
    mask_gradient: d loss / d mask, [L,K] and [L,F].
    rank: of the units.
    count_S: what the masks keep, see `masks.from_counts`; [S].
    window: units to average, as a share of the sublayer's; at least one.

  Returns:
    float32 [S].
  """

  def mean(gradient, rank, count_L):
    units = rank.shape[-1]
    # Of a sublayer that keeps all of its units, the last.
    first = jnp.minimum(jnp.floor(count_L), units - 1.0)[:, None]
    near = (rank >= first) & (rank < first + max(1, round(window * units)))
    way = jnp.where(rank == first, 1.0, 0.5)
    return jnp.sum(near * way * gradient, -1) / jnp.sum(near, -1)

  halves = zip(mask_gradient, rank, jnp.split(count_S, 2), strict=True)
  return jnp.concatenate([mean(*half) for half in halves])


def score_candidate(
  priority_S,
  target,
  device_sublayers,
  loss_of,
  dense_nll,
  *,
  min_ratio,
  window,
  repair,
):
  """Reward of one candidate and its gradient.

  Candidates are scored before their counts are rounded, which keeps the
  budget and lets whole attention groups come and go by degrees. A group that
  is worth what it costs is kept by more than half, so rounding is right.

  Args:
    priority_S: the proposal.
    target: the budget.
    device_sublayers: what may be removed.
    loss_of: Masks -> mean loss on this step's tokens.
    dense_nll: the dense model's mean loss on the same tokens.
    min_ratio: smallest ratio a priority can ask for.
    window: of `count_gradient`; None to leave the gradient out.
    repair: see `allocation.project`.

  Returns:
    (reward, d reward / d priority [S]); zeros where the loss isn't finite, or
    the gradient is left out.
  """

  def project(priority_S):
    return allocation.project(
      priority_S, target, device_sublayers, min_ratio=min_ratio, repair=repair
    )

  if window is None:
    count_S = project(priority_S) * device_sublayers.units_S
    nll = loss_of(masks.from_counts(device_sublayers.rank, count_S))
    return reward_of(dense_nll, nll), jnp.zeros_like(priority_S)
  ratio_S, pull_back = jax.vjp(project, priority_S)
  count_S = ratio_S * device_sublayers.units_S
  nll, gradient = jax.value_and_grad(loss_of)(
    masks.from_counts(device_sublayers.rank, count_S)
  )
  reward, slope = jax.value_and_grad(lambda x: reward_of(dense_nll, x))(nll)
  per_count_S = count_gradient(
    gradient, device_sublayers.rank, count_S, window=window
  )
  (ascent_S,) = pull_back(slope * per_count_S * device_sublayers.units_S)
  known = jnp.isfinite(nll) & jnp.all(jnp.isfinite(ascent_S))
  return reward, jnp.where(known, ascent_S, 0.0)


def update_elites(elites: Elites, reward_N, priority_NxS) -> Elites:
  """The best of the elites and these candidates."""
  reward = jnp.concatenate([elites.reward_M, reward_N])
  priority = jnp.concatenate([elites.priority_MxS, priority_NxS])
  best, index = jax.lax.top_k(reward, len(elites.reward_M))
  return Elites(best, priority[index])


def clear_elites(state: SearchState) -> SearchState:
  """Drops the elites: an easier stage must not outlive a harder one."""
  empty = jnp.full_like(state.elites.reward_M, -jnp.inf)
  return state._replace(elites=state.elites._replace(reward_M=empty))


@functools.partial(jax.jit, static_argnames=('net', 'optim', 'size'))
def init(key, net, optim, prior_S, *, size: int) -> SearchState:
  """A search that starts from the priorities `prior_S`.

  Args:
    key: PRNG key, typed.
    net: the `policy.Policy`.
    optim: from `policy.optimizer`.
    prior_S: the first mean.
    size: number of elites.
  """
  key, init_key = jax.random.split(key)
  params = policy.init(net, init_key, prior_S)
  elites = Elites(
    jnp.full((size,), -jnp.inf, jnp.float32),
    jnp.zeros((size, len(prior_S))),
  )
  return SearchState(
    params, optim.init(params), jax.random.key_data(key), jnp.int32(0), elites
  )


def initial_priorities(sublayers: Sublayers, attention: float) -> np.ndarray:
  """First priorities: 0 for FFN sublayers, `attention` for attention sublayers.

  With few key/value groups, removing a group is dear; a positive number
  starts close to pruning the FFN alone.
  """
  L = sublayers.layers
  return np.repeat(np.array([attention, 0.0], np.float32), L)


def make_policy(config, sublayers: Sublayers):
  """The policy and its optimiser, as `config` asks for them."""
  c = config.policy
  steps = sum(config.search.steps) * c.epochs
  optim = policy.optimizer(
    learning_rate=c.learning_rate,
    network_learning_rate=c.network_learning_rate,
    decay=c.adam_decay,
    steps=max(1, steps),
    max_norm=c.max_norm,
  )
  return policy.Policy(len(sublayers.units), tuple(c.hidden), c.std), optim


def make_step(net, optim, nll: Callable, config, block: int) -> Callable:
  """The jitted search step.

  Args:
    net, optim: from `network`.
    nll: (params, tokens [B,T], Masks or None) -> losses [B].
    config: of the run.
    block: candidates that each part of the mesh scores at once.

  Returns:
    (state, model params, tokens [B,T], loss of the dense model on them,
    Target, Modules) -> (state, metrics); compiled once for each shape of the
    tokens.
  """
  c = config.search
  weights = {name: config.policy[name] for name in _UPDATE_KEYS}

  def propose(params, sparsity):
    return net.apply({'params': params}, sparsity)

  def step(
    state, model_params, tokens_BxT, dense_nll, target, device_sublayers
  ):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    proposal = propose(state.params, target.sparsity)
    priority, noise = policy.sample(
      key, proposal, c.candidates, antithetic=c.antithetic
    )

    def score_one(priority_S):
      return score_candidate(
        priority_S,
        target,
        device_sublayers,
        lambda masks: jnp.mean(nll(model_params, tokens_BxT, masks)),
        dense_nll,
        min_ratio=c.min_ratio,
        window=c.window if config.policy.pathwise_weight else None,
        repair=c.repair,
      )

    reward, gradient = map_candidates(score_one, priority, block=block)
    batch = policy.Batch(
      priority,
      noise,
      policy.log_prob(proposal, priority),
      proposal.value,
      reward,
      gradient,
    )
    params, opt_state, terms = policy.update(
      state.params,
      state.opt_state,
      batch,
      target.sparsity,
      apply=propose,
      optim=optim,
      **weights,
    )
    elites = update_elites(state.elites, reward, priority)
    metrics = {
      'reward_mean': jnp.mean(reward),
      'reward_max': jnp.max(reward),
      'best_reward': elites.reward_M[0],
      **terms,
    }
    new = SearchState(params, opt_state, state.key, state.step + 1, elites)
    return new, metrics

  return jax.jit(step)


def initial_state(config, sublayers: Sublayers) -> SearchState:
  """The state of a search that has taken no step."""
  net, optim = make_policy(config, sublayers)
  first = initial_priorities(sublayers, config.search.attention_prior)
  key, size = jax.random.key(config.seed), config.search.finalists
  return init(key, net, optim, first, size=size)


def steps(config, sublayers, device_sublayers, nll, model_params, text, state):
  """Searches from a state to the end of the curriculum.

  Logging and checkpoints are the caller's loop.

  Args:
    config: of the run.
    sublayers, device_sublayers: what may be removed.
    nll: as `make_step` takes it.
    model_params: of the dense decoder.
    text: a `RewardText`.
    state: from `start`, or yielded after any step of the same search.

  Yields:
    (state after a step, its metrics as plain numbers); `compilations` counts
    those of the step since this generator began.
  """
  net, optim = make_policy(config, sublayers)
  plan = curriculum.stages(config)
  step_fn, made = _step_that_fits(
    functools.partial(make_step, net, optim, nll, config),
    config,
    *(
      state,
      model_params,
      allocation.make_target(sublayers, plan[-1].sparsity),
      device_sublayers,
    ),
  )
  for step in range(int(state.step), curriculum.boundaries(plan)[-1]):
    begun = time.perf_counter()
    index, stage, starts = curriculum.stage_at(plan, step)
    tokens, dense = (
      curriculum.reward_rows(x, step, stage.rows, config.seed) for x in text
    )
    state, metrics = step_fn(
      clear_elites(state) if starts else state,
      model_params,
      tokens,
      np.float32(np.mean(dense)),
      allocation.make_target(sublayers, stage.sparsity),
      device_sublayers,
    )
    yield (
      state,
      {
        'step': step,
        'stage': index,
        'sparsity': stage.sparsity,
        'candidates': config.search.candidates,
        'reward_tokens': tokens.size,
        **{name: x.item() for name, x in jax.device_get(metrics).items()},
        'seconds': round(time.perf_counter() - begun, 3),
        'compilations': sum(f._cache_size() for f in made),
      },
    )


def _step_that_fits(
  make, config, state, model_params, target, device_sublayers
):
  """Returns the step with a block that fits, if none is configured."""
  c = config.search
  tokens = np.zeros((max(c.rows), c.context), np.int32)
  block = c.block or device_memory.largest_block(
    make(1),
    c.candidates,
    *(state, model_params, tokens, np.float32(0.0), target, device_sublayers),
  )
  return device_memory.halve_on_oom(make, block)


def search_cost(config, plan) -> dict:
  """What the steps of a plan take.

  A backward pass, which the score function does without, counts as two
  forward ones.
  """
  c = config.search
  passes = 3 if config.policy.pathwise_weight else 1
  tokens = sum(stage.steps * stage.rows for stage in plan) * c.context
  return {
    'candidates_evaluated': c.candidates * sum(stage.steps for stage in plan),
    'tokens_evaluated': tokens * passes * c.candidates,
  }


def finalists(config, sublayers: Sublayers, state: SearchState) -> np.ndarray:
  """Priorities worth re-scoring: the policy's mean and the elites, [M,S]."""
  net, _ = make_policy(config, sublayers)
  sparsity = jnp.float32(config.budget.sparsity)
  proposal = net.apply({'params': state.params}, sparsity)
  known = np.isfinite(state.elites.reward_M)
  elites_MxS = np.asarray(state.elites.priority_MxS)[known]
  return np.concatenate([np.asarray(proposal.mean_S)[None], elites_MxS])
