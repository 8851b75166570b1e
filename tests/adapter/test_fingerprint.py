"""The fingerprint of a tree in memory tells bases apart, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smoa_jax.adapter.fingerprint import tree_fingerprint


def base_tree() -> dict:
    values = np.arange(3 * 64 * 32, dtype=np.float32).reshape(3, 64, 32) % 251
    return {"layers": {"q_proj": {"kernel": values}}, "norm": {"scale": np.ones(5, np.float32)}}


def test_it_depends_on_neither_dtype_nor_order_nor_sharding():
    base = base_tree()
    expected = tree_fingerprint(base)
    assert tree_fingerprint(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), base)) == (
        expected
    )
    assert tree_fingerprint(dict(reversed(base.items()))) == expected
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=types)
    kernel = base["layers"]["q_proj"]["kernel"]
    spread = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")))
    assert tree_fingerprint({**base, "layers": {"q_proj": {"kernel": spread}}}) == expected


@pytest.mark.parametrize("place", [(0, 0, 0), (2, 63, 31)])
def test_a_value_at_either_end_a_name_and_a_shape_change_it(place):
    base = base_tree()
    kernel = base["layers"]["q_proj"]["kernel"]
    other = kernel.copy()
    other[place] += 1
    variants = [
        {**base, "layers": {"q_proj": {"kernel": other}}},
        {**base, "layers": {"k_proj": {"kernel": kernel}}},
        {**base, "layers": {"q_proj": {"kernel": kernel.reshape(3, 32, 64)}}},
    ]
    assert len({tree_fingerprint(tree) for tree in (base, *variants)}) == 4


#: Of ``arange % 251`` in these shapes, as the first version wrote them into adapters.
GOLDEN = {
    (): "0188dd2f912e7897",
    (5,): "ef2d30f5a906e149",
    (1025,): "a0698946eac28e85",
    (1, 1, 7): "99d2726f982efb60",
    (3, 64, 32): "77c1ba5efafba90b",
    (2, 1, 5000): "30d9b113ff8f8f95",
    (5000, 3): "da2e20eee1ce2482",
    (1, 40, 1, 30): "1617c5937b24b83d",
    (2000, 1): "ef12f7c68f46d9ac",
    (7, 1023): "538c7e5e41071dc0",
    (2, 3, 5, 70): "599dceee38584364",
}


@pytest.mark.parametrize("shape", GOLDEN, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_it_is_what_it_was_for_every_shape(shape, dtype):
    values = (np.arange(np.prod(shape, dtype=int)) % 251).reshape(shape).astype(np.float32)
    for leaf in (values.astype(dtype), jnp.asarray(values, dtype)):
        assert tree_fingerprint({"w": leaf})[:16] == GOLDEN[shape]


@pytest.mark.parametrize("spec", [("fsdp", None, None), (None, "fsdp", "tensor"), (None,)])
def test_of_a_sharded_kernel_only_the_edges_are_ever_copied(spec, monkeypatch):
    values = (np.arange(4 * 128 * 96) % 251).reshape(4, 128, 96).astype(np.float32)
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=types)
    kernel = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
    copied = []
    cut = jax.lax.dynamic_slice

    def watched(array, starts, sizes):
        copied.append(int(np.prod(sizes)))
        return cut(array, starts, sizes)

    monkeypatch.setattr(jax.lax, "dynamic_slice", watched)
    got = tree_fingerprint({"w": kernel})
    assert 2 * 1024 <= sum(copied) < 2 * 1024 + 2 * 2 * 96
    assert got == tree_fingerprint({"w": values})
