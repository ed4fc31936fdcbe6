"""Projects priorities to ratios that meet the budgets, and rounds to counts.

K is the number of budgets here, S the number of sublayers.
"""

import jax
import jax.numpy as jnp
import numpy as np

_BISECTIONS = 60
_ROUNDS = 4  # times that several budgets are solved in turn
_GRAINS = 2**40  # integer units of a total cost that is not a whole number


def project(
  priority_S: jax.Array | np.ndarray,
  keep_K: jax.Array,
  *,
  share_KxS: jax.Array,
  floor_S: jax.Array,
  min_ratio: float,
) -> jax.Array:
  """Projects priorities to ratios that meet every budget and keep their order.

  With m the smallest ratio, the ratio of sublayer s is

    max(floor_s, m + (1 - m) sigmoid(priority_s + shift_s)).

  Each budget has one shift, as large as its `keep_K` allows, and a sublayer has
  the smallest shift of the budgets in which it has a cost. With one budget the
  shift is one scalar, for which the kept share of the cost equals `keep_K`.
  The result rises with every priority, does not depend on the order of the
  sublayers, and is uniform for equal priorities. It is differentiable: the
  shifts have the derivative that the implicit function theorem gives.

  Args:
    priority_S: finite numbers, [S].
    keep_K: share of each removable cost to keep, in (share @ floor_S, 1].
    share_KxS: share of each sublayer in the removable cost; rows sum to 1.
    floor_S: smallest ratio of each sublayer, [S].
    min_ratio: smallest ratio that a priority can ask for, below `keep_K`.

  Returns:
    Ratios [S] in (0, 1], for which share_KxS @ ratios is at most keep_K to
    float32 precision, and equal to it for at least one budget.
  """
  frozen = jax.lax.stop_gradient(priority_S)
  least, most = -jnp.max(frozen) - 30.0, -jnp.min(frozen) + 30.0

  def ratios(shift_K):
    shift_S = jnp.min(jnp.where(share_KxS > 0, shift_K[:, None], most), axis=0)
    sigmoid_S = jax.nn.sigmoid(priority_S + shift_S)
    return jnp.maximum(floor_S, min_ratio + (1.0 - min_ratio) * sigmoid_S)

  def solve(k, shift_K):
    """Returns the largest shift that budget k allows, the others given."""

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
  # A shift that the last round raised may overdraw another budget.
  for k in range(count) if count > 1 else ():
    shift_K = shift_K.at[k].min(solve(k, shift_K))
  shift_K = jax.lax.stop_gradient(shift_K)
  # One Newton step leaves the value, and adds the derivative of the root.
  kept_K = share_KxS @ ratios(shift_K)
  slope_KxK = jax.jacfwd(lambda s: share_KxS @ ratios(s))(shift_K)
  # A budget that is not used up limits no sublayer: its shift is constant.
  idle_K = jnp.diagonal(slope_KxK) < 1e-6
  slope_KxK = jnp.where(idle_K[:, None], jnp.eye(count), slope_KxK)
  off_K = jnp.where(idle_K, 0.0, kept_K - jax.lax.stop_gradient(kept_K))
  if count == 1:
    return ratios(shift_K - off_K / slope_KxK[0])
  return ratios(shift_K - jnp.linalg.solve(slope_KxK, off_K))


def cut(
  priority_S: jax.Array | np.ndarray,
  keep_K: jax.Array,
  *,
  share_KxS: jax.Array,
  floor_S: jax.Array,
  min_ratio: float,
) -> jax.Array:
  """Repairs ratios to meet one budget, as the published code does it.

  A ratio is the absolute value of a priority, clipped to [min_ratio, 1]. Budget
  that is left over is spread over the sublayers in proportion to what they
  lack; an excess is cut from the first layer on, each sublayer down to its
  smallest ratio, until the budget is met.

  Args:
    priority_S: finite numbers, the attention and then the FFN of every layer,
      [S].
    keep_K: share of the removable cost to keep, of a single budget [1].
    share_KxS: share of each sublayer in it, [1,S].
    floor_S: smallest ratio of each sublayer, [S].
    min_ratio: smallest ratio that a priority can ask for.

  Returns:
    Ratios [S] in (0, 1].
  """
  (keep,), (share_S,) = keep_K, share_KxS
  least_S = jnp.maximum(floor_S, min_ratio)
  ratio_S = jnp.clip(jnp.abs(priority_S), least_S, 1.0)
  excess = ratio_S @ share_S - keep
  lack_S = 1.0 - ratio_S
  rise = jnp.maximum(-excess, 0.0) / jnp.maximum(lack_S @ share_S, 1e-30)

  def layer_by_layer(x_S):
    return jnp.stack(jnp.split(x_S, 2), axis=-1).reshape(-1)

  room_S = layer_by_layer((ratio_S - least_S) * share_S)
  taken_S = jnp.clip(excess - (jnp.cumsum(room_S) - room_S), 0.0, room_S)
  taken_S = taken_S.reshape(-1, 2).T.reshape(-1)
  return jnp.clip(ratio_S + rise * lack_S - taken_S / share_S, least_S, 1.0)


def round_to_counts(
  ratio_S: jax.Array | np.ndarray,
  limit_K: np.ndarray,
  *,
  units_S: np.ndarray,
  cost_KxS: np.ndarray,
  step_S: np.ndarray,
  floor_S: np.ndarray,
) -> np.ndarray:
  """Rounds ratios to integer counts by largest remainder, on the host.

  Counts are rounded down to a step. The steps left over go to the largest
  remainders, ties by index, skipping those that no longer fit, round after
  round until not even the cheapest step fits. No limit is exceeded, and a
  single one is missed by less than the cheapest step.

  Args:
    ratio_S: kept share of each sublayer, [S].
    limit_K: costs that may be kept, int64 [K].
    units_S: units of the dense sublayers, int64 [S].
    cost_KxS: cost of one unit, int64 [K,S].
    step_S: rounding multiples, int64 [S]; keeping all units is always allowed,
      whether or not they are a multiple.
    floor_S: fewest units to keep, int64 [S].

  Returns:
    Counts, int64 [S].
  """
  # In float32, as the ratios are: equal ratios have equal remainders.
  ratio, units, step = (
    np.asarray(x, np.float32) for x in (ratio_S, units_S, step_S)
  )
  exact_S = ratio * units
  # A number within float32 noise of a step counts as that step.
  count_S = (
    np.floor(exact_S / step + np.float32(1e-4)).astype(np.int64) * step_S
  )
  count_S = np.clip(count_S, floor_S, units_S)
  whole = exact_S > units - np.float32(0.5e-4) * step
  count_S = np.where(whole, units_S, count_S)
  order_S = np.argsort(
    count_S.astype(np.float32) / step - exact_S / step, kind='stable'
  )
  slack_K = limit_K - cost_KxS @ count_S
  _trim(count_S, slack_K, order_S[::-1], cost_KxS, step_S, floor_S)
  _fill(count_S, slack_K, order_S, cost_KxS, step_S, units_S)
  return count_S


def _trim(count_S, slack_K, order_S, cost_KxS, step_S, floor_S) -> None:
  """Removes steps, in place, while a budget is overdrawn."""
  moved = True
  while moved:
    moved = False
    for s in order_S:
      smaller = max((count_S[s] - 1) // step_S[s] * step_S[s], floor_S[s])
      helps = np.any((slack_K < 0) & (cost_KxS[:, s] > 0))
      if helps and smaller < count_S[s]:
        slack_K += (count_S[s] - smaller) * cost_KxS[:, s]
        count_S[s], moved = smaller, True


def _fill(count_S, slack_K, order_S, cost_KxS, step_S, units_S) -> None:
  """Adds steps, in place, while one fits into every budget."""
  moved = True
  while moved:
    moved = False
    for s in order_S:
      bigger = min((count_S[s] // step_S[s] + 1) * step_S[s], units_S[s])
      price_K = (bigger - count_S[s]) * cost_KxS[:, s]
      if bigger > count_S[s] and np.all(price_K <= slack_K):
        slack_K -= price_K
        count_S[s], moved = bigger, True


def integer_costs(
  unit_cost_S: np.ndarray, limit: float, units_S: np.ndarray
) -> tuple[np.ndarray, int]:
  """Returns a budget in integers, divided by their common divisor.

  Whole-number costs stay exact; others are rounded up to a 2**-40th of the
  total, so that counts within the integer budget are within the given one.

  Args:
    unit_cost_S: cost of one unit, [S].
    limit: largest cost of all kept units together.
    units_S: units of the dense sublayers, [S].

  Returns:
    (cost of one unit int64 [S], limit).
  """
  grain = 1.0
  if np.any(unit_cost_S != np.rint(unit_cost_S)):
    grain = float(units_S @ unit_cost_S) / _GRAINS
  cost_S = np.ceil(unit_cost_S / grain).astype(np.int64)
  divisor = int(np.gcd.reduce(cost_S))
  return cost_S // divisor, int(limit / grain // divisor)
