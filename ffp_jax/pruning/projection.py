"""Priorities to ratios that meet the budget, ratios to integer counts."""

import jax
import jax.numpy as jnp
import numpy as np

_BISECTIONS = 60
_ROUNDS = 4  # of the budgets in turn, where there are several
_GRAINS = 2**40  # of a budget whose costs are no whole numbers


def project(priority_S, keep_K, *, share_KxS, floor_S, min_ratio):
  """Ratios that meet every budget and keep the order of the priorities.

  ratio_s = max(floor_s, m + (1 - m) sigmoid(priority_s + shift_s)), m the
  smallest ratio.
  Each budget has one shift, as large as its keep allows, and a sublayer has the
  smallest shift of the budgets in which it costs something. With one budget
  that is one scalar, for which the kept share of the cost equals `keep`.
  Monotone in every priority, free of sublayer order, uniform for equal
  priorities. Differentiable: the shifts' derivative is the implicit one.

  Args:
    priority_S: any finite numbers, [S].
    keep_K: share of each removable cost to keep, in (share @ floor_S, 1].
    share_KxS: each sublayer's share of the removable cost, rows sum to 1.
    floor_S: smallest ratio of each sublayer, [S].
    min_ratio: smallest ratio that a priority can ask for, below `keep_K`.

  Returns:
    Ratios [S] in (0, 1] with share_KxS @ ratios at most keep_K to float32
    precision, and equal to it for one budget at least.
  """
  frozen = jax.lax.stop_gradient(priority_S)
  least, most = -jnp.max(frozen) - 30.0, -jnp.min(frozen) + 30.0

  def ratios(shift_K):
    shift_S = jnp.min(jnp.where(share_KxS > 0, shift_K[:, None], most), axis=0)
    wish = min_ratio + (1.0 - min_ratio) * jax.nn.sigmoid(priority_S + shift_S)
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


def cut(action_S, keep_K, *, share_KxS, floor_S, min_ratio):
  """Ratios that meet one budget as the published code does it.

  A ratio is the absolute value of an action, from `min_ratio` to 1. What the
  budget leaves over is spread over the sublayers in proportion to what they
  lack; what is too much is cut from the first layer on, each sublayer down to
  the least, until the budget is met.

  Args:
    action_S: any finite numbers, attention and then FFN of every layer, [S].
    keep_K: share of the removable cost to keep, of a single budget [1].
    share_KxS: each sublayer's share of it, [1,S].
    floor_S: smallest ratio of each sublayer, [S].
    min_ratio: smallest ratio that an action can ask for.

  Returns:
    Ratios [S] in (0, 1].
  """
  (keep,), (share_S,) = keep_K, share_KxS
  least_S = jnp.maximum(floor_S, min_ratio)
  ratio_S = jnp.clip(jnp.abs(action_S), least_S, 1.0)
  over = ratio_S @ share_S - keep
  lack_S = 1.0 - ratio_S
  rise = jnp.maximum(-over, 0.0) / jnp.maximum(lack_S @ share_S, 1e-30)

  def front_to_back(x_S):
    return jnp.stack(jnp.split(x_S, 2), axis=-1).reshape(-1)

  room_S = front_to_back((ratio_S - least_S) * share_S)
  taken_S = jnp.clip(over - (jnp.cumsum(room_S) - room_S), 0.0, room_S)
  taken_S = taken_S.reshape(-1, 2).T.reshape(-1)
  return jnp.clip(ratio_S + rise * lack_S - taken_S / share_S, least_S, 1.0)


def round_to_counts(ratio_S, limit_K, *, units_S, cost_KxS, step_S, floor_S):
  """Rounds ratios to integer counts: floor to the step, largest remainder.

  Runs on the host. Steps left over go to the largest remainders, ties by
  index, skipping what no longer fits, and go round again until not even the
  cheapest step fits. No limit is exceeded, and a single one is missed by less
  than the cheapest step.

  Args:
    ratio_S: kept shares, [S].
    limit_K: costs that may be kept, int64 [K].
    units_S: units of the dense sublayers, int64 [S].
    cost_KxS: cost of one unit, int64 [K,S].
    step_S: rounding multiples, int64 [S]; keeping all units is always
      allowed, a multiple or not.
    floor_S: fewest units to keep, int64 [S].

  Returns:
    Counts, int64 [S].
  """
  # In float32, as the ratios are: equal ratios have equal remainders.
  ratio, units, step = (np.float32(x) for x in (ratio_S, units_S, step_S))
  wish_S = ratio * units
  # A wish within float32 noise of a step counts as that step.
  count_S = np.floor(wish_S / step + np.float32(1e-4)).astype(np.int64) * step_S
  count_S = np.clip(count_S, floor_S, units_S)
  whole = wish_S > units - np.float32(0.5e-4) * step
  count_S = np.where(whole, units_S, count_S)
  order_S = np.argsort(
    np.float32(count_S) / step - wish_S / step, kind='stable'
  )
  slack_K = limit_K - cost_KxS @ count_S
  _trim(count_S, slack_K, order_S[::-1], cost_KxS, step_S, floor_S)
  _fill(count_S, slack_K, order_S, cost_KxS, step_S, units_S)
  return count_S


def _trim(count_S, slack_K, order_S, cost_KxS, step_S, floor_S):
  """Takes steps away, in place, from where a budget is overdrawn."""
  moved = True
  while moved:
    moved = False
    for s in order_S:
      smaller = max((count_S[s] - 1) // step_S[s] * step_S[s], floor_S[s])
      helps = np.any((slack_K < 0) & (cost_KxS[:, s] > 0))
      if helps and smaller < count_S[s]:
        slack_K += (count_S[s] - smaller) * cost_KxS[:, s]
        count_S[s], moved = smaller, True


def _fill(count_S, slack_K, order_S, cost_KxS, step_S, units_S):
  """Spends what is left on steps that fit every budget, in place."""
  moved = True
  while moved:
    moved = False
    for s in order_S:
      bigger = min((count_S[s] // step_S[s] + 1) * step_S[s], units_S[s])
      price_K = (bigger - count_S[s]) * cost_KxS[:, s]
      if bigger > count_S[s] and np.all(price_K <= slack_K):
        slack_K -= price_K
        count_S[s], moved = bigger, True


def integers(unit_cost_S, limit, units_S) -> tuple[np.ndarray, int]:
  """Returns a budget in integers, without their common divisor.

  Exact for costs that are whole numbers; others are rounded up to a grain of
  the total, so that who meets this budget meets the one given.

  Args:
    unit_cost_S: cost of one unit, [S].
    limit: what all units may cost together.
    units_S: units of the dense sublayers.

  Returns:
    (cost of one unit int64 [S], limit).
  """
  grain = 1.0
  if np.any(unit_cost_S != np.rint(unit_cost_S)):
    grain = float(units_S @ unit_cost_S) / _GRAINS
  cost_S = np.ceil(unit_cost_S / grain).astype(np.int64)
  divisor = int(np.gcd.reduce(cost_S))
  return cost_S // divisor, int(limit / grain // divisor)
