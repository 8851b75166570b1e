"""Collectives of a compiled program: kinds, bytes, and loops as often as they run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from smoa_jax.planning.program_text import collective_bytes, collectives
from smoa_jax.sharding.mesh import MeshConfig, make_mesh

#: As a TPU's compiler writes it: no trip count, one collective in two fusions, results after
#: operands where it starts, a nested loop.
TPU = """\
HloModule step

%fused_computation.1 (p: bf16[2,8]) -> bf16[16,8] {
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%async_collective_fusion.2 (p: bf16[2,8]) -> bf16[16,8] {
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%inner_cond (p: (u32[], bf16[4])) -> pred[] {
  %constant.3 = u32[]{:T(128)} constant(8)
  ROOT %lt = pred[] compare(%i, %constant.3), direction=LT
}

%inner_body (p: (u32[], bf16[4])) -> (u32[], bf16[4]) {
  %start = (bf16[4], bf16[4], u32[], u32[]) collective-permute-start(%x), channel_id=9
  %done = bf16[4] collective-permute-done(%start)
}

%cond (p: (s32[], bf16[4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[] compare(%i, %constant.1), direction=LT
}

%body (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %f = bf16[16,8] fusion(%x), kind=kOutput, calls=%fused_computation.1
  %g = bf16[16,8] fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  %w = (u32[], bf16[4]) while(%t), condition=%inner_cond, body=%inner_body
  %r = (f32[3], f32[10]) all-reduce(%a, %b), channel_id=1, to_apply=%sum
  %s = f32[3] all-reduce(%a), channel_id=1, to_apply=%sum
}

ENTRY %main (p: bf16[4]) -> bf16[4] {
  %loop = (s32[], bf16[4]) while(%t), condition=%cond, body=%body
  %once = f32[6] all-to-all(%y), channel_id=1
}
"""


def test_a_tpus_program_is_read_with_its_loops():
    assert collective_bytes(TPU) == {
        "all-gather": 5 * 16 * 8 * 2,
        "collective-permute": 5 * 8 * 4 * 2,
        "all-reduce": 5 * (3 + 10 + 3) * 4,
        "all-to-all": 24,
    }


def test_a_scan_s_collective_counts_as_often_as_the_scan_runs():
    mesh = make_mesh(MeshConfig(fsdp=8))

    def place(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def layers(x, kernels):
        return jax.lax.scan(lambda y, kernel: (jnp.tanh(y @ kernel), None), x, kernels)[0]

    given = (
        jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=place("fsdp")),
        jax.ShapeDtypeStruct((6, 32, 32), jnp.float32, sharding=place(None, "fsdp")),
    )
    program = jax.jit(layers, out_shardings=place("fsdp")).lower(*given).compile().as_text()
    assert {(each.kind, each.values, each.times) for each in collectives(program or "")} == {
        ("all-gather", 32 * 32, 6)
    }
