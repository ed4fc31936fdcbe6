"""A tiny run on a mesh of devices, and what must not depend on the mesh."""

import functools
import json
import pathlib
import tempfile

import ml_collections
import numpy as np
from absl.testing import parameterized

from ffp_jax import prune
from ffp_jax.runtime import sharding
from tests import tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit
_FAMILIES = {
  'llama': {
    'num_key_value_heads': 3,
    'num_attention_heads': 6,
    'hidden_size': 48,
    'head_dim': 8,
  },
  'mistral': {'head_dim': 8, 'sliding_window': 20},
  'opt': {
    'ffn_dim': 48,
    'word_embed_proj_dim': 32,
    'do_layer_norm_before': True,
  },
}


def config(
  folder: pathlib.Path, mesh: tuple[int, int, int], **overrides
) -> ml_collections.ConfigDict:
  """A run of seconds on a mesh."""
  sizes = dict(zip(sharding.MESH_AXES, mesh, strict=True))
  settings = tiny_run.config(
    **{f'mesh.{name}': size for name, size in sizes.items()},
    **{'search.candidates': 4, 'search.steps': (1, 2), 'search.rows': (2, 2)},
    **(tiny_run.RECOVERY | {'recovery.rows': 2}),
    **overrides,
  )
  settings.model = str(folder / 'model')
  settings.data = str(folder / 'text.txt')
  return settings


@functools.cache
def home(family: str) -> pathlib.Path:
  """Holds a model, a text, and a run of them on one device, `one`."""
  folder = pathlib.Path(_FOLDER.name) / family
  tiny_run.inputs(folder, topics=4, model_type=family, **_FAMILIES[family])
  prune_on(folder, (1, 1, 1), folder / 'one')
  return folder


def prune_on(folder, mesh, workdir) -> None:
  """Runs it in this process."""
  prune.prune_workdir(config(folder, mesh), workdir, command='')


def outcome(workdir: pathlib.Path) -> tuple:
  """(counts and priorities, metrics of every step, perplexities)."""
  allocation = json.loads((workdir / 'allocation.json').read_text())
  priority = allocation.pop('priority')
  files = [workdir / f'{name}.jsonl' for name in ('metrics', 'recovery')]
  lines = [x for file in files for x in file.read_text().splitlines()]
  metrics = [json.loads(line) for line in lines]
  for line in metrics:
    del line['seconds']
  results = json.loads((workdir / 'results.json').read_text())
  perplexity = {
    name: x['ppl']
    for name, x in results.items()
    if isinstance(x, dict) and 'ppl' in x
  }
  return allocation, priority, metrics, perplexity


class SameResultCase(parameterized.TestCase):
  """Compares runs on different devices."""

  def assert_same(self, workdir, other):
    """Up to the order in which float32 numbers are summed."""
    found, expected = outcome(workdir), outcome(other)
    self.assertEqual(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-3)
    self.assertEqual(len(found[2]), len(expected[2]))
    for ours, theirs in zip(found[2], expected[2], strict=True):
      self.assertEqual(ours.keys(), theirs.keys())
      for key in ours:
        np.testing.assert_allclose(
          ours[key], theirs[key], rtol=2e-3, atol=1e-4, err_msg=key
        )
    self.assertEqual(found[3].keys(), expected[3].keys())
    for key, value in expected[3].items():
      np.testing.assert_allclose(found[3][key], value, rtol=1e-4, err_msg=key)
