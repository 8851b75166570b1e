"""A decoder under other labels is the same decoder, and aligned blocks are slices of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax import SmoaConfig, apply_smoa, merge_smoa, plan_spectra
from smoa_jax.adapter.diagonal import pieces
from smoa_jax.adapter.relabelling import Relabelling, relabelling_of
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.stacks import layer_stacks
from smoa_jax.models.symmetry import shared_axes
from tests.models import tiny

TOKENS = tiny.tokens(2, 7)
ALIGNED = SmoaConfig(
    rank=8,
    num_subspaces=3,
    partition="aligned_blocks",
    target_modules=["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"],
)


def logits(config, params):
    return Decoder(config, dtype=jnp.float32).apply({"params": params}, TOKENS)


def axes_of(config):
    table = shared_axes(config)
    return {axis for axes in table.values() for axis in axes if axis is not None}


def shuffled(config, seed=0):
    """A relabelling of every axis that may have one."""
    rng, table, orders = np.random.default_rng(seed), shared_axes(config), {}
    stacks = {"/".join(stack.path): stack for stack in layer_stacks(config)}
    for axis in axes_of(config):
        stack = stacks.get(axis.name.rsplit("/", 1)[0])
        size = axis.groups or (stack.shape.mlp_dim if stack else config.embed_dim)
        layers = len(stack.layers) if stack and axis.per_layer else 1
        rows = np.stack([rng.permutation(size) for _ in range(layers)])
        orders[axis] = rows if axis.per_layer else rows[0]
    return Relabelling(table, orders)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_any_relabelling_leaves_the_logits_as_they_are(family):
    config = tiny.FAMILIES[family]
    params, labels = tiny.params_of(config), shuffled(config)
    moved = labels.apply(params)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(moved), strict=True
    ):
        keys = tuple(key.key for key in path)
        stays = not any(axis in labels.orders for axis in labels.table.get(keys, ()))
        assert stays == bool(jnp.array_equal(leaf, other)) or len(labels.orders) == 0, keys
    expected = logits(config, params)
    np.testing.assert_allclose(logits(config, moved), expected, rtol=2e-4, atol=2e-4)
    back = labels.inverse().apply(moved)
    assert all(
        jnp.array_equal(left, right)
        for left, right in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True)
    )


def adapted(config, base, adapter=ALIGNED):
    spectra = plan_spectra(base, adapter, shared_axes=shared_axes(config))
    params = apply_smoa(base, adapter, jax.random.key(1), spectra)
    for path, node, _ in find_modulations(params).values():
        b = 0.3 * jax.random.normal(jax.random.key(len(path)), node.b.shape)
        module = params
        for key in path:
            module = module[key]
        module["smoa"] = dataclasses.replace(node, b=b)
    return params


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "smollm3", "gemma4_e2b"])
def test_aligned_blocks_become_slices_and_compute_the_same(family):
    config = tiny.FAMILIES[family]
    if family == "llama":  # two groups of heads for three blocks elsewhere: cuts run through one
        config = dataclasses.replace(config, num_kv_heads=6)
    params = adapted(config, tiny.params_of(config))
    labels = relabelling_of(params, shared_axes(config))
    assert labels is not None
    nodes = find_modulations(params)
    assert labels.sliced == {(*path, "smoa") for path, *_ in nodes.values()}
    moved = labels.apply(params)
    for _, node, _ in find_modulations(moved).values():
        assert node.contiguous
        for ids in (node.in_block, node.out_block):
            assert jnp.array_equal(ids, jnp.broadcast_to(pieces(ids.shape[-1], 3), ids.shape))
    assert not all(
        jnp.array_equal(node.in_block, find_modulations(moved)[name][1].in_block)
        for name, (_, node, _) in nodes.items()
    )
    expected = logits(config, params)
    assert float(jnp.abs(expected - logits(config, tiny.params_of(config))).max()) > 1e-2
    np.testing.assert_allclose(logits(config, moved), expected, rtol=5e-5, atol=5e-5)
    merged = merge_smoa(moved)
    np.testing.assert_allclose(logits(config, merged), expected, rtol=5e-5, atol=5e-5)


def test_ids_agree_wherever_kernels_share_an_axis_and_groups_of_heads_stay_whole():
    config = dataclasses.replace(tiny.CONFIG, num_kv_heads=6)
    nodes = find_modulations(adapted(config, tiny.params_of(config)))
    by_name = {name.rsplit(".", 1)[-1]: node for name, (_, node, _) in nodes.items()}
    residual = by_name["q_proj"].in_block
    assert residual.std() > 0
    assert jnp.array_equal(residual, jnp.broadcast_to(residual[:1], residual.shape))
    for name in ("k_proj", "gate_proj"):
        assert jnp.array_equal(by_name[name].in_block, residual)
    for name in ("o_proj", "down_proj"):
        assert jnp.array_equal(by_name[name].out_block, residual)
    assert jnp.array_equal(by_name["gate_proj"].out_block, by_name["down_proj"].in_block)
    assert not jnp.array_equal(by_name["down_proj"].in_block[0], by_name["down_proj"].in_block[1])
    heads = by_name["q_proj"].out_block.reshape(config.num_layers, 6, -1)
    assert jnp.array_equal(heads, jnp.broadcast_to(heads[..., :1], heads.shape))
    assert jnp.array_equal(by_name["o_proj"].in_block, by_name["q_proj"].out_block)


def test_spectral_ids_that_disagree_give_no_relabelling():
    config = tiny.CONFIG
    spectral = dataclasses.replace(ALIGNED, partition="spectral_blocks")
    assert (
        relabelling_of(adapted(config, tiny.params_of(config), spectral), shared_axes(config))
        is None
    )
