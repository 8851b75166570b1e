"""What stands before the last axis of x is one set of rows, however it is shaped."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.modulation import modulated_matmul
from smoa_jax.adapter.tree import apply_smoa

INPUTS, OUTPUTS = 10, 7
CONFIGS = {
    "blocks": SmoaConfig(rank=5, num_subspaces=2, target_modules=["up"], dropout=0.4),
    "bands": SmoaConfig(
        rank=4, num_subspaces=2, partition="spectral_bands", target_modules=["up"], dropout=0.4
    ),
    "hira": SmoaConfig.hira(3, target_modules=["up"], dropout=0.4),
    "lora": SmoaConfig.lora(3, target_modules=["up"], dropout=0.4),
    "melora": SmoaConfig.melora(4, 2, target_modules=["up"], dropout=0.4),
}


@pytest.fixture(params=CONFIGS)
def module(request):
    kernel = jax.random.normal(jax.random.key(0), (INPUTS, OUTPUTS))
    params = apply_smoa({"up": {"kernel": kernel}}, CONFIGS[request.param], jax.random.key(1))
    node = params["up"]["smoa"]
    b = 0.3 * jax.random.normal(jax.random.key(2), node.b.shape)
    return kernel, dataclasses.replace(node, b=b)


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3), (1, 3, 2)])
def test_rows_are_rows_in_both_directions(module, shape, dtype, dropping):
    kernel, node = module
    key = jax.random.key(3) if dropping else None
    rows = int(jnp.prod(jnp.asarray(shape)))
    x = jax.random.normal(jax.random.key(4), (rows, INPUTS)).astype(dtype)
    weights = jax.random.normal(jax.random.key(5), (rows, OUTPUTS))

    def outcome(x, weights):
        def loss(x, kernel, a, b):
            changed = dataclasses.replace(node, a=a, b=b)
            y = modulated_matmul(x, kernel, changed, key)
            return jnp.sum(y.astype(jnp.float32) * weights), y

        grad = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        (dx, dkernel, da, db), y = grad(x, kernel, node.a, node.b)
        flat = dx.reshape(rows, INPUTS), y.reshape(rows, OUTPUTS)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (*flat, dkernel, da, db))

    shaped = outcome(x.reshape(*shape, INPUTS), weights.reshape(*shape, OUTPUTS))
    chex.assert_trees_all_close(shaped, outcome(x, weights), rtol=2e-5, atol=2e-5)
