"""Meshes and the rows that they divide."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from smoa_jax.sharding.mesh import (
    MeshConfig,
    batch_sharding,
    check_batch,
    make_mesh,
    put_batch,
    replicated,
    rows_for_mesh,
)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (1, 8, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": -1, "fsdp": 1, "tensor": 4}, (2, 1, 4)),
        ({"data": 4, "tensor": -1, "fsdp": 1}, (4, 1, 2)),
    ],
)
def test_one_axis_may_take_all_devices_that_are_left(sizes, expected):
    mesh = make_mesh(MeshConfig(**sizes))
    assert tuple(mesh.shape.items()) == tuple(
        zip(("data", "fsdp", "tensor"), expected, strict=True)
    )


def test_a_mesh_of_one_device_is_one_device():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "num_devices", "fits"),
    [
        ({}, 7, True),
        ({"fsdp": 4}, 4, True),
        ({"fsdp": 4}, 8, False),
        ({"data": 3}, 9, True),
        ({"data": 3}, 8, False),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, True),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1, False),
    ],
)
def test_a_mesh_knows_which_numbers_of_devices_can_form_it(sizes, num_devices, fits):
    assert MeshConfig(**sizes).fits(num_devices) == fits


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 2, "fsdp": 3, "tensor": 1}])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes):
    with pytest.raises(ValueError, match="expected equal numbers; change the mesh sizes"):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize("sizes", [{"data": -1, "fsdp": -1}, {"fsdp": 0}, {"tensor": -2}])
def test_sizes_without_a_meaning_are_refused(sizes):
    with pytest.raises(ValueError, match="at most one of them -1"):
        MeshConfig(**sizes)


def test_rows_go_to_data_and_fsdp_in_order_and_whole_to_tensor():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(8 * 3).reshape(8, 3)
    tokens = put_batch({"tokens": rows}, mesh)["tokens"]
    assert tokens.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert tokens.sharding.spec == P(("data", "fsdp"), None)
    np.testing.assert_array_equal(tokens, rows)
    for shard in tokens.addressable_shards:
        data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
        first = 2 * (2 * data + fsdp)
        np.testing.assert_array_equal(shard.data, rows[first : first + 2])
    assert jax.device_put(rows, replicated(mesh)).addressable_shards[3].data.shape == (8, 3)


@pytest.mark.parametrize(("rows", "needed"), [(1, 4), (4, 4), (5, 8), (12, 12)])
def test_rows_are_filled_up_to_what_the_batch_axes_divide(rows, needed):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert rows_for_mesh(rows, mesh) == needed
    check_batch(mesh, needed)
    if rows != needed:
        with pytest.raises(ValueError, match=f"got rows={rows} on a mesh of data=2 x fsdp=2"):
            check_batch(mesh, rows, "rows")
