"""A step of recovery in PyTorch, to time beside ours.

It is what a user of PyTorch would write: models of transformers, adapters of
PEFT, fused AdamW, and masks that multiply the inputs of output projections.
With adapters, the frozen weights are shared with the dense model.
"""

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from ffp_jax.benchmarks import recovery_setting, turns
from ffp_jax.benchmarks.recovery_setting import Setting

# Linear layers of transformers by our names.
_NAMES = {
  'q_proj': 'query',
  'k_proj': 'key',
  'v_proj': 'value',
  'o_proj': 'out',
  'out_proj': 'out',
  'gate_proj': 'gate',
  'up_proj': 'up',
  'fc1': 'up',
  'down_proj': 'down',
  'fc2': 'down',
}


def make_step(setting: Setting) -> Callable[[], dict]:
  """Returns a function that takes the next step of training.

  It returns the seconds, the loss `kl` and the `gradient_norm`.
  """
  teacher, student = load_models(setting)
  trained = [x for x in student.parameters() if x.requires_grad]
  optim = torch.optim.AdamW(
    trained,
    lr=recovery_setting.RATE,
    betas=recovery_setting.DECAYS,
    weight_decay=0.0,
    fused=True,
  )
  taken = 0

  def run():
    nonlocal taken
    tokens = torch.tensor(setting.tokens(taken), dtype=torch.long)
    taken += 1
    start = time.perf_counter()
    optim.zero_grad()
    loss = _divergence(teacher, student, tokens)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trained, recovery_setting.MAX_NORM)
    optim.step()
    return {
      'seconds': time.perf_counter() - start,
      'kl': loss.item(),
      'gradient_norm': norm.item(),
    }

  return run


def _divergence(teacher, student, tokens_BxT):
  """Returns the mean over tokens of KL(dense || pruned)."""
  with torch.no_grad():
    aim = teacher(tokens_BxT, use_cache=False).logits.log_softmax(-1)
  found = student(tokens_BxT, use_cache=False).logits.log_softmax(-1)
  return nn.functional.kl_div(
    found.flatten(0, 1),
    aim.flatten(0, 1),
    log_target=True,
    reduction='batchmean',
  )


def load_models(setting: Setting) -> tuple[Any, Any]:
  """Returns the dense model and the pruned one, whose gradient is wanted."""
  teacher = transformers.AutoModelForCausalLM.from_pretrained(
    setting.model, dtype=torch.float32
  )
  teacher = teacher.eval().requires_grad_(False)
  # With adapters, the copy gets the weights themselves.
  shared = {id(x): x for x in teacher.parameters()} if setting.rank else {}
  student = copy.deepcopy(teacher, shared)
  for i, name, linear in _linears(student):
    _remove_units(linear, setting, i, name)
  if setting.sliced:
    for i, layer in enumerate(student.get_decoder().layers):
      if hasattr(layer.self_attn, 'num_heads'):  # OPT splits heads by it
        layer.self_attn.num_heads = setting.kept[0][i]
  if setting.rank:
    _add_adapters(student, teacher, setting)
  else:
    student.requires_grad_(True)
  if not setting.sliced:
    _add_masks(student, setting)
  return teacher, student


def _linears(model) -> Iterator[tuple[int, str, Any]]:
  """Yields (layer, our name, module) of all linear layers."""
  for i, layer in enumerate(model.get_decoder().layers):
    for path, module in [*layer.named_modules()]:
      if name := _NAMES.get(path.rpartition('.')[2]):
        yield i, name, module


def _remove_units(linear, setting, layer, name):
  """Removes what is not kept, and what removed units give if masked."""
  axis = 1 if name in ('out', 'down') else 0  # of weights [outputs, inputs]
  weight = linear.weight
  keep = setting.kept_features(layer, name, weight.shape[axis])
  if setting.sliced:
    index = torch.tensor(np.flatnonzero(keep))
    new = weight.index_select(axis, index)
    if axis == 0 and linear.bias is not None:
      bias = linear.bias.index_select(0, index)
      linear.bias = nn.Parameter(bias, requires_grad=False)
    linear.out_features, linear.in_features = new.shape
  elif axis:
    new = weight * torch.tensor(keep)
  else:
    return
  linear.weight = nn.Parameter(new, requires_grad=False)


def _add_masks(student, setting):
  """Multiplies the inputs of the output projections by the masks."""
  for i, name, module in _linears(student):
    if name not in ('out', 'down'):
      continue
    keep = setting.kept_features(i, name, module.in_features)
    mask = torch.tensor(keep, dtype=torch.float32)
    module.register_forward_pre_hook(
      lambda _, inputs, mask=mask: (inputs[0] * mask,)
    )


def _add_adapters(student, teacher, setting):
  """Adds low-rank updates to all linear layers, which alone are trained."""
  import peft

  config = peft.LoraConfig(
    r=setting.rank,
    lora_alpha=setting.rank,  # so that the update is A B, without a factor
    target_modules=[*_NAMES],
  )
  peft.inject_adapter_in_model(config, student)
  for (i, name, dense), (_, _, adapted) in zip(
    _linears(teacher), _linears(student), strict=True
  ):
    a = torch.tensor(setting.factor(i, name, dense.in_features))
    adapted.lora_A['default'].weight.data = a.T.contiguous()


def make_matmul() -> Callable[[], dict]:
  """Returns a function that multiplies big matrices and returns the seconds."""
  a, b = map(torch.tensor, recovery_setting.matrices())

  def run():
    start = time.perf_counter()
    a @ b
    return {'seconds': time.perf_counter() - start}

  return run


def main(argv: list[str]) -> None:
  """Takes turns at the step of a setting, or at a product of matrices."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))

  def make():
    if len(argv) > 1:
      return make_step(Setting.parse(argv[1])), {}
    return make_matmul(), {}

  turns.serve(make, lambda: {'peak host memory, MB': turns.peak_memory() / 1e6})


if __name__ == '__main__':
  main(sys.argv)
