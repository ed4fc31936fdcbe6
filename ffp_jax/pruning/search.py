"""The search for an allocation: a resumable state and a generator of steps.

A step proposes N candidates at the sparsity of its stage, scores them through
masks on the same tokens (candidate.py), and updates the policy (policy.py).
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ffp_jax.pruning import allocation, curriculum, policy
from ffp_jax.pruning.allocation import DeviceSublayers, Target
from ffp_jax.pruning.candidate import score_candidate
from ffp_jax.pruning.sublayers import Sublayers
from ffp_jax.runtime import device_memory
from ffp_jax.runtime.compiling import BRIEFLY
from ffp_jax.runtime.sharding import map_candidates

# The keyword arguments of `policy.update` that are keys of `config.policy`.
_UPDATE_KEYS = (
  'epochs',
  'clip',
  'score_weight',
  'pathwise_weight',
  'value_weight',
  'entropy_weight',
)


class RewardText(NamedTuple):
  """The text that candidates are scored on; R rows of T tokens."""

  rows_RxT: np.ndarray  # token ids
  dense_R: np.ndarray  # mean loss of the dense model on each row, in nats


class Elites(NamedTuple):
  """The M best candidates of the current stage, best first."""

  reward_M: jax.Array  # float32 [M], -inf where there is none yet
  priority_MxS: jax.Array  # float32 [M,S]


class SearchState(NamedTuple):
  """The complete, resumable state of a search; one pytree of arrays."""

  params: dict  # of the policy, see `policy.init`
  opt_state: optax.OptState
  key: jax.Array  # raw data of the PRNG key; the same through the whole search
  step: jax.Array  # int32 scalar, number of steps taken
  elites: Elites


def update_elites(
  elites: Elites, reward_N: jax.Array, priority_NxS: jax.Array
) -> Elites:
  """Returns the best M of the elites and N new candidates, best first."""
  reward = jnp.concatenate([elites.reward_M, reward_N])
  priority = jnp.concatenate([elites.priority_MxS, priority_NxS])
  best, index = jax.lax.top_k(reward, len(elites.reward_M))
  return Elites(best, priority[index])


def clear_elites(state: SearchState) -> SearchState:
  """Empties the elites, so that an easier stage's rewards do not win."""
  empty = jnp.full_like(state.elites.reward_M, -jnp.inf)
  return state._replace(elites=state.elites._replace(reward_M=empty))


@functools.partial(jax.jit, static_argnames=('net', 'optim', 'size'))
def init(
  key: jax.Array,
  net: policy.Policy,
  optim: optax.GradientTransformation,
  prior_S: np.ndarray,
  *,
  size: int,
) -> SearchState:
  """Returns the state before the first step.

  Args:
    key: typed PRNG key.
    net: the policy.
    optim: its optimiser, from `policy.optimizer`.
    prior_S: the policy's first mean priorities, [S].
    size: number of elites, M.
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
  """Returns the first priorities, float32 [S]: 0 for every FFN sublayer.

  Args:
    sublayers: the prunable sublayers.
    attention: priority of every attention sublayer. Removing a group is dear
      where there are few; a positive number starts close to pruning only FFNs.
  """
  L = sublayers.layers
  return np.repeat(np.array([attention, 0.0], np.float32), L)


def make_policy(
  config: ConfigDict, sublayers: Sublayers
) -> tuple[policy.Policy, optax.GradientTransformation]:
  """Returns the policy and the optimiser configured in `config.policy`."""
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


def make_step(
  net: policy.Policy,
  optim: optax.GradientTransformation,
  nll: Callable,
  config: ConfigDict,
  block: int,
) -> Callable:
  """Makes the jitted search step.

  Args:
    net, optim: from `make_policy`.
    nll: (model params, tokens [B,T], `Masks` or None) -> losses [B].
    config: of the run; `search` and `policy` are read.
    block: number of candidates that each part of the mesh scores at once.

  Returns:
    (`SearchState`, model params, tokens [B,T], mean loss of the dense model on
    them, `Target`, `DeviceSublayers`) -> (`SearchState`, metrics); compiled
    once for each shape of the tokens.
  """
  c = config.search
  propose = functools.partial(policy.propose, net)
  weights = {name: config.policy[name] for name in _UPDATE_KEYS}

  def search_step(
    state: SearchState,
    model_params: dict,
    tokens_BxT: jax.Array,
    dense_nll: jax.Array,
    target: Target,
    device_sublayers: DeviceSublayers,
  ) -> tuple[SearchState, dict]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    proposal = propose(state.params, target.sparsity)
    priority_NxS, noise_NxS = policy.sample(
      key, proposal, c.candidates, antithetic=c.antithetic
    )
    reward_N, gradient_NxS = _score_candidates(
      priority_NxS,
      lambda masks: jnp.mean(nll(model_params, tokens_BxT, masks)),
      *(dense_nll, target, device_sublayers),
      config=config,
      block=block,
    )
    batch = policy.Batch(
      priority_NxS,
      noise_NxS,
      policy.log_prob(proposal, priority_NxS),
      proposal.value,
      reward_N,
      gradient_NxS,
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
    elites = update_elites(state.elites, reward_N, priority_NxS)
    metrics = {
      'reward_mean': jnp.mean(reward_N),
      'reward_max': jnp.max(reward_N),
      'best_reward': elites.reward_M[0],
      **terms,
    }
    new = SearchState(params, opt_state, state.key, state.step + 1, elites)
    return new, metrics

  return jax.jit(search_step, compiler_options=BRIEFLY)


def _score_candidates(
  priority_NxS: jax.Array,
  loss: Callable,
  dense_nll: jax.Array,
  target: Target,
  device_sublayers: DeviceSublayers,
  *,
  config: ConfigDict,
  block: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the rewards [N] of candidates, and their gradients [N,S].

  Args:
    priority_NxS: the candidates.
    loss: `Masks` -> mean loss.
    dense_nll, target, device_sublayers: see `score_candidate`.
    config, block: see `make_step`.
  """
  c = config.search

  def score_one(priority_S):
    return score_candidate(
      priority_S,
      target,
      device_sublayers,
      loss,
      dense_nll,
      min_ratio=c.min_ratio,
      window=c.window if config.policy.pathwise_weight else None,
      repair=c.repair,
    )

  return map_candidates(score_one, priority_NxS, block=block)


def initial_state(config: ConfigDict, sublayers: Sublayers) -> SearchState:
  """Returns the state before the first step of the configured search."""
  net, optim = make_policy(config, sublayers)
  prior_S = initial_priorities(sublayers, config.search.attention_prior)
  key, size = jax.random.key(config.seed), config.search.finalists
  return init(key, net, optim, prior_S, size=size)


def steps(
  config: ConfigDict,
  sublayers: Sublayers,
  device_sublayers: DeviceSublayers,
  nll: Callable,
  model_params: dict,
  text: RewardText,
  state: SearchState,
) -> Iterator[tuple[SearchState, dict]]:
  """Searches from a state to the end of the curriculum, one step per item.

  Every step is determined by the state before it, so a search that is resumed
  from any yielded state goes on exactly as the uninterrupted one. A yielded
  state is never overwritten. Logging and checkpoints are the caller's loop:

    state = initial_state(config, sublayers)
    for state, metrics in steps(..., state):
      print(metrics['step'], metrics['reward_mean'])
    priority_MxS = finalists(config, sublayers, state)

  The state holds the policy's parameters ('mean' and 'log_std' are [S]) and
  their optimiser's state, the PRNG key's data, the int32 number of steps taken,
  and the best M candidates of the stage: rewards [M], priorities [M,S].

  Args:
    config: of the run; `seed`, `budget.sparsity`, `search` and `policy` are
      read.
    sublayers: the S prunable sublayers, from `sublayers.find_sublayers`.
    device_sublayers: the same on the device, from `allocation.to_device`.
    nll: (model params, tokens [B,T], `Masks` or None) -> losses [B], in nats;
      see `loss.make_nll`.
    model_params: first argument of `nll`.
    text: `RewardText` with at least `max(config.search.rows)` rows.
    state: from `initial_state`, or yielded by the same search.

  Yields:
    (state, metrics) after each step that was not taken yet; none if the search
    is over. The metrics are plain numbers: `step` (from 0), `stage` (from 0),
    `sparsity` of the stage, `candidates`, `reward_tokens`, `reward_mean`,
    `reward_max`, `best_reward` of the stage, the terms of `policy.loss`,
    `seconds`, and `compilations` of the step since this generator began.
  """
  net, optim = make_policy(config, sublayers)
  stages = curriculum.stages(config)
  step_fn, compiled = _make_fitting_step(
    functools.partial(make_step, net, optim, nll, config),
    config,
    state,
    model_params,
    allocation.make_target(sublayers, stages[-1].sparsity),
    device_sublayers,
  )
  for step in range(int(state.step), curriculum.boundaries(stages)[-1]):
    start = time.perf_counter()
    index, stage, is_first = curriculum.stage_at(stages, step)
    tokens, dense = (
      curriculum.reward_rows(x, step, stage.rows, config.seed) for x in text
    )
    state, metrics = step_fn(
      clear_elites(state) if is_first else state,
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
        'seconds': round(time.perf_counter() - start, 3),
        'compilations': sum(f._cache_size() for f in compiled),
      },
    )


def _make_fitting_step(
  make: Callable,
  config: ConfigDict,
  state: SearchState,
  model_params: dict,
  target: Target,
  device_sublayers: DeviceSublayers,
) -> tuple[Callable, list]:
  """Makes a step whose block of candidates fits into device memory.

  The block is the configured one, or else the largest that should fit.

  Args:
    make: block -> jitted step, see `make_step`.
    config: of the run.
    state, model_params, target, device_sublayers: arguments of the step.

  Returns:
    See `device_memory.halve_on_oom`.
  """
  c = config.search
  tokens = np.zeros((max(c.rows), c.context), np.int32)
  block = c.block or device_memory.largest_block(
    make(1),
    c.candidates,
    *(state, model_params, tokens, np.float32(0.0), target, device_sublayers),
  )
  return device_memory.halve_on_oom(make, block)


def search_cost(
  config: ConfigDict, stages: Sequence[curriculum.Stage]
) -> dict[str, int]:
  """Returns the number of candidates and tokens that stages evaluate.

  A backward pass counts as two forward passes; the score function alone does
  without it.
  """
  c = config.search
  passes = 3 if config.policy.pathwise_weight else 1
  tokens = sum(stage.steps * stage.rows for stage in stages) * c.context
  return {
    'candidates_evaluated': c.candidates * sum(stage.steps for stage in stages),
    'tokens_evaluated': tokens * passes * c.candidates,
  }


def finalists(
  config: ConfigDict, sublayers: Sublayers, state: SearchState
) -> np.ndarray:
  """Returns the priorities to score again on the whole reward text, [1+M,S].

  The first row is the policy's mean, the others are the elites; empty places
  among the elites are left out.
  """
  net, _ = make_policy(config, sublayers)
  sparsity = jnp.float32(config.budget.sparsity)
  proposal = policy.propose(net, state.params, sparsity)
  filled = np.isfinite(state.elites.reward_M)
  elites_MxS = np.asarray(state.elites.priority_MxS)[filled]
  return np.concatenate([np.asarray(proposal.mean_S)[None], elites_MxS])
