import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ffp_jax.runtime import collectives, sharding

# As the compiler writes it, less what is not read. Device 0 to 3 are a mesh of
# 2 x 2.
_HLO = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%piece.1 (p: bf16[8,16]) -> bf16[8,32] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %gather.1 = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), \
channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}, \
frontend_attributes={chain_id="0"}
}

%piece.2 (p.2: bf16[8,16]) -> bf16[8,32] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  ROOT %gather.2 = bf16[8,32]{1,0} all-gather(%p.2), channel_id=7, \
replica_groups=[2,2]<=[2,2]T(1,0), frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.3 (q: f32[8,4]) -> f32[4,4] {
  %q = f32[8,4]{1,0} parameter(0)
  %reduced = f32[8,4]{1,0} all-reduce(%q), channel_id=8, \
replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %part = f32[4,4]{1,0} slice(%reduced), slice={[0:4], [0:4]}
}

%piece.3 (r: f32[4]) -> f32[8] {
  %r = f32[4]{0} parameter(0)
  ROOT %gather.3 = f32[8]{0} all-gather(%r), channel_id=6, \
replica_groups={{0,1},{2,3}}, frontend_attributes={chain_id="1"}
}

%piece.4 (r.2: f32[4]) -> f32[8] {
  %r.2 = f32[4]{0} parameter(0)
  ROOT %gather.4 = f32[8]{0} all-gather(%r.2), channel_id=6, \
replica_groups={{0,1},{2,3}}, frontend_attributes={chain_id="1"}
}

%inner_body (i: (s32[], bf16[8,16])) -> (bf16[8,16], u32[]) {
  %i = (bf16[8,16]{1,0}, u32[]) parameter(0)
  %half = bf16[8,16]{1,0} get-tuple-element(%i), index=0
  %count = u32[] get-tuple-element(%i), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%count, %two)
  %start = bf16[8,32]{1,0} fusion(%half), kind=kCustom, calls=%piece.1
  %done = bf16[8,32]{1,0} fusion(%half), kind=kCustom, calls=%piece.2
  %beside = f32[8]{0} fusion(%half), kind=kOutput, calls=%piece.4
  ROOT %out = (bf16[8,16]{1,0}, u32[]) tuple(%half, %next)
}

%inner_condition (c: (bf16[8,16], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(11)
  %c = (bf16[8,16]{1,0}, u32[]) parameter(0)
  %count.1 = u32[] get-tuple-element(%c), index=1
  ROOT %less = pred[]{:T(512)} compare(%count.1, %limit), direction=LT
}

%outer_body (o: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %o = (s32[], bf16[8,16]{1,0}) parameter(0)
  %count.2 = s32[] get-tuple-element(%o), index=0
  %again = s32[] copy(%count.2)
  %one = s32[] constant(1)
  %next.2 = s32[] add(%again, %one)
  %start.2 = f32[8]{0} fusion(%o), kind=kCustom, calls=%piece.3
  %scatter = f32[4,4]{1,0} fusion(%o), kind=kCustom, \
calls=%all-reduce-scatter.3
  %first = u32[]{:T(128)} constant(1)
  %first.2 = u32[]{:T(128)} copy(%first)
  %begin = (bf16[8,16]{1,0}, /*index=1*/u32[]) tuple(%o, /*index=1*/%first.2)
  %w = (bf16[8,16]{1,0}, u32[]) while(%begin), condition=%inner_condition, \
body=%inner_body
  ROOT %out.2 = (s32[], bf16[8,16]{1,0}) tuple(%next.2, %w)
}

%outer_condition (d: (s32[], bf16[8,16])) -> pred[] {
  %seven = s32[] constant(7)
  %three = s32[] constant(3)
  %d = (s32[], bf16[8,16]{1,0}) parameter(0)
  %count.3 = s32[] get-tuple-element(%d), index=0
  ROOT %less.2 = pred[] compare(%count.3, %three), direction=LT
}

%until_body (u: (s32[], f32[2])) -> (s32[], f32[2]) {
  %u = (s32[], f32[2]{0}) parameter(0)
  %swapped = (f32[2]{0}, f32[2]{0}, u32[], u32[]) \
collective-permute-start(%u), channel_id=9, \
source_target_pairs={{0,1},{1,0}}
  %swap = f32[2]{0} collective-permute-done(%swapped)
  ROOT %v = (s32[], f32[2]{0}) tuple(%u, %swap)
}

%until (t: (s32[], f32[2])) -> pred[] {
  %nine = s32[] constant(9)
  %t = (s32[], f32[2]{0}) parameter(0)
  %count.4 = s32[] get-tuple-element(%t), index=0
  %less.3 = pred[] compare(%count.4, %nine), direction=LT
  %bad = pred[] is-finite(%t)
  ROOT %both = pred[] and(%less.3, %bad)
}

ENTRY %main (a: f32[6]) -> f32[6] {
  %a = f32[6]{0} parameter(0)
  %pair = (s32[5]{0:T(128)}, f32[]{:T(128)}) all-reduce(%a, %a), channel_id=1, \
replica_groups=mesh['x'=2,'y'=2] {'x'}, to_apply=%add
  %exchanged = bf16[4,8]{1,0} all-to-all(%a), channel_id=2, \
replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x','y'}
  %scattered = f32[3]{0} reduce-scatter(%a), channel_id=3, \
replica_groups=mesh['z'=4] {'z':(2)2}, to_apply=%add
  %begun = ((f32[6]{0:T(8,128)}), f32[12]{0:T(8,128)}) all-gather-start(%a), \
channel_id=4, replica_groups={{0,2},{1,3}}, dimensions={0}
  %ended = f32[12]{0} all-gather-done(%begun)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[8,16]{1,0}) tuple(%zero, %a)
  %loop = (s32[], bf16[8,16]{1,0}) while(%init), condition=%outer_condition, \
body=%outer_body
  ROOT %last = (s32[], f32[2]{0}) while(%loop), condition=%until, \
body=%until_body
}
"""


class FindTest(parameterized.TestCase):
  def test_against_counts_by_hand(self):
    found = [
      (x.kind, x.result, x.size, x.times, x.loops, x.groups.tolist())
      for x in collectives.find_collectives(_HLO)
    ]
    rows, columns = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    self.assertEqual(
      found,
      [
        # Twice half of 5 x 4 + 4 bytes.
        ('all-reduce', 's32[5] f32[]', 24, 1, 0, columns),
        # Three quarters of 4 x 8 x 2 bytes.
        ('all-to-all', 'bf16[4,8]', 48, 1, 0, [[0, 2, 1, 3]]),
        # As much as the part that is kept, from the one other device.
        ('reduce-scatter', 'f32[3]', 12, 1, 0, rows),
        # Half of 12 x 4 bytes.
        ('all-gather', 'f32[12]', 24, 1, 0, columns),
        # Half of 8 x 4 bytes, in the outer loop, beside the inner one.
        ('all-gather', 'f32[8]', 16, 3, 1, rows),
        # Half of 8 x 4 x 4 bytes, in the outer loop.
        ('reduce-scatter', 'f32[8,4]', 64, 3, 1, rows),
        # Half of 8 x 32 x 2 bytes, in the inner loop, in two pieces.
        # That loop counts from 1 to 11 in twos.
        ('all-gather', 'bf16[8,32]', 256, 15, 2, columns),
        # All of 2 x 4 bytes, in a loop that its data ends.
        ('collective-permute', 'f32[2]', 8, 1, 1, [[0, 1], [1, 0]]),
      ],
    )

  @parameterized.parameters(
    ("mesh['z'=4] {'z':(1)2}", [[0, 2], [1, 3]]),
    ("mesh['z'=4] {'z':(2)2}", [[0, 1], [2, 3]]),
    ("mesh['a'=2,'z'=4] {'a','z':(2)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ('[4,2]<=[2,2,2]T(1,0,2)', [[0, 1], [4, 5], [2, 3], [6, 7]]),
  )
  def test_groups(self, text, expected):
    hlo = (
      'ENTRY %main (a: f32[8]) -> f32[8] {\n'
      f'  ROOT %r = f32[8]{{0}} all-reduce(%a), replica_groups={text}\n}}'
    )
    (found,) = collectives.find_collectives(hlo)
    self.assertEqual(found.groups.tolist(), expected)

  def test_what_comes_from_another_slice_comes_through_the_host(self):
    hlo = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %sent = (f32[8]{0}, u32[], token[]) send(%a, %t), is_host_transfer=true
  %r = (bf16[3,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%t), \
channel_id=2, is_host_transfer=true
  %else = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=3
  ROOT %done = (bf16[3,8]{1,0}, token[]) recv-done(%r), is_host_transfer=true
}
"""
    (found,) = collectives.find_collectives(hlo)
    self.assertEqual(found.kind, collectives.BETWEEN_SLICES)
    self.assertEqual((found.result, found.size), ('bf16[3,8]', 48))
    self.assertEmpty(found.groups)

  @parameterized.parameters(
    'true_computation=%work, false_computation=%rest',
    'branch_computations={%rest, %work}',
  )
  def test_a_branch_counts_as_often_as_it_is_taken(self, branches):
    hlo = f"""
%rest (a: f32[8]) -> f32[8] {{
  ROOT %a = f32[8]{{0}} parameter(0)
}}

%work (b: f32[8]) -> f32[8] {{
  %b = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%b), replica_groups={{{{0,1}}}}
}}

ENTRY %main (p: pred[], x: f32[8]) -> f32[8] {{
  %p = pred[] parameter(0)
  %x = f32[8]{{0}} parameter(1)
  ROOT %y = f32[8]{{0}} conditional(%p, %x, %x), {branches}
}}
"""
    (found,) = collectives.find_collectives(hlo, taken=0.25)
    self.assertEqual((found.size, found.times, found.loops), (32, 0.25, 0))
    (found,) = collectives.find_collectives(hlo)
    self.assertEqual(found.times, 1)

  def test_an_unknown_form_is_no_group(self):
    hlo = 'ENTRY %m (a: f32[8]) -> f32[8] {\n  %r = f32[8]{0} all-reduce(%a)\n}'
    with self.assertRaisesRegex(ValueError, 'unknown form: %r = '):
      collectives.find_collectives(hlo)

  def test_against_a_compiled_loop(self):
    """A product over a split axis, in two loops of three and five."""
    mesh = sharding.make_mesh(1, 2, 4)

    def step(x, weight):
      def inner(x, _):
        return jnp.tanh(x @ weight), None

      def outer(x, _):
        return jax.lax.scan(inner, x, length=5)[0], None

      return jax.lax.scan(outer, x, length=3)[0]

    x = jax.ShapeDtypeStruct(
      (6, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, None))
    )
    weight = jax.ShapeDtypeStruct(
      (16, 16), jnp.float32, sharding=NamedSharding(mesh, P('tensor', None))
    )
    hlo = jax.jit(step).lower(x, weight).compile().as_text()
    (found,) = collectives.find_collectives(hlo)
    self.assertEqual(found.kind, 'all-reduce')
    self.assertEqual((found.times, found.loops), (15, 2))
    self.assertEqual(found.size, 2 * 6 * 16 * 4 * 3 // 4)
    np.testing.assert_array_equal(
      np.sort(found.groups), np.arange(8).reshape(2, 4)
    )


if __name__ == '__main__':
  absltest.main()
