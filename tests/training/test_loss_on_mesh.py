"""The loss of a divided head: one device's value and gradients, and a head that is nowhere whole.

The vocabulary (1052) is no multiple of eight, rows have uneven masks and no two are alike; the
largest array that is allowed is read off the compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.tree import apply_smoa, combine, partition
from smoa_jax.models.decoder import Decoder, init_params
from smoa_jax.sharding.mesh import MeshConfig, batch_sharding, make_mesh, put_batch
from smoa_jax.sharding.rules import (
    activation_constraint,
    head_sharding,
    param_shardings,
    product_shardings,
)
from smoa_jax.training.step import batch_loss, hidden_loss
from tests.models import tiny

ROWS, LENGTH, CHUNK = 8, 11, 3
SIZES = {
    "vocab_size": 1052,
    "embed_dim": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 24,
    "num_layers": 2,
}
MODELS = {
    "own": dataclasses.replace(tiny.CONFIG, **SIZES),
    "tied": dataclasses.replace(tiny.CONFIG, **SIZES, tie_embeddings=True),
    "capped": dataclasses.replace(tiny.CONFIG, **SIZES, tie_embeddings=True, final_soft_cap=1.5),
}
MESHES = {
    "fsdp": {"data": 1, "fsdp": 8, "tensor": 1},
    "tensor": {"data": 1, "fsdp": 1, "tensor": 2},
    "both": {"data": 1, "fsdp": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "data": {"data": 4, "fsdp": 1, "tensor": 1},
}
LAYERS = ["q_proj", "down_proj"]
ADAPTERS = {
    "layers": SmoaConfig(rank=4, target_modules=LAYERS),
    "head": SmoaConfig(rank=4, target_modules=[*LAYERS, "lm_head"]),
    "head_bands": SmoaConfig(
        rank=4, partition="spectral_bands", target_modules=[*LAYERS, "lm_head"]
    ),
    "head_slices": SmoaConfig(
        rank=4, partition="contiguous_blocks", target_modules=[*LAYERS, "lm_head"]
    ),
    "head_dropout": SmoaConfig(rank=4, dropout=0.3, target_modules=[*LAYERS, "lm_head"]),
}
#: Model, adapter and the meshes on which to try them; every option of any occurs.
CASES = [
    ("tied", "layers", ("fsdp", "both")),
    ("capped", "layers", ("all",)),
    ("own", "head", ("tensor", "all", "data")),
    ("own", "head_bands", ("both",)),
    ("own", "head_slices", ("both",)),
    ("own", "head_dropout", ("fsdp", "both")),
]


def batch_of_rows():
    rng = np.random.default_rng(3)
    mask = np.zeros((ROWS, LENGTH), np.float32)
    for row, count in enumerate((1, 9, 0, 3, 7, 2, 10, 5)):
        mask[row, LENGTH - 1 - count : LENGTH - 1] = rng.uniform(0.5, 2.0, count)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[4, 6:] = 2
    targets = rng.integers(0, 1052, (ROWS, LENGTH)).astype(np.int32)
    # The first columns of the second half are where a part of the first one has its padding.
    targets[1, 2:5], targets[7, 6:9] = (526, 527, 528), (0, 525, 1051)
    return {
        "tokens": rng.integers(0, 1052, (ROWS, LENGTH)).astype(np.int32),
        "targets": targets,
        "loss_mask": mask,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segment_ids": segments,
    }


BATCH = batch_of_rows()


HIDDEN = np.random.default_rng(4).normal(size=(ROWS, LENGTH, 16)).astype(np.float32)
ALONE = {"data": 1, "fsdp": 1, "tensor": 1}


@functools.cache
def params_of(model: str, adapter: str):
    """An adapted model whose factors have all moved, so that each has a gradient."""
    base = init_params(MODELS[model], jax.random.key(0))
    trainable, frozen = partition(apply_smoa(base, ADAPTERS[adapter], jax.random.key(1)))
    leaves, structure = jax.tree.flatten(trainable)
    rng = np.random.default_rng(2)
    moved = [leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return combine(jax.tree.unflatten(structure, moved), frozen)


def on_mesh(model: str, adapter: str, axes: dict[str, int], only: tuple[str, ...] = ()):
    """Mesh, decoder, and the two halves of the params (or of some modules) where they lie."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])
    params = params_of(model, adapter)
    decoder = Decoder(
        MODELS[model],
        dtype=jnp.float32,
        constrain=activation_constraint(mesh),
        products=product_shardings(params, mesh),
        head=head_sharding(params, mesh),
    )
    params = {name: node for name, node in params.items() if not only or name in only}
    return mesh, decoder, *partition(jax.device_put(params, param_shardings(params, mesh)))


def head_loss(model: str, adapter: str, axes: dict[str, int], *, gradients: bool = True):
    """The loss, with its gradients by the head's factors and hidden states or alone."""
    mesh, decoder, trainable, frozen = on_mesh(model, adapter, axes, ("embed_tokens", "lm_head"))
    key = jax.random.key(5) if ADAPTERS[adapter].dropout else None

    def loss(trainable, hidden, frozen, batch):
        return hidden_loss(decoder, trainable, frozen, hidden, batch, CHUNK, key)

    batch = put_batch(BATCH, mesh)
    arguments = trainable, jax.device_put(HIDDEN, batch_sharding(mesh, 3)), frozen, batch
    run = jax.value_and_grad(loss, argnums=(0, 1)) if gradients else loss
    return jax.device_get(jax.jit(run)(*arguments))


@pytest.mark.parametrize(("model", "adapter", "meshes"), CASES)
def test_loss_and_gradients_are_those_of_one_device(model, adapter, meshes):
    expected, gradients = head_loss(model, adapter, ALONE)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients))
    for name in meshes:
        loss, found = head_loss(model, adapter, MESHES[name])
        np.testing.assert_allclose(loss, expected, rtol=1e-5, err_msg=name)
        chex.assert_trees_all_close(found, gradients, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("adapter", ["head", "head_dropout"])
def test_the_value_alone_is_that_of_the_pass_with_gradients(adapter):
    values = [
        head_loss("own", adapter, MESHES["both"], gradients=gradients)
        for gradients in (True, False)
    ]
    np.testing.assert_allclose(values[1], values[0][0], rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "mesh"), [("own", "fsdp"), ("tied", "both"), ("own", "all"), ("capped", "all")]
)
def test_no_device_holds_more_of_the_head_or_of_logits_than_its_part(model, mesh):
    """Read off a whole step's program, with the lookup of the tokens' embeddings."""
    axes = MESHES[mesh]
    mesh, decoder, trainable, frozen = on_mesh(model, "layers", axes)

    def loss(trainable, frozen, batch):
        return batch_loss(decoder, trainable, frozen, batch, CHUNK)

    arguments = trainable, frozen, put_batch(BATCH, mesh)
    program = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile().as_text()
    arrays = {
        f"{kind}[{dims}]": math.prod(map(int, dims.split(",")))
        for kind, dims in re.findall(r"\b(\w+)\[([\d,]+)\]", program or "")
    }
    columns = math.ceil(1052 // axes["tensor"] / axes["fsdp"])
    largest = max(16 * columns, ROWS // axes["data"] * CHUNK * columns)
    assert largest <= 1052 * 16 // 4
    assert {name for name, values in arrays.items() if values > largest} == set()
    assert 16 * columns in arrays.values()
