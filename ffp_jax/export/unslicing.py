"""Unslicing: puts a pruned model's weights back among those of the dense one.

The kept units are found by their weights, so that any pruned model will do
whose layers are parts of the dense model's, trained further or not.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.errors import RequestError
from ffp_jax.export.slicing import UNIT_AXIS
from ffp_jax.models.config import ModelConfig
from ffp_jax.models.decoder import Masks
from ffp_jax.runtime.sharding import param_shardings, to_host

_LIKENESS = 0.5  # least cosine of a unit's weights to those it came from
_MARKS = {'attention': 'key', 'ffn': 'up'}  # weights that tell a unit


def unslice_params(
  small: dict, pruned: ModelConfig, dense: dict, config: ModelConfig
) -> tuple[dict, Masks]:
  """Returns a pruned model as the dense decoder with masks.

  Arrays that are the same in both models are not copied: where calibration
  alone has changed the pruned one, only output projections are.

  Args:
    small: parameters of the pruned decoder.
    pruned: its `ModelConfig`.
    dense: parameters of the dense decoder, stacked.
    config: its `ModelConfig`.

  Returns:
    (parameters of the dense decoder, masks of the units kept).

  Raises:
    RequestError: the pruned model is not a part of the dense one.
  """
  _check_sizes(pruned, config)
  masks = {
    module: np.zeros((config.layers, units), np.float32)
    for module, units in (('attention', config.groups), ('ffn', config.ffn))
  }
  for module, mark in _MARKS.items():
    marks = to_host(dense['stack'][module][mark])
    for layer, kept in enumerate(masks[module]):
      found = small[f'layer_{layer}'][module][mark]
      place = f'{module} of layer {layer}'
      kept[_find_units(to_host(found), marks[layer], module, place)] = 1.0
  params = {
    name: jax.tree.map(_either, small[name], tree)
    for name, tree in dense.items()
    if name != 'stack'
  }
  layers = [small[f'layer_{i}'] for i in range(config.layers)]
  params['stack'] = {
    module: _unslice(
      module, tree, [x[module] for x in layers], masks.get(module)
    )
    for module, tree in dense['stack'].items()
  }
  params = jax.device_put(params, param_shardings(params))
  attention, ffn = map(jnp.asarray, (masks['attention'], masks['ffn']))
  return params, Masks(attention, ffn)


def _check_sizes(pruned: ModelConfig, config: ModelConfig):
  """Refuses two models of which one can't be a part of the other."""
  if config.sliced:
    raise RequestError('dense: the dense model is itself pruned')
  names = ('vocab', 'width', 'layers', 'heads_per_group', 'head_size', 'tied')
  for name in names:
    ours, theirs = getattr(pruned, name), getattr(config, name)
    if ours != theirs:
      raise RequestError(
        f'dense: the pruned model has {name} {ours}, the dense one {theirs}; '
        'give the model that was pruned'
      )


def _find_units(small, dense, module, place) -> np.ndarray:
  """Returns the indices of the dense model's units that are the small one's.

  Args:
    small, dense: weights into the units, the units along an axis.
    module: of the units.
    place: of the units, for messages.
  """
  if not small.size:
    return np.array([], int)
  axis = UNIT_AXIS[module][_MARKS[module]]
  small, dense = (
    np.moveaxis(x, axis, 0).astype(np.float32).reshape(x.shape[axis], -1)
    for x in (small, dense)
  )
  index = {row.tobytes(): i for i, row in enumerate(dense)}
  found = [index.get(row.tobytes(), -1) for row in small]
  if -1 in found:  # trained since
    alike = _normal(small) @ _normal(dense).T
    found = np.argmax(alike, axis=1)
    if np.max(alike, axis=1).min() < _LIKENESS:
      found = []
  if len({*map(int, found)}) < len(small) or list(found) != sorted(found):
    raise RequestError(
      f'dense: the weights of the pruned model ({place}) are not a part of '
      "the dense one's; give the model that was pruned"
    )
  return np.array(found, int)


def _normal(rows):
  """Returns rows scaled to length 1."""
  length = np.linalg.norm(rows, axis=1, keepdims=True)
  return rows / np.maximum(length, np.finfo(np.float32).tiny)


def _unslice(module, dense, layers, mask_LxU) -> dict:
  """Returns one part of every layer, in the dense model's shapes.

  Args:
    module: name of the part.
    dense: its parameters in the dense model, stacked.
    layers: its parameters in each layer of the pruned model.
    mask_LxU: of the units kept; None for a part without units.
  """
  axes = UNIT_AXIS.get(module, {})

  def insert(path, stacked):
    old, name = to_host(stacked), path[0].key
    new = np.zeros_like(old) if name in _OUTPUTS else old.copy()
    for i, layer in enumerate(layers):
      value = layer
      for key in path:
        value = value[key.key]
      if name in axes:
        place = (slice(None),) * axes[name] + (np.flatnonzero(mask_LxU[i]),)
        new[i][place] = to_host(value)
      else:
        new[i] = to_host(value)
    return _either(new, stacked)

  return jax.tree_util.tree_map_with_path(insert, dense)


_OUTPUTS = ('out', 'down')  # whose rows of removed units calibration leaves 0


def _either(new, dense):
  """Returns the dense model's array if the new one has the same values."""
  return dense if np.array_equal(to_host(new), to_host(dense)) else new
