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
