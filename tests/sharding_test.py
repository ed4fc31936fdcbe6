import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from ffp_jax.errors import RequestError
from ffp_jax.models import families
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.runtime import sharding
from ffp_jax.runtime.workdir import Workdir
from tests import mesh_run, tiny_run

_SIZES = {'candidates': 2, 'fsdp': 2, 'tensor': 2}


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


def _mesh(candidates, fsdp, tensor):
  return sharding.make_mesh(candidates, fsdp, tensor)


class MakeMeshTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 1, -1), (1, 1, 8)),
    ((-1, 2, 2), (2, 2, 2)),
    ((2, -1, 1), (2, 4, 1)),
    ((1, 2, 1), (1, 2, 1)),  # some of the devices
  )
  def test_sizes(self, asked, found):
    self.assertEqual(tuple(_mesh(*asked).shape.values()), found)

  @parameterized.parameters(
    (3, 3, 1), (16, 1, -1), (-1, -1, 1), (0, 1, 1), (1, 3, -1)
  )
  def test_refused(self, *asked):
    with self.assertRaisesRegex(RequestError, f'mesh.candidates={asked[0]}'):
      _mesh(*asked)


@dataclasses.dataclass(frozen=True)
class _Device:
  """What a mesh asks of a device."""

  id: int
  slice_index: int
  platform: str = 'gpu'
  device_kind: str = ''


class PlaceTest(parameterized.TestCase):
  @parameterized.parameters(
    (2, (1, 2, 4)),
    (2, (2, 1, 4)),
    (4, (2, 2, 2)),
    (2, (4, 2, 1)),
    (2, (1, 1, 8)),
  )
  def test_first_axes_lie_across_slices(self, slices, sizes):
    devices = [_Device(i, i * slices // 8) for i in range(8)]
    placed = sharding.place(sizes, devices)
    self.assertEqual(placed.shape, sizes)
    self.assertCountEqual(placed.ravel(), devices)
    for part in np.split(placed.ravel(), slices):
      self.assertLen({x.slice_index for x in part}, 1)

  def test_parts_of_slices_are_refused(self):
    devices = [_Device(i, i // 4) for i in range(6)]
    with self.assertRaises(ValueError):
      sharding.place((1, 2, 3), devices)


class SpecTest(parameterized.TestCase):
  @parameterized.parameters(
    ((8, 4, 2, 16), ('embed', 'groups', 'heads', None), P('fsdp', 'tensor')),
    # Odd groups: their heads are split instead, or nothing is.
    (
      (8, 3, 2, 16),
      ('embed', 'groups', 'heads', None),
      P('fsdp', None, 'tensor'),
    ),
    ((8, 3, 3, 16), ('embed', 'groups', 'heads', None), P('fsdp')),
    # Too few rows: the width is split instead.
    ((1, 5, 8), ('batch', None, 'embed'), P(None, None, 'fsdp')),
    ((2, 5, 8), ('batch', None, 'embed'), P('fsdp')),
    ((7, 9), ('vocab', 'embed'), P()),
  )
  def test_each_mesh_axis_once_and_only_where_it_divides(
    self, shape, axes, expected
  ):
    found = sharding.partition_spec(shape, axes, _SIZES)
    padded = (*expected, *[None] * (len(shape) - len(expected)))
    self.assertEqual(tuple(found), padded)

  def test_every_parameter_but_norms_and_output_biases_is_split(self):
    config = ModelConfig(
      vocab=16,
      width=8,
      layers=2,
      groups=2,
      heads_per_group=2,
      head_size=4,
      ffn=8,
      positions='learned',
      norm='layer',
      gated=True,
      qkv_bias=True,
      out_bias=True,
      ffn_bias=True,
      embed_width=4,
    )
    shapes = families.param_shapes(config, jnp.float32)
    placed = sharding.param_shardings(shapes, _mesh(2, 2, 2))
    whole = {
      '/'.join(key.key for key in path)
      for path, x in jax.tree_util.tree_leaves_with_path(placed)
      if not any(x.spec)
    }
    self.assertEqual(
      whole,
      {
        'stack/attention/out_bias',
        'stack/ffn/down_bias',
        *(
          f'{norm}/norm/{leaf}'
          for norm in (
            'stack/attention_norm',
            'stack/ffn_norm',
            'final_norm',
          )
          for leaf in ('scale', 'bias')
        ),
      },
    )
    # The axis of layers stays whole: a scan reads one layer at a time.
    for x in jax.tree.leaves(placed['stack']):
      self.assertIsNone((*x.spec, None)[0])


class SideBySideTest(parameterized.TestCase):
  @parameterized.product(count=(1, 4, 6), block=(1, 2, 8), candidates=(1, 2))
  def test_is_a_map(self, count, block, candidates):
    xs = jnp.arange(count * 3.0).reshape(count, 3)

    def f(x):
      return x.sum(), {'square': sharding.constrain(x, 'embed') ** 2}

    with jax.set_mesh(_mesh(candidates, 2, 2)):
      total, rest = jax.jit(
        lambda xs: sharding.map_candidates(f, xs, block=block)
      )(xs)
    np.testing.assert_array_equal(total, xs.sum(-1))
    np.testing.assert_array_equal(rest['square'], xs**2)

  def test_without_a_mesh(self):
    xs = jnp.arange(4.0)[:, None]
    np.testing.assert_array_equal(
      sharding.map_candidates(jnp.sum, xs, block=2), xs[:, 0]
    )

  def test_candidates_lie_on_different_devices(self):
    def f(x):
      return x * 2.0

    with jax.set_mesh(_mesh(4, 1, 2)):
      step = jax.jit(lambda xs: sharding.map_candidates(f, xs, block=1))
      text = step.lower(jnp.ones((4, 8))).compile().as_text()
    # One candidate in each of the four parts.
    self.assertIn('f32[1,8]', text)


class _StoppedError(Exception):
  pass


class SameResultTest(mesh_run.SameResultCase):
  @parameterized.parameters(
    ('llama', ((1, 8, 1), (1, 1, 8), (2, 2, 2))),
    ('mistral', ((1, 2, 4),)),
    ('opt', ((2, 2, 2),)),
  )
  def test_on_any_mesh(self, family, meshes):
    folder = mesh_run.home(family)
    for mesh in meshes:
      workdir = folder / 'x'.join(map(str, mesh))
      mesh_run.prune_on(folder, mesh, workdir)
      self.assert_same(workdir, folder / 'one')

  def test_goes_on_with_other_devices(self):
    folder = mesh_run.home('llama')
    real = Workdir.append

    def append(files, line, *args):
      real(files, line, *args)
      if line['step'] == 1:
        raise _StoppedError

    workdir = folder / 'changed'
    with mock.patch.object(Workdir, 'append', append):
      with self.assertRaises(_StoppedError):
        mesh_run.prune_on(folder, (1, 1, 4), workdir)
    mesh_run.prune_on(folder, (4, 1, 1), workdir)
    self.assert_same(workdir, folder / 'one')


if __name__ == '__main__':
  absltest.main()
