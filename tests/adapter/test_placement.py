"""Adapter tensors lie where their kernels do; what that can't be said of is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import smoa_jax
from smoa_jax.adapter.placement import modulation_shardings


@pytest.mark.parametrize("member", ["hira", "blocks", "bands"])
def test_an_adapter_lies_as_its_kernel_does(member):
    config = {
        "hira": smoa_jax.SmoaConfig.hira(4, target_modules=["w"]),
        "blocks": smoa_jax.SmoaConfig(rank=4, target_modules=["w"]),
        "bands": smoa_jax.SmoaConfig(rank=4, partition="spectral_bands", target_modules=["w"]),
    }[member]
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    kernel = jax.random.normal(jax.random.key(0), (3, 16, 8))
    where = NamedSharding(mesh, PartitionSpec(None, "x", "y"))
    params = smoa_jax.apply_smoa(
        {"w": {"kernel": jax.device_put(kernel, where)}}, config, jax.random.key(1)
    )
    node = params["w"]["smoa"]
    band = (None,) if member == "bands" else ()
    assert node.a.sharding.spec == PartitionSpec(None, *band, "x", None)
    assert node.b.sharding.spec == PartitionSpec(None, *band, "y", None)
    alone = smoa_jax.apply_smoa({"w": {"kernel": kernel}}, config, jax.random.key(1))["w"]["smoa"]
    np.testing.assert_array_equal(node.a, alone.a)
    short = jax.device_put(
        kernel, NamedSharding(mesh, PartitionSpec())
    )  # a spec may leave out its end
    node = smoa_jax.apply_smoa({"w": {"kernel": short}}, config, jax.random.key(1))["w"]["smoa"]
    assert node.a.sharding.is_fully_replicated


def test_a_kernel_with_a_view_has_no_sharding_to_follow():
    config = smoa_jax.SmoaConfig(
        rank=4,
        num_subspaces=1,
        partition="none",
        target_modules=["w"],
        kernel_views={"w": "| D | N H"},
    )
    params = smoa_jax.apply_smoa(
        {"w": {"kernel": np.ones((8, 2, 4), np.float32)}}, config, jax.random.key(0)
    )
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"has the view '\| D \| N H'"):
        modulation_shardings(params["w"]["smoa"], NamedSharding(mesh, PartitionSpec("x")))


def test_a_number_for_a_name_is_refused_with_the_name_to_give():
    """As ``nnx.List`` numbers its layers."""
    params = {"layers": {0: {"dense": {"kernel": np.ones((4, 4), np.float32)}}}}
    config = smoa_jax.SmoaConfig.lora(2, target_modules=["dense"])
    with pytest.raises(ValueError, match=r"got the key 0 \(int\) in layers; .* such as '0'"):
        smoa_jax.apply_smoa(params, config, jax.random.key(0))


def test_a_list_of_modules_is_refused_rather_than_skipped():
    kernel = {"kernel": np.ones((8, 8), np.float32)}
    config = smoa_jax.SmoaConfig.lora(2, target_modules=["q"])
    with pytest.raises(ValueError, match=r"got a list at layers; expected nested dicts"):
        smoa_jax.apply_smoa({"layers": [{"q": kernel}], "q": kernel}, config, jax.random.key(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 2.5},
        {"rank": 4, "ranks": (1.5, 2.5)},
        {"layers": (1.5,)},
        {"rank_pattern": {"q": 3.5}},
        {"alpha": "x"},
        {"target_modules": ["q", 3]},
    ],
)
def test_fields_of_another_type_are_refused_in_one_line(fields):
    with pytest.raises(ValueError, match=r"got \w+=.*; expected"):
        smoa_jax.SmoaConfig(**fields)
