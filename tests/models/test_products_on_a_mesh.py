"""A training step on a mesh: adapted products move what LoRA's do, and are those of one device.

Read off the compiled program of eight forced devices: each product and pass gathers W once, and
only factors are summed across devices.
"""

from __future__ import annotations

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smoa_jax import SmoaConfig, apply_smoa, combine, partition
from smoa_jax.adapter.placement import MatmulSharding, ProductShardings
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.decoder import Decoder, init_params
from smoa_jax.planning.program_text import collectives
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from smoa_jax.sharding.rules import activation_constraint, param_shardings, product_shardings

CONFIG = DecoderConfig(
    vocab_size=64,
    embed_dim=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    mlp_dim=96,
    rope_base=1e4,
    norm_epsilon=1e-5,
    tie_embeddings=True,
    max_positions=64,
)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
MESHES = {
    "fsdp": {"fsdp": 8},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
ADAPTERS = {
    "lora": SmoaConfig.lora(4, target_modules="all-linear"),
    "blocks": SmoaConfig(rank=4, target_modules="all-linear"),
    "bands": SmoaConfig(rank=4, partition="spectral_bands", target_modules="all-linear"),
    "dropout": SmoaConfig(rank=4, dropout=0.3, target_modules="all-linear"),
}
WEIGHT = 64 * 64 // 8  # values: no factor is as large, the smallest part of a weight is


@pytest.fixture(scope="module")
def base():
    return init_params(CONFIG, jax.random.key(0))


def compiled(base, config, axes, dtype=jnp.float32):
    """Loss and gradients of a step on a mesh, and its program."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])
    params = apply_smoa(base, config, jax.random.key(2))
    trainable, frozen = partition(params)
    params = combine(jax.tree.map(lambda leaf: leaf + 0.01, trainable), frozen)
    trainable, frozen = partition(jax.device_put(params, param_shardings(params, mesh)))
    model = Decoder(
        CONFIG,
        dtype=dtype,
        remat="projections",
        constrain=activation_constraint(mesh),
        products=product_shardings(base, mesh),
    )
    rngs = {"dropout": jax.random.key(5)} if config.dropout else None

    def loss(trainable, frozen, tokens):
        variables = {"params": combine(trainable, frozen)}
        chosen = jax.nn.log_softmax(model.apply(variables, tokens[:, :-1], rngs=rngs))
        return -jnp.take_along_axis(chosen, tokens[:, 1:, None], axis=-1).mean()

    places = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    arguments = (trainable, frozen, jax.device_put(TOKENS, rows))
    program = step.lower(*arguments).compile()
    return *program(*arguments), moved(program.as_text())


def moved(program: str) -> dict[str, collections.Counter]:
    """By kind of collective, how many arrays of how many values come out of it."""
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for each in collectives(program):
        if each.dtype in ("f32", "bf16"):
            found[each.kind][each.values] += 1
    return found


def values(counter: collections.Counter, least: int = 0) -> int:
    return sum(size * count for size, count in counter.items() if size >= least)


@pytest.mark.parametrize("name", ["blocks", "dropout", "bands"])
@pytest.mark.parametrize("mesh", MESHES)
def test_an_adapted_step_moves_no_more_than_loras(base, mesh, name):
    *_, plain = compiled(base, ADAPTERS["lora"], MESHES[mesh])
    *_, ours = compiled(base, ADAPTERS[name], MESHES[mesh])
    gathered = values(plain["all-gather"], WEIGHT)
    # A band of the weight is a second weight, and lies divided as the first one does.
    assert values(ours["all-gather"], WEIGHT) <= gathered * (2 if name == "bands" else 1)
    for kind in ("all-reduce", "reduce-scatter", "collective-permute", "all-to-all"):
        # Dropout's own path adds a sum of dx where outputs are divided, as activations are.
        twice = 2 if name == "dropout" and kind == "all-reduce" else 1
        assert values(ours[kind]) <= twice * values(plain[kind]) * 1.2, kind
    assert values(ours["all-reduce"]) > 0


@pytest.mark.parametrize("name", ["blocks", "dropout", "bands"])
def test_a_step_on_a_mesh_is_that_of_one_device(base, name):
    alone = compiled(base, ADAPTERS[name], {"data": 1, "fsdp": 1, "tensor": 1})[:2]
    for axes in MESHES.values():
        loss, gradients, _ = compiled(base, ADAPTERS[name], axes)
        assert float(loss) == pytest.approx(float(alone[0]), abs=1e-5)
        for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone[1]), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
            assert np.abs(np.asarray(other)).max() > 1e-5


def test_the_rules_of_kernels_say_how_their_products_are_divided(base):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    found = product_shardings(base, mesh)
    columns = MatmulSharding(mesh, batch=("fsdp",), outputs=("tensor",))
    rows = MatmulSharding(mesh, batch=("fsdp",), inputs=("tensor",))
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert found.of(name) == columns
    for name in ("o_proj", "down_proj"):
        assert found.of(name) == rows
    assert found.of("lm_head") is found.of(None) is None
    alone = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    assert product_shardings(base, alone) == ProductShardings()


def test_rows_that_the_mesh_does_not_divide_are_refused(base):
    from smoa_jax import modulated_matmul

    mesh = make_mesh(MeshConfig(fsdp=8))
    params = apply_smoa(base, ADAPTERS["blocks"], jax.random.key(2))
    module = jax.tree.map(lambda leaf: leaf[0], params["layers"]["mlp"]["up_proj"])
    where = product_shardings(base, mesh).of("up_proj")
    with pytest.raises(ValueError, match=r"got x\(6, 5, 64\) over fsdp=8; expected rows first"):
        modulated_matmul(jnp.ones((6, 5, 64)), module["kernel"], module["smoa"], sharding=where)
