"""Priorities to ratios that meet the budget, ratios to integer counts."""

import jax
import jax.numpy as jnp
import numpy as np

_BISECTIONS = 60
_ROUNDS = 4  # of the budgets in turn, where there are several
_MOST = 2**30  # of a budget in `integers`


def project(priority_S, keep_K, *, share_KxS, floor_S, low):
  """Ratios that meet every budget and keep the order of the priorities.

  ratio_s = max(floor_s, low + (1 - low) * sigmoid(priority_s + shift_s)).
  Each budget has one shift, as large as its keep allows, and a module has the
  smallest shift of the budgets in which it costs something. With one budget
  that is one scalar, for which the kept share of the cost equals `keep`.
  Monotone in every priority, free of module order, uniform for equal
  priorities. Differentiable: the shifts' derivative is the implicit one.

  Args:
    priority_S: any finite numbers, [S].
    keep_K: share of each removable cost to keep, in (share @ floor_S, 1].
    share_KxS: each module's share of the removable cost, rows sum to 1.
    floor_S: smallest ratio of each module, [S].
    low: smallest ratio that a priority can ask for, below `keep_K`.

  Returns:
    Ratios [S] in (0, 1] with share_KxS @ ratios at most keep_K to float32
    precision, and equal to it for one budget at least.
  """
  frozen = jax.lax.stop_gradient(priority_S)
  least, most = -jnp.max(frozen) - 30.0, -jnp.min(frozen) + 30.0

  def ratios(shift_K):
    shift_S = jnp.min(jnp.where(share_KxS > 0, shift_K[:, None], most), axis=0)
    wish = low + (1.0 - low) * jax.nn.sigmoid(priority_S + shift_S)
    return jnp.maximum(floor_S, wish)

  def solve(k, shift_K):
    """The largest shift that budget k allows beside the others'."""

    def halve(_, bounds):
      below, above = bounds
      middle = 0.5 * (below + above)
      less = share_KxS[k] @ ratios(shift_K.at[k].set(middle)) < keep_K[k]
      return jnp.where(less, middle, below), jnp.where(less, above, middle)

    below, above = jax.lax.fori_loop(0, _BISECTIONS, halve, (least, most))
    return 0.5 * (below + above)

  count = len(share_KxS)
  shift_K = jnp.full(count, most)
  for k in range(count) if count == 1 else [*range(count)] * _ROUNDS:
    shift_K = shift_K.at[k].set(solve(k, shift_K))
  # What the last round has raised may be too much for another budget.
  for k in range(count) if count > 1 else ():
    shift_K = shift_K.at[k].min(solve(k, shift_K))
  shift_K = jax.lax.stop_gradient(shift_K)
  # One Newton step: no change of value, but the derivative of the root.
  kept_K = share_KxS @ ratios(shift_K)
  slope_KxK = jax.jacfwd(lambda s: share_KxS @ ratios(s))(shift_K)
  # A budget that isn't used up holds no module: its shift stays.
  idle_K = jnp.diagonal(slope_KxK) < 1e-6
  slope_KxK = jnp.where(idle_K[:, None], jnp.eye(count), slope_KxK)
  off_K = jnp.where(idle_K, 0.0, kept_K - jax.lax.stop_gradient(kept_K))
  if count == 1:
    return ratios(shift_K - off_K / slope_KxK[0])
  return ratios(shift_K - jnp.linalg.solve(slope_KxK, off_K))


def to_counts(ratio_S, limit_K, *, units_S, cost_KxS, step_S, floor_S):
  """Ratios to integer counts: floor to the step, then largest remainder.

  Steps left over go to the largest remainders, ties by index, skipping what
  no longer fits, and go round again until not even the cheapest step fits.
  No limit is exceeded, and a single one is missed by less than the cheapest
  step.

  Args:
    ratio_S: kept shares, [S].
    limit_K: costs that may be kept, from `wrap`.
    units_S: units of the dense modules, int32 [S].
    cost_KxS: cost of one unit, from `wrap`, int32 [K,S], in any unit of cost
      with step_S @ cost_S below 2**31; with several budgets, their sums too.
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
  slack_K = limit_K - jnp.sum(count_S * cost_KxS, axis=-1)

  def bigger(s, count):
    return jnp.minimum((count // step_S[s] + 1) * step_S[s], units_S[s])

  def smaller(s, count):
    return jnp.maximum((count - 1) // step_S[s] * step_S[s], floor_S[s])

  def helps(s, slack_K):
    """Whether a module costs something where there is too much."""
    return jnp.any((slack_K[:, None] < 0) & (cost_KxS[:, s] != 0), axis=0)

  def trim(i, carry):
    count_S, slack_K = carry
    s = order_S[-1 - i][None]
    new = jnp.where(helps(s, slack_K), smaller(s, count_S[s]), count_S[s])
    slack_K += ((count_S[s] - new) * cost_KxS[:, s])[:, 0]
    return count_S.at[s].set(new), slack_K

  def fill(i, carry):
    count_S, slack_K = carry
    s = order_S[i]
    price_K = (bigger(s, count_S[s]) - count_S[s]) * cost_KxS[:, s]
    fits = jnp.all(price_K <= slack_K)
    new = jnp.where(fits, bigger(s, count_S[s]), count_S[s])
    return count_S.at[s].set(new), slack_K - jnp.where(fits, price_K, 0)

  def more(carry):
    count_S, slack_K = carry
    s = jnp.arange(len(units_S))
    price_KxS = (bigger(s, count_S) - count_S) * cost_KxS
    fits_S = jnp.all(price_KxS <= slack_K[:, None], axis=0)
    return jnp.any(fits_S & jnp.any(price_KxS > 0, axis=0))

  def over(carry):
    count_S, slack_K = carry
    s = jnp.arange(len(units_S))
    return jnp.any(helps(s, slack_K) & (count_S > floor_S))

  def sweep(step):
    return lambda carry: jax.lax.fori_loop(0, len(units_S), step, carry)

  carry = jax.lax.while_loop(over, sweep(trim), (count_S, slack_K))
  count_S, _ = jax.lax.while_loop(more, sweep(fill), carry)
  return count_S


def integers(unit_cost_S, limit, units_S) -> tuple[np.ndarray, int]:
  """A budget in integers whose sums stay far below 2**31.

  Exact where the costs' common divisor allows it, else with every cost
  rounded up, so that who meets this budget meets the one given.

  Args:
    unit_cost_S: cost of one unit, integers or not, [S].
    limit: what all units may cost together.
    units_S: units of the dense modules.

  Returns:
    (cost of one unit int64 [S], limit).
  """
  total = float(np.asarray(units_S, float) @ unit_cost_S)
  whole_S = np.rint(unit_cost_S).astype(np.int64)
  scale = np.gcd.reduce(whole_S)
  if np.array_equal(whole_S, unit_cost_S) and total < _MOST * float(scale):
    return whole_S // scale, int(limit // scale)
  scale = total / _MOST
  return np.ceil(unit_cost_S / scale).astype(np.int64), int(limit // scale)


def wrap(integers) -> np.ndarray:
  """Integers of any size to int32, modulo 2**32, as `to_counts` takes them."""
  return np.asarray(integers, np.int64).astype(np.uint32).view(np.int32)
