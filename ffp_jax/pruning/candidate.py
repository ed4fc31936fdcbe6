"""The reward of one candidate, and its gradient through the unit masks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ffp_jax.models.decoder import Masks
from ffp_jax.pruning import allocation, masks
from ffp_jax.pruning.allocation import DeviceSublayers, Target
from ffp_jax.pruning.reward import reward as reward_of


def count_gradient(
  mask_gradient: Masks, rank: Masks, count_S: jax.Array, *, window: float
) -> jax.Array:
  """Estimates d loss / d count from the mask gradients of the next units.

  The masked forward pass computes removed units too, so the gradient of their
  masks tells what each would change if it came back. A kept unit is near a
  stationary point, because the model was trained or refit with it: the loss is
  flat in its mask. On the way from mask 0 to 1 the gradient of a unit therefore
  falls from its value at 0 to about zero, and averages half of that value. A
  unit that is kept in part, as whole attention groups are before the counts
  are rounded, counts with the gradient measured at its mask.

  Args:
    mask_gradient: d loss / d mask, [L,K] and [L,F].
    rank: ranks of the units, int32 [L,K] and [L,F].
    count_S: counts that the masks keep, see `masks.from_counts`; [S].
    window: number of next units to average over, as a share of the sublayer's
      units; at least one unit is used.

  Returns:
    float32 [S].
  """

  def window_mean(gradient_LxU, rank_LxU, count_L):
    units = rank_LxU.shape[-1]
    # In a sublayer that keeps all of its units, the last one is used.
    first_Lx1 = jnp.minimum(jnp.floor(count_L), units - 1.0)[:, None]
    end_Lx1 = first_Lx1 + max(1, round(window * units))
    inside = (rank_LxU >= first_Lx1) & (rank_LxU < end_Lx1)
    weight = jnp.where(rank_LxU == first_Lx1, 1.0, 0.5)
    total_L = jnp.sum(inside * weight * gradient_LxU, -1)
    return total_L / jnp.sum(inside, -1)

  kinds = zip(mask_gradient, rank, jnp.split(count_S, 2), strict=True)
  return jnp.concatenate([window_mean(*kind) for kind in kinds])


def score_candidate(
  priority_S: jax.Array,
  target: Target,
  device_sublayers: DeviceSublayers,
  loss_fn: Callable[[Masks], jax.Array],
  dense_nll: jax.Array,
  *,
  min_ratio: float,
  window: float | None,
  repair: str,
) -> tuple[jax.Array, jax.Array]:
  """Scores one candidate, and differentiates its reward.

  The candidate's counts are not rounded: that meets the budget exactly, and
  lets whole attention groups come and go by degrees. A group that is worth its
  cost ends up kept by more than half, so that rounding later keeps it.

  Args:
    priority_S: the candidate's priorities, [S].
    target: the sparsity and its budgets.
    device_sublayers: the prunable sublayers.
    loss_fn: maps `Masks` to the mean loss on the tokens of this step, scalar.
    dense_nll: mean loss of the dense model on the same tokens, scalar.
    min_ratio: smallest ratio that a priority can ask for.
    window: see `count_gradient`; None to skip the gradient.
    repair: see `allocation.project`.

  Returns:
    (reward, d reward / d priority [S]). The gradient is zero where it is
    skipped or not finite, or where the loss is not finite.
  """

  def project(priority_S):
    return allocation.project(
      priority_S, target, device_sublayers, min_ratio=min_ratio, repair=repair
    )

  if window is None:
    count_S = project(priority_S) * device_sublayers.units_S
    nll = loss_fn(masks.from_counts(device_sublayers.rank, count_S))
    return reward_of(dense_nll, nll), jnp.zeros_like(priority_S)
  ratio_S, project_vjp = jax.vjp(project, priority_S)
  count_S = ratio_S * device_sublayers.units_S
  nll, mask_gradient = jax.value_and_grad(loss_fn)(
    masks.from_counts(device_sublayers.rank, count_S)
  )
  reward, reward_slope = jax.value_and_grad(lambda x: reward_of(dense_nll, x))(
    nll
  )
  loss_slope_S = count_gradient(
    mask_gradient, device_sublayers.rank, count_S, window=window
  )
  (gradient_S,) = project_vjp(
    reward_slope * loss_slope_S * device_sublayers.units_S
  )
  finite = jnp.isfinite(nll) & jnp.all(jnp.isfinite(gradient_S))
  return reward, jnp.where(finite, gradient_S, 0.0)
