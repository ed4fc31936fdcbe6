import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized

from ffp_jax.pruning import policy

_S = 6
_TARGET = np.array([1.0, -0.5, 0.3, -1.2, 0.8, 0.0], np.float32)
_WEIGHTS = {
  'clip': 0.2,
  'score_weight': 1.0,
  'pathwise_weight': 0.0,
  'value_weight': 0.5,
  'entropy_weight': 0.0,
}


def setUpModule():
  # Tiny arrays: compiling takes far longer than running.
  jax.config.update('jax_disable_most_optimizations', True)


def tearDownModule():
  jax.config.update('jax_disable_most_optimizations', False)


# Not op by op, as each would be compiled on its own.
_normalise = jax.jit(policy.normalise)
_log_prob = jax.jit(policy.log_prob)
_act = jax.jit(policy.reparameterise)
_loss = jax.jit(
  policy.loss,
  static_argnames=(
    'score_weight',
    'pathwise_weight',
    'value_weight',
    'entropy_weight',
  ),
)
_sample = jax.jit(
  functools.partial(policy.sample, antithetic=True), static_argnums=2
)


def _proposal(seed=0, size=_S):
  source = np.random.default_rng(seed)
  return policy.Proposal(
    mean_S=source.standard_normal(size).astype(np.float32),
    log_std_S=source.uniform(-2.0, 1.0, size).astype(np.float32),
    value=np.float32(0.3),
  )


def _batch(seed, candidates=16):
  """A batch that another policy proposed."""
  source = np.random.default_rng(seed)
  old = _proposal(seed + 100)
  new = _proposal(seed)
  # Near enough for some probability ratios to lie within the clip.
  old = old._replace(
    mean_S=new.mean_S + 0.03 * old.mean_S,
    log_std_S=new.log_std_S + 0.03 * old.log_std_S,
  )
  noise_NxS = source.standard_normal((candidates, _S)).astype(np.float32)
  priority_NxS = _act(old, noise_NxS)
  return policy.Batch(
    priority_NxS,
    noise_NxS,
    _log_prob(old, priority_NxS),
    # Some within the clip of the value before, some not.
    new.value + np.float32(0.1 * (seed % 2) - 0.25),
    source.uniform(0.0, 1.0, candidates).astype(np.float32),
    source.standard_normal((candidates, _S)).astype(np.float32),
  )


def _initial(prior_S, *, std=0.3, seed=0):
  net = policy.Policy(size=_S, hidden=(8,), std=std)
  init = jax.jit(lambda key: policy.init(net, key, prior_S))
  params = init(jax.random.key(seed))
  return net, params, lambda p, sparsity: net.apply({'params': p}, sparsity)


class LogProbTest(parameterized.TestCase):
  @parameterized.parameters(*range(5))
  def test_equals_scipy(self, seed):
    proposal = _proposal(seed)
    source = np.random.default_rng(seed)
    x_NxS = 3.0 * source.standard_normal((7, _S)).astype(np.float32)
    expected = scipy.stats.norm.logpdf(
      x_NxS.astype(np.float64), proposal.mean_S, np.exp(proposal.log_std_S)
    )
    np.testing.assert_allclose(
      _log_prob(proposal, x_NxS), expected.sum(-1), rtol=1e-4
    )

  @parameterized.parameters(*range(3))
  def test_entropy_equals_scipy(self, seed):
    proposal = _proposal(seed)
    expected = scipy.stats.norm.entropy(0.0, np.exp(proposal.log_std_S)).sum()
    np.testing.assert_allclose(policy.entropy(proposal), expected, rtol=1e-5)


class SampleTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 7, 8)
  def test_comes_in_antithetic_pairs(self, candidates):
    proposal, pairs = _proposal(), candidates // 2
    priority, noise = _sample(jax.random.key(0), proposal, candidates)
    self.assertEqual(priority.shape, (candidates, _S))
    self.assertEqual(noise.shape, (candidates, _S))
    np.testing.assert_array_equal(noise[:pairs], -noise[pairs : 2 * pairs])
    np.testing.assert_array_equal(noise[2 * pairs :], 0.0)
    # So the sample mean is the mean, however few there are.
    np.testing.assert_allclose(priority.mean(0), proposal.mean_S, atol=1e-5)

  def test_or_each_for_itself(self):
    sample = jax.jit(
      lambda key: policy.sample(key, _proposal(), 15, antithetic=False)
    )
    priority, noise = sample(jax.random.key(0))
    np.testing.assert_allclose(priority, _act(_proposal(), noise), rtol=1e-5)
    # No two are opposite, none is the mean.
    self.assertGreater(np.abs(noise[:, None] + noise).max(-1).min(), 0.1)

  def test_is_mean_and_std_times_noise(self):
    proposal = _proposal(1)
    priority, noise = _sample(jax.random.key(1), proposal, 8)
    np.testing.assert_allclose(
      priority,
      proposal.mean_S + np.exp(proposal.log_std_S) * np.asarray(noise),
      rtol=1e-5,
      atol=1e-6,
    )
    np.testing.assert_array_equal(priority, _act(proposal, noise))

  def test_noise_is_standard_normal(self):
    _, noise = _sample(jax.random.key(2), _proposal(), 4000)
    half = np.asarray(noise)[:2000].flatten()
    self.assertGreater(scipy.stats.kstest(half, 'norm').pvalue, 1e-3)

  def test_follows_the_key(self):
    first, again, other = (
      _sample(jax.random.key(i), _proposal(), 8)[0] for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    self.assertGreater(np.abs(first - other).min(), 0.0)


class InitTest(parameterized.TestCase):
  @parameterized.parameters((), (16, 5))
  def test_the_mean_is_the_prior_at_every_sparsity(self, *hidden):
    net = policy.Policy(size=_S, hidden=hidden, std=0.7)
    params = jax.jit(lambda key: policy.init(net, key, _TARGET))(
      jax.random.key(0)
    )
    propose = jax.jit(lambda sparsity: net.apply({'params': params}, sparsity))
    self.assertEqual(params['mean'].dtype, jnp.float32)
    for sparsity in (0.0, 0.05, 0.2, 0.5, 0.99):
      got = propose(sparsity)
      np.testing.assert_array_equal(got.mean_S, _TARGET)
      np.testing.assert_allclose(np.exp(got.log_std_S), 0.7, rtol=1e-6)
      self.assertEqual(got.value.shape, ())
      self.assertTrue(np.isfinite(got.value))

  def test_the_mean_can_come_to_depend_on_the_sparsity(self):
    _, params, apply = _initial(np.zeros(_S))

    def difference(params):
      means = [apply(params, jnp.float32(x)).mean_S for x in (0.1, 0.5)]
      return jnp.sum(means[1] - means[0])

    grads = jax.jit(jax.grad(difference))(params)
    self.assertGreater(np.abs(grads['add']['kernel']).max(), 0.0)


class NormaliseTest(parameterized.TestCase):
  def test_has_mean_0_and_deviation_1(self):
    source = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e3):
      got = _normalise(scale * source.standard_normal(10) + 5.0)
      self.assertAlmostEqual(float(np.mean(got)), 0.0, places=2)
      self.assertAlmostEqual(float(np.std(got)), 1.0, places=2)

  @parameterized.parameters(0.0, 0.1, 0.3, 0.7, 0.9, 1.1, 123.4, -0.6, 1e-9)
  def test_equal_rewards_have_no_advantage(self, reward):
    # Their float32 mean may miss them by a rounding, which isn't a signal.
    # Exactly 0, as Adam turns the smallest gradient into a whole step.
    for candidates in (2, 3, 5, 10):
      got = _normalise(np.full(candidates, reward, np.float32))
      np.testing.assert_array_equal(got, 0.0, f'{candidates} candidates')


def _numpy_loss(proposal, batch, *, clip):
  """Each term of the loss, in float64 and one candidate at a time."""
  mean, log_std = (
    np.asarray(x, np.float64) for x in (proposal.mean_S, proposal.log_std_S)
  )
  priority, noise, old, before, reward, gradient = (
    np.asarray(x, np.float64) for x in batch
  )
  advantage = (reward - before) - (reward - before).mean()
  advantage /= (reward - before).std()
  value = float(proposal.value)
  near = before + min(max(value - before, -clip), clip)
  objective, moved, misses, moves = [], [], [], []
  for n in range(len(reward)):
    new = scipy.stats.norm.logpdf(priority[n], mean, np.exp(log_std)).sum()
    ratio = np.exp(new - old[n])
    bounded = min(max(ratio, 1 - clip), 1 + clip)
    objective.append(min(ratio * advantage[n], bounded * advantage[n]))
    moved.append(gradient[n] @ (mean + np.exp(log_std) * noise[n]))
    misses.append(max((value - reward[n]) ** 2, (near - reward[n]) ** 2))
    moves.append(ratio - 1.0 - np.log(ratio))
  return {
    'loss_score': -np.mean(objective),
    'loss_pathwise': -np.mean(moved),
    'loss_value': np.mean(misses),
    'approx_kl': np.mean(moves),
    'entropy': np.sum(log_std) + _S / 2 * np.log(2 * np.pi * np.e),
  }


def _loss_gradient(proposal, batch, weights):
  gradient = jax.grad(lambda p: policy.loss(p, batch, **weights)[0])
  return jax.jit(gradient)(proposal)


class LossTest(parameterized.TestCase):
  @parameterized.product(seed=(0, 1, 2, 3), clip=(0.05, 0.2))
  def test_equals_numpy(self, seed, clip):
    proposal, batch = _proposal(seed), _batch(seed)
    weights = {
      'score_weight': 0.7,
      'pathwise_weight': 1.3,
      'value_weight': 0.4,
      'entropy_weight': 0.05,
    }
    total, terms = _loss(proposal, batch, clip=clip, **weights)
    expected = _numpy_loss(proposal, batch, clip=clip)
    self.assertEqual(terms.keys(), expected.keys())
    for name, value in expected.items():
      np.testing.assert_allclose(terms[name], value, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
      total,
      0.7 * expected['loss_score']
      + 1.3 * expected['loss_pathwise']
      + 0.4 * expected['loss_value']
      - 0.05 * expected['entropy'],
      rtol=1e-3,
      atol=1e-3,
    )

  def test_random_batches_lie_on_both_sides_of_the_clip(self):
    # Else the test above would not see the clip at all.
    proposal, batch = _proposal(0), _batch(0)
    ratio = np.exp(_log_prob(proposal, batch.priority_NxS) - batch.log_prob_N)
    self.assertGreater((np.abs(ratio - 1.0) > 0.2).sum(), 1)
    self.assertGreater((np.abs(ratio - 1.0) < 0.2).sum(), 1)

  @parameterized.parameters((1.0, 1.5), (-1.0, 0.5))
  def test_clipped_candidates_have_no_gradient(self, sign, ratio):
    # Better candidates already likelier, worse ones already less likely.
    proposal = _proposal()
    priority = jnp.stack([proposal.mean_S + 0.1, proposal.mean_S - 0.2])
    ratio_N = jnp.array([ratio, 2.0 - ratio])
    batch = policy.Batch(
      priority,
      jnp.zeros_like(priority),
      _log_prob(proposal, priority) - jnp.log(ratio_N),
      proposal.value,
      jnp.array([sign, -sign]),
      jnp.zeros_like(priority),
    )
    grads = _loss_gradient(proposal, batch, _WEIGHTS | {'value_weight': 0.0})
    np.testing.assert_array_equal(grads.mean_S, 0.0)
    np.testing.assert_array_equal(grads.log_std_S, 0.0)

  def test_score_gradient_at_the_proposing_policy_is_reinforce(self):
    # There the ratio is 1 and its gradient that of the log density.
    proposal, batch = _proposal(3), _batch(3)
    batch = batch._replace(log_prob_N=_log_prob(proposal, batch.priority_NxS))
    got = _loss_gradient(proposal, batch, _WEIGHTS | {'value_weight': 0.0})
    reward = np.asarray(batch.reward_N, np.float64)
    advantage = ((reward - reward.mean()) / reward.std())[:, None]
    std = np.exp(proposal.log_std_S.astype(np.float64))
    scaled = (np.asarray(batch.priority_NxS) - proposal.mean_S) / std
    np.testing.assert_allclose(
      got.mean_S, -(advantage * scaled / std).mean(0), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
      got.log_std_S,
      -(advantage * (scaled**2 - 1)).mean(0),
      rtol=1e-3,
      atol=1e-4,
    )

  def test_a_value_that_has_moved_enough_has_no_gradient(self):
    """The clipped value is the larger miss: the value learns no more."""
    proposal, batch = _proposal(3), _batch(3)
    low, high = proposal.value - 0.5, proposal.value + 0.5
    weights = _WEIGHTS | {'value_weight': 2.0}
    for before, reward, slope in (
      (low, high + 9.0, 0.0),  # up by more than the clip, towards the reward
      (high, high + 9.0, 2.0 * 2.0 * -9.5),  # down, away from it
      (proposal.value, high, 2.0 * 2.0 * -0.5),  # not moved
    ):
      moved = batch._replace(
        value=before, reward_N=np.full(16, reward, np.float32)
      )
      got = _loss_gradient(proposal, moved, weights)
      self.assertAlmostEqual(float(got.value), slope, places=4)

  def test_kl_is_that_of_the_policies(self):
    old = _proposal(0)
    new = old._replace(mean_S=old.mean_S + 0.05 * np.exp(old.log_std_S))
    noise = np.random.default_rng(0).standard_normal((20_000, _S))
    priority = _act(old, noise.astype(np.float32))
    batch = policy.Batch(
      *(priority, noise, _log_prob(old, priority), old.value),
      *(np.zeros(20_000), 0.0 * noise),
    )
    got = _loss(new, batch, **_WEIGHTS)[1]['approx_kl']
    self.assertAlmostEqual(float(got) / (_S * 0.05**2 / 2), 1.0, delta=0.1)

  def test_a_signal_of_weight_0_is_not_computed(self):
    proposal, batch = _proposal(1), _batch(1)
    mean_only = {
      'score_weight': 0.0,
      'pathwise_weight': 1.0,
      'value_weight': 0.0,
    }
    total, terms = _loss(proposal, batch, **_WEIGHTS | mean_only)
    self.assertEqual(terms.keys(), {'entropy', 'loss_pathwise'})
    self.assertEqual(total, terms['loss_pathwise'])
    got = _loss_gradient(proposal, batch, _WEIGHTS | mean_only)
    self.assertEqual(got.value, 0.0)
    _, terms = _loss(proposal, batch, **_WEIGHTS)
    self.assertNotIn('loss_pathwise', terms)

  def test_pathwise_gradient_is_that_of_the_reward(self):
    # For a reward that is linear in the priorities it is exact.
    proposal = _proposal(4)
    batch = _batch(4)
    batch = batch._replace(gradient_NxS=np.tile(_TARGET, (16, 1)))
    kw = _WEIGHTS | {
      'score_weight': 0.0, 'pathwise_weight': 1.0, 'value_weight': 0.0
    }  # fmt: skip
    got = _loss_gradient(proposal, batch, kw)
    np.testing.assert_allclose(got.mean_S, -_TARGET, rtol=1e-5)


def _reward(priority):
  """1 at the hidden target, falling off quadratically."""
  return 1.0 - jnp.mean(jnp.square(priority - _TARGET), -1)


def _solve(weights, **kw):
  """The proposal after so many updates, and the terms of every loss."""
  return jax.jit(lambda: _solved(weights, **kw))()


def _solved(weights, *, updates, candidates, epochs, rate):
  _, params, apply = _initial(np.zeros(_S))
  optim = policy.optimizer(
    learning_rate=rate,
    network_learning_rate=1e-2,
    decay=0.99,
    steps=updates * epochs,
    max_norm=1.0,
  )
  sparsity = jnp.float32(0.3)

  def step(carry, key):
    params, opt_state = carry
    proposal = apply(params, sparsity)
    priority, noise = policy.sample(key, proposal, candidates, antithetic=True)
    batch = policy.Batch(
      priority,
      noise,
      policy.log_prob(proposal, priority),
      proposal.value,
      _reward(priority),
      jax.vmap(jax.grad(_reward))(priority),
    )
    params, opt_state, terms = policy.update(
      params,
      opt_state,
      batch,
      sparsity,
      apply=apply,
      optim=optim,
      epochs=epochs,
      **weights,
    )
    return (params, opt_state), terms

  keys = jax.random.split(jax.random.key(7), updates)
  (params, _), terms = jax.lax.scan(step, (params, optim.init(params)), keys)
  return apply(params, sparsity), terms


def _distance(proposal):
  return float(np.linalg.norm(proposal.mean_S - _TARGET))


class BanditTest(parameterized.TestCase):
  def test_score_function_alone_finds_the_optimum(self):
    proposal, terms = _solve(
      _WEIGHTS, updates=150, candidates=16, epochs=2, rate=0.05
    )
    self.assertGreater(np.linalg.norm(_TARGET), 1.5)
    self.assertLess(_distance(proposal), 0.15)
    # The value head has learned what to expect, the policy to be sure.
    self.assertLess(terms['loss_value'][-1], 0.1 * terms['loss_value'][0])
    self.assertLess(terms['entropy'][-1], terms['entropy'][0])

  def test_pathwise_alone_is_far_quicker(self):
    few = {'updates': 25, 'candidates': 2, 'epochs': 1, 'rate': 0.2}
    by_path, _ = _solve(
      _WEIGHTS | {'score_weight': 0.0, 'pathwise_weight': 1.0}, **few
    )
    by_score, _ = _solve(_WEIGHTS, **few)
    self.assertLess(_distance(by_path), 0.3)
    self.assertLess(3 * _distance(by_path), _distance(by_score))


def _update(reward_N, gradient, weights, epochs):
  """Initial parameters at the target, those after one update, its terms."""
  return jax.jit(lambda: _updated(reward_N, gradient, weights, epochs))()


def _updated(reward_N, gradient, weights, epochs):
  _, params, apply = _initial(_TARGET)
  optim = policy.optimizer(
    learning_rate=0.1,
    network_learning_rate=0.1,
    decay=0.99,
    steps=10,
    max_norm=1.0,
  )
  sparsity = jnp.float32(0.2)
  proposal = apply(params, sparsity)
  priority, noise = policy.sample(
    jax.random.key(0), proposal, len(reward_N), antithetic=True
  )
  batch = policy.Batch(
    priority,
    noise,
    policy.log_prob(proposal, priority),
    proposal.value,
    reward_N,
    jnp.full_like(priority, gradient),
  )
  new, _, terms = policy.update(
    params,
    optim.init(params),
    batch,
    sparsity,
    apply=apply,
    optim=optim,
    epochs=epochs,
    **weights,
  )
  return params, new, terms


class UpdateTest(parameterized.TestCase):
  def update(self, reward, *, gradient=0.0, epochs=3, **weights):
    reward_N = np.resize(np.asarray(reward, np.float32), 10)
    return _update(reward_N, gradient, _WEIGHTS | weights, epochs)

  def assert_finite(self, *trees):
    for leaf in jax.tree.leaves(trees):
      self.assertTrue(np.isfinite(leaf).all())

  # 0 is the reward of a model whose loss is not finite.
  @parameterized.parameters(0.0, 0.1, 0.7, 1.0)
  def test_equal_rewards_leave_the_proposal_alone(self, reward):
    before, after, terms = self.update([reward], value_weight=0.0)
    self.assert_finite(after, terms)
    np.testing.assert_array_equal(after['mean'], before['mean'])
    np.testing.assert_array_equal(after['log_std'], before['log_std'])

  def test_one_broken_candidate_does_no_harm(self):
    _, after, terms = self.update([0.9, 0.0, 0.8, 0.85])
    self.assert_finite(after, terms)

  def test_a_large_reward_does_no_harm(self):
    _, after, terms = self.update([1e6, 0.0, -1e6, 0.5])
    self.assert_finite(after, terms)

  def test_more_entropy_is_more_spread(self):
    before, after, _ = self.update([0.5], entropy_weight=1.0)
    self.assertGreater((after['log_std'] - before['log_std']).min(), 0.0)

  def test_follows_the_gradient_of_the_reward(self):
    before, after, _ = self.update(
      [0.5], score_weight=0.0, pathwise_weight=1.0, gradient=1.0
    )
    self.assertGreater((after['mean'] - before['mean']).min(), 0.0)

  def test_epochs_are_gradient_steps(self):
    # Adam's first step is the learning rate, whatever the gradient.
    before, after, _ = self.update([0.9, 0.1, 0.4, 0.3], epochs=1)
    np.testing.assert_allclose(
      np.abs(after['mean'] - before['mean']), 0.1, rtol=1e-3
    )

  def test_free_parameters_and_network_have_their_own_rates(self):
    _, params, _ = _initial(_TARGET)
    optim = policy.optimizer(
      learning_rate=0.5,
      network_learning_rate=0.01,
      decay=0.99,
      steps=4,
      max_norm=1e9,
    )
    ones = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(optim.update)
    change, state = update(ones, jax.jit(optim.init)(params))
    for name, tree in change.items():
      expected = -0.5 if name in ('mean', 'log_std') else -0.01
      for leaf in jax.tree.leaves(tree):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4)
    # Both fall to zero.
    for _ in range(4):
      change, state = update(ones, state)
    for leaf in jax.tree.leaves(change):
      np.testing.assert_allclose(leaf, 0.0, atol=1e-7)


if __name__ == '__main__':
  absltest.main()
