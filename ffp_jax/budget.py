"""Priorities to ratios that meet the budget, ratios to integer counts."""

import jax
import jax.numpy as jnp
import numpy as np

_BISECTIONS = 60


def project(priority_S, keep, *, share_S, floor_S, low):
  """Ratios that meet the budget and keep the order of the priorities.

  ratio_s = max(floor_s, low + (1 - low) * sigmoid(priority_s + shift)), with
  the one scalar `shift` that makes the kept share of the cost equal `keep`.
  Monotone in every priority, free of module order, uniform for equal
  priorities. Differentiable: the shift's derivative is the implicit one.

  Args:
    priority_S: any finite numbers, [S].
    keep: share of the removable cost to keep, in (share_S @ floor_S, 1].
    share_S: each module's share of the removable cost, [S], sums to 1.
    floor_S: smallest ratio of each module, [S].
    low: smallest ratio that a priority can ask for, below `keep`.

  Returns:
    Ratios [S] in (0, 1] with share_S @ ratios = keep to float32 precision.
  """

  def ratios(shift):
    wish = low + (1.0 - low) * jax.nn.sigmoid(priority_S + shift)
    return jnp.maximum(floor_S, wish)

  def halve(_, bounds):
    below, above = bounds
    middle = 0.5 * (below + above)
    less = share_S @ ratios(middle) < keep
    return jnp.where(less, middle, below), jnp.where(less, above, middle)

  frozen = jax.lax.stop_gradient(priority_S)
  start = (-jnp.max(frozen) - 30.0, -jnp.min(frozen) + 30.0)
  below, above = jax.lax.fori_loop(0, _BISECTIONS, halve, start)
  shift = jax.lax.stop_gradient(0.5 * (below + above))
  # One Newton step: no change of value, but the derivative of the root.
  cost, slope = jax.jvp(
    lambda s: share_S @ ratios(s), (shift,), (jnp.ones_like(shift),)
  )
  slope = jax.lax.stop_gradient(jnp.maximum(slope, 1e-6))
  exact = shift - (cost - jax.lax.stop_gradient(cost)) / slope
  return ratios(exact)


def to_counts(ratio_S, limit, *, units_S, cost_S, step_S, floor_S):
  """Ratios to integer counts: floor to the step, then largest remainder.

  Steps left over go to the largest remainders, ties by index, skipping what
  no longer fits, and go round again until not even the cheapest step fits.
  The limit is never exceeded and missed by less than the cheapest step.

  Args:
    ratio_S: kept shares, [S].
    limit: cost that may be kept, from `wrap`.
    units_S: units of the dense modules, int32 [S].
    cost_S: cost of one unit, from `wrap`, int32 [S], in any unit of cost with
      step_S @ cost_S below 2**31.
    step_S: rounding multiples, int32 [S]; keeping all units is always
      allowed, a multiple or not.
    floor_S: fewest units to keep, int32 [S].

  Returns:
    Counts, int32 [S].
  """
  wish_S = ratio_S * units_S
  # A wish within float32 noise of a step counts as that step.
  steps_S = jnp.floor(wish_S / step_S + 1e-4).astype(jnp.int32)
  count_S = jnp.clip(steps_S * step_S, floor_S, units_S)
  count_S = jnp.where(wish_S > units_S - 0.5e-4 * step_S, units_S, count_S)
  order_S = jnp.argsort(count_S / step_S - wish_S / step_S, stable=True)
  # Sums may pass 2**31, but the slack, which decides, stays below one step of
  # every module (`Sites` sees to 2**31 there): int32 arithmetic wraps around,
  # so the slack itself comes out exact.
  slack = limit - jnp.sum(count_S * cost_S)

  def bigger(s, count):
    return jnp.minimum((count // step_S[s] + 1) * step_S[s], units_S[s])

  def smaller(s, count):
    return jnp.maximum((count - 1) // step_S[s] * step_S[s], floor_S[s])

  def trim(i, carry):
    count_S, slack = carry
    s = order_S[-1 - i]
    new = jnp.where(slack < 0, smaller(s, count_S[s]), count_S[s])
    return count_S.at[s].set(new), slack + (count_S[s] - new) * cost_S[s]

  def fill(i, carry):
    count_S, slack = carry
    s = order_S[i]
    price = (bigger(s, count_S[s]) - count_S[s]) * cost_S[s]
    new = jnp.where(price <= slack, bigger(s, count_S[s]), count_S[s])
    return count_S.at[s].set(new), slack - (new - count_S[s]) * cost_S[s]

  def fits(carry):
    count_S, slack = carry
    s = jnp.arange(len(units_S))
    price_S = (bigger(s, count_S) - count_S) * cost_S
    return jnp.any((price_S > 0) & (price_S <= slack))

  def sweep(step):
    return lambda carry: jax.lax.fori_loop(0, len(units_S), step, carry)

  def over(carry):
    return (carry[1] < 0) & jnp.any(carry[0] > floor_S)

  carry = jax.lax.while_loop(over, sweep(trim), (count_S, slack))
  count_S, _ = jax.lax.while_loop(fits, sweep(fill), carry)
  return count_S


def wrap(integers) -> np.ndarray:
  """Integers of any size to int32, modulo 2**32, as `to_counts` takes them."""
  return np.asarray(integers, np.int64).astype(np.uint32).view(np.int32)
