"""What arrays take of each device, and what is said when that is too much."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smoa_jax.sharding.memory import OutOfMemoryError, bytes_per_device, exhaustion_explained
from smoa_jax.sharding.mesh import MeshConfig, make_mesh


def test_an_exhausted_device_is_one_line_with_the_remedy():
    with (
        pytest.raises(OutOfMemoryError, match=r"; lower batch_size=8$") as error,
        exhaustion_explained("lower batch_size=8"),
    ):
        jnp.zeros((1 << 48,), jnp.float32).block_until_ready()
    assert "\n" not in str(error.value)
    assert "got too little memory on cpu (asked for another" in str(error.value)


def test_other_errors_of_xla_pass():
    def fail(_):
        raise ValueError("something else")

    with pytest.raises(jax.errors.JaxRuntimeError), exhaustion_explained("lower it"):
        jax.block_until_ready(
            jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), jnp.zeros(()))
        )


def test_bytes_are_those_of_the_fullest_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    split = NamedSharding(mesh, PartitionSpec("fsdp", None))
    everywhere = NamedSharding(mesh, PartitionSpec())
    tree = {
        "split": jax.device_put(jnp.zeros((12, 5), jnp.float32), split),
        "everywhere": jax.device_put(jnp.zeros((7,), jnp.bfloat16), everywhere),
    }
    assert bytes_per_device(tree) == 3 * 5 * 4 + 7 * 2
