"""Our step of recovery, to time beside that of PyTorch."""

import dataclasses
import sys
import time
from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffp_jax import export
from ffp_jax.benchmarks import recovery_setting, timed_models, turns
from ffp_jax.benchmarks.recovery_setting import Setting
from ffp_jax.checkpoints.model import load_model
from ffp_jax.models import families
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.pruning import recovery

_CHUNK = 256  # tokens whose logits exist at once


def make_step(setting: Setting) -> Callable[[], dict]:
  """Returns a function that takes the next step of training.

  It returns the seconds, the loss `kl` and the `gradient_norm`.
  """
  loaded = load_model(setting.model, 'float32')
  dense, model = loaded.params, loaded.config
  del loaded
  keep = Masks(*(jnp.asarray(x, jnp.float32) for x in setting.masks()))
  params, student = _without_units(dense, keep), model
  if setting.sliced:
    params, student = export.slice_params(params, model, keep)
    params = jax.tree.map(jnp.asarray, params)
  if setting.rank:
    trained, frozen = _adapters(setting, model, student), params
  else:
    trained, frozen = recovery.begin(params, model, keep, rank=0, seed=0)
  del params
  optim = recovery.optimizer(
    max_norm=recovery_setting.MAX_NORM, decays=recovery_setting.DECAYS
  )
  loss_fn = recovery.make_loss(
    model,
    rank=setting.rank,
    cross_entropy=0.0,
    remat=False,
    chunk=_CHUNK,
    student=student,
  )
  rate = optax.constant_schedule(recovery_setting.RATE)
  step_fn = recovery.make_step(loss_fn, optim, rate)
  masks, scale = None if setting.sliced else keep, jnp.float32(1.0)
  # Committed to a device as the step's outputs are, or it compiles twice.
  state = jax.device_put(
    (trained, optim.init(trained), jnp.int32(0)), jax.local_devices()[0]
  )
  del trained

  def run():
    nonlocal state
    tokens = setting.tokens(int(state[2]))[None]
    start = time.perf_counter()
    *state, metrics = jax.block_until_ready(
      step_fn(*state, scale, frozen, dense, masks, tokens)
    )
    seconds = time.perf_counter() - start
    names = 'kl', 'gradient_norm'
    return {'seconds': seconds} | {name: metrics[name].item() for name in names}

  return run


def _without_units(dense: dict, keep: Masks) -> dict:
  """Returns parameters without what removed units give, as calibration does."""
  stack = {**dense['stack']}
  for module, name, mask in (
    ('attention', 'out', keep.attention),
    ('ffn', 'down', keep.ffn),
  ):
    weight = stack[module][name]
    mask = mask.reshape(*mask.shape, *(1,) * (weight.ndim - mask.ndim))
    stack[module] = {**stack[module], name: weight * mask}
  return {**dense, 'stack': stack}


def _adapters(
  setting: Setting, model: ModelConfig, student: ModelConfig
) -> dict:
  """Returns the low-rank factors of all linear layers of a student.

  They are those that PyTorch gets, too; B is zero.

  Args:
    setting: draws them.
    model: of the dense decoder.
    student: of the pruned one, the same if it is masked.
  """

  def shapes(config):
    return flax.traverse_util.flatten_dict(
      families.param_shapes(config, jnp.float32)
    )

  wide = shapes(dataclasses.replace(student, adapter_rank=setting.rank))
  plain = shapes(student)
  inputs = {
    'out': model.groups * model.heads_per_group * model.head_size,
    'down': model.ffn,
  }

  def draw(path, shape):
    if path[-1].endswith('_b'):
      return jnp.zeros(shape)
    name = path[-1].removesuffix('_a')

    def factor(i):
      return setting.factor(i, name, inputs.get(name, model.width))

    if path[0] == 'stack':
      a = np.stack([factor(i) for i in range(model.layers)])
    else:
      a = factor(int(path[0].removeprefix('layer_')))
    return jnp.asarray(a.reshape(shape))

  return flax.traverse_util.unflatten_dict(
    {p: draw(p, x.shape) for p, x in wide.items() if p not in plain}
  )


def make_matmul() -> Callable[[], dict]:
  """Returns a function that multiplies big matrices and returns the seconds."""
  a, b = map(jnp.asarray, recovery_setting.matrices())
  multiply = jax.jit(jnp.matmul)

  def run():
    start = time.perf_counter()
    jax.block_until_ready(multiply(a, b))
    return {'seconds': time.perf_counter() - start}

  return run


def main(argv: list[str]) -> None:
  """Takes turns at the step of a setting, or at a product of matrices."""

  def make():
    if len(argv) > 1:
      return make_step(Setting.parse(argv[1])), {}
    return make_matmul(), {}

  turns.serve(make, lambda: timed_models.peak_memory('jax'))


if __name__ == '__main__':
  main(sys.argv)
