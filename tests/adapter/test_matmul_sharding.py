"""A product that is told where its operands lie sums only factors across devices."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import smoa_jax
from smoa_jax.adapter.placement import MatmulSharding

BATCH, TIME, INPUTS, OUTPUTS = 8, 4, 48, 64


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def adapted_layer(config):
    kernel = 0.1 * jax.random.normal(jax.random.key(0), (INPUTS, OUTPUTS))
    params = smoa_jax.apply_smoa({"q_proj": {"kernel": kernel}}, config, jax.random.key(1))
    node = params["q_proj"]["smoa"]
    return (
        kernel,
        jax.tree.map(lambda leaf: leaf, node),
        jax.random.normal(jax.random.key(2), node.b.shape),
    )


CONFIGS = {
    "blocks": smoa_jax.SmoaConfig(rank=6, num_subspaces=3, target_modules=["q_proj"]),
    "bands": smoa_jax.SmoaConfig(
        rank=6, num_subspaces=2, partition="spectral_bands", target_modules=["q_proj"]
    ),
    "hira": smoa_jax.SmoaConfig.hira(4, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_the_unsharded_ones_and_no_weight_is_summed(mesh, name):
    import dataclasses

    kernel, node, b = adapted_layer(CONFIGS[name])
    node = dataclasses.replace(node, b=b)
    x = jax.random.normal(jax.random.key(3), (BATCH, TIME, INPUTS))
    where = MatmulSharding(mesh, batch=("data", "fsdp"), outputs=("tensor",))

    def loss(factors, kernel, x, sharding):
        adapted = dataclasses.replace(node, a=factors[0], b=factors[1])
        return jnp.sum(jnp.sin(smoa_jax.modulated_matmul(x, kernel, adapted, sharding=sharding)))

    factors = (node.a, node.b)
    expected = jax.grad(loss)(factors, kernel, x, None)

    def put(value, *spec):
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))

    lead = (None,) * (node.a.ndim - 2)
    arguments = (
        (put(node.a, *lead, "fsdp"), put(node.b, *lead, "tensor")),
        put(kernel, "fsdp", "tensor"),
        put(x, ("data", "fsdp")),
    )
    step = jax.jit(jax.grad(lambda f, k, x: loss(f, k, x, where)))
    got = step(*arguments)
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-5)
    hlo = step.lower(*arguments).compile().as_text()
    sums = re.findall(r"= \(?(f32\[[\d,]*\])[^=]*(?:all-reduce|reduce-scatter)\(", hlo)
    weight_sized = [
        s
        for s in sums
        if np.prod([int(n) for n in re.findall(r"\d+", s[3:])] or [1]) >= INPUTS * OUTPUTS // 2
    ]
    assert sums
    assert not weight_sized
