"""The laws of the method, each one a test; numbers to compare with come from `oracle.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import smoa_jax
from smoa_jax import SmoaConfig
from tests.adapter import oracle

MEMBERS = {
    "lora": SmoaConfig.lora(3),
    "hira": SmoaConfig.hira(3),
    "melora": SmoaConfig.melora(4, 2),
    "random": SmoaConfig(rank=4, partition="random_blocks"),
    "blocks": SmoaConfig(rank=4, ranks=(3, 1)),
    "bands": SmoaConfig(rank=4, ranks=(1, 3), partition="spectral_bands"),
}
every_member = pytest.mark.parametrize("member", MEMBERS)
TARGETS = ("q_proj", "up_proj")


def member_config(member: str, **changes: Any) -> SmoaConfig:
    return dataclasses.replace(MEMBERS[member], **({"target_modules": TARGETS} | changes))


def base_tree(dtype: Any = jnp.float32, seed: int = 0) -> dict:
    """Three stacked layers of two targets and one bystander, an embedding and a head."""
    shapes = {
        "embed_tokens": {"embedding": (11, 8)},
        "layers": {
            "self_attn": {"q_proj": {"kernel": (3, 8, 13)}, "o_proj": {"kernel": (3, 13, 8)}},
            "mlp": {"up_proj": {"kernel": (3, 8, 13)}},
            "norm": {"scale": (3, 8)},
        },
        "lm_head": {"kernel": (8, 11)},
    }
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 3, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def adapted_tree(member: str, dtype: Any = jnp.float32, **changes: Any) -> dict:
    config = member_config(member, **changes)
    return smoa_jax.apply_smoa(base_tree(dtype), config, jax.random.key(7))


def node_at(params: dict) -> Any:
    return params["layers"]["self_attn"]["q_proj"]["smoa"]


def loss(params: dict, tokens: jax.Array) -> jax.Array:
    """A small network that scans the three layers and uses every leaf."""

    def apply(x: jax.Array, module: dict) -> jax.Array:
        if "smoa" in module:
            return smoa_jax.modulated_matmul(x, module["kernel"], module["smoa"])
        return x @ module["kernel"]

    def layer(x: jax.Array, parameters: dict) -> tuple[jax.Array, None]:
        h = x * parameters["norm"]["scale"][None]
        h = apply(h, parameters["self_attn"]["q_proj"]) * apply(h, parameters["mlp"]["up_proj"])
        return x + apply(h, parameters["self_attn"]["o_proj"]), None

    x = params["embed_tokens"]["embedding"][tokens]
    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.mean(jnp.square(x @ params["lm_head"]["kernel"] - 1.0))


TOKENS = jnp.arange(10) % 7


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def kernels_close(ours: dict, theirs: dict, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


# --- the start ------------------------------------------------------------------------------------


@every_member
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_at_init_the_merged_weight_is_the_base_bit_for_bit(member, dtype):
    base = base_tree(dtype)
    params = adapted_tree(member, dtype)
    merged = smoa_jax.merge_smoa(params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert jax.tree.map(lambda leaf: leaf.dtype, merged) == jax.tree.map(lambda x: x.dtype, base)
    assert bits(merged) == bits(base)


@every_member
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_at_init_the_adapted_forward_is_the_base_forward_bit_for_bit(member, dtype):
    module = jax.tree.map(lambda leaf: leaf[1], adapted_tree(member, dtype)["layers"])
    module = module["self_attn"]["q_proj"]
    assert np.any(np.asarray(module["smoa"].a)), "A is zero too, so the test would mean nothing"
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), dtype)
    plain = jnp.dot(x, module["kernel"], preferred_element_type=jnp.float32).astype(dtype)
    assert bits(smoa_jax.modulated_matmul(x, module["kernel"], module["smoa"])) == bits(plain)


@every_member
def test_adding_a_target_changes_no_other_kernels_initial_draw(member):
    base, key = base_tree(), jax.random.key(3)
    one = smoa_jax.apply_smoa(base, member_config(member, target_modules=("up_proj",)), key)
    more = smoa_jax.apply_smoa(
        base, member_config(member, target_modules=("q_proj", "up_proj", "o_proj")), key
    )
    assert bits(one["layers"]["mlp"]) == bits(more["layers"]["mlp"])
    q_proj, up_proj = node_at(more), more["layers"]["mlp"]["up_proj"]["smoa"]
    assert not np.array_equal(q_proj.a, up_proj.a), "two kernels share one draw"
    assert not np.array_equal(up_proj.a[0], up_proj.a[1]), "two layers share one draw"
    other = smoa_jax.apply_smoa(base, member_config(member), jax.random.key(4))
    assert not np.array_equal(q_proj.a, node_at(other).a), "the draw ignores the key"


@every_member
def test_a_layers_initial_draw_depends_on_no_other_layer(member):
    every = node_at(adapted_tree(member))
    some = node_at(adapted_tree(member, layers=(1,)))
    np.testing.assert_array_equal(some.a[1], every.a[1])


@every_member
def test_abstract_trees_give_the_structure_of_concrete_ones(member):
    abstract_base = jax.eval_shape(base_tree)
    abstract = smoa_jax.apply_smoa(abstract_base, member_config(member), jax.random.key(7))
    concrete = adapted_tree(member)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), concrete
    )


# --- merging --------------------------------------------------------------------------------------


@every_member
def test_the_merged_network_equals_the_adapted_one_with_its_gradients(member):
    params = oracle.with_random_factors(adapted_tree(member), 1)
    merged = smoa_jax.merge_smoa(params)
    adapted_loss = float(loss(params, TOKENS))
    assert float(loss(merged, TOKENS)) == pytest.approx(adapted_loss, rel=2e-6)
    assert abs(adapted_loss - float(loss(base_tree(), TOKENS))) > 1e-3, "the adapter does nothing"
    trainable, frozen = smoa_jax.partition(params)
    direct = jax.grad(lambda t: loss(smoa_jax.combine(t, frozen), TOKENS))(trainable)
    through_merge = jax.grad(
        lambda t: loss(smoa_jax.merge_smoa(smoa_jax.combine(t, frozen)), TOKENS)
    )(trainable)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(direct))
    kernels_close(direct, through_merge, atol=4e-5 * float(largest))


@every_member
def test_merging_twice_is_refused(member):
    merged = smoa_jax.merge_smoa(adapted_tree(member))
    with pytest.raises(ValueError, match=r"\S"):
        smoa_jax.merge_smoa(merged)


def test_a_merge_to_another_dtype_rounds_the_float32_merge_once():
    params = oracle.with_random_factors(adapted_tree("blocks", jnp.bfloat16), 1)
    exact = smoa_jax.merge_smoa(params, dtype=jnp.float32)
    rounded = smoa_jax.merge_smoa(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {jnp.dtype(jnp.float32)}
    assert bits(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact)) == bits(rounded)
    for path, (kernel, node) in oracle.modulations(params).items():
        module = exact
        for key in path.split("."):
            module = module[key]
        for index in range(3):
            adapted = oracle.read_layer(node, index).adapted(kernel[index])
            np.testing.assert_allclose(module["kernel"][index], adapted, rtol=0, atol=3e-6)


# --- the trained part -----------------------------------------------------------------------------


@every_member
def test_the_mask_is_true_exactly_on_a_and_b(member):
    params = adapted_tree(member)
    mask = smoa_jax.trainable_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    for path, trains in jax.tree_util.tree_leaves_with_path(mask):
        assert trains is (getattr(path[-1], "name", None) in ("a", "b")), path
        if trains:
            assert path[-2].key == "smoa"
    assert sum(jax.tree.leaves(mask)) == 2 * len(TARGETS)


@every_member
def test_combine_is_the_inverse_of_partition(member):
    params = oracle.with_random_factors(adapted_tree(member), 2)
    trainable, frozen = smoa_jax.partition(params)
    assert len(jax.tree.leaves(trainable)) == 2 * len(TARGETS)
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(
        jax.tree.leaves(params)
    )
    whole = smoa_jax.combine(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert bits(whole) == bits(params)


def has_weight_gradient(jaxpr: Any, shape: tuple[int, ...]) -> bool:
    """Whether any equation, in any inner jaxpr, makes an array of `shape` by a product."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "transpose") and any(
            getattr(out.aval, "shape", None) == shape for out in equation.outvars
        ):
            return True
        inner = jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
        )
        for value in inner:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns") and has_weight_gradient(value, shape):
                return True
    return False


@every_member
def test_training_the_partition_leaves_the_frozen_part_bit_identical(member):
    params = adapted_tree(member)
    trainable, frozen = smoa_jax.partition(params)
    before = bits(frozen)
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(trainable)

    def partial_loss(trainable):
        return loss(smoa_jax.combine(trainable, frozen), TOKENS)

    @jax.jit
    def step(trainable, state):
        gradient = jax.grad(partial_loss)(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    start = loss(params, TOKENS)
    trained = trainable
    for _ in range(4):
        trained, state = step(trained, state)
    result = smoa_jax.combine(trained, frozen)
    assert loss(result, TOKENS) < start
    assert bits(smoa_jax.partition(result)[1]) == before
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(trainable), strict=True)
    ]
    assert all(moved), "a trained tensor did not move"

    # o_proj is frozen and not adapted; in the gradient of its layer nothing has its shape.
    assert not has_weight_gradient(jax.make_jaxpr(jax.grad(partial_loss))(trained).jaxpr, (13, 8))
    whole = jax.make_jaxpr(jax.grad(lambda params: loss(params, TOKENS)))(params)
    assert has_weight_gradient(whole.jaxpr, (13, 8)), "the search would find nothing anywhere"


@every_member
def test_the_whole_tree_flow_with_optax_partition_trains_the_same(member):
    params = adapted_tree(member)
    trainable, frozen = smoa_jax.partition(params)
    mask = smoa_jax.trainable_mask(params)
    whole_optimizer = optax.partition({True: optax.adamw(1e-2), False: optax.set_to_zero()}, mask)
    part_optimizer = optax.adamw(1e-2)

    @jax.jit
    def whole_step(params, state):
        gradient = jax.grad(loss)(params, TOKENS)
        updates, state = whole_optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def part_step(trainable, state):
        gradient = jax.grad(lambda t: loss(smoa_jax.combine(t, frozen), TOKENS))(trainable)
        updates, state = part_optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    whole, whole_state = params, whole_optimizer.init(params)
    part, part_state = trainable, part_optimizer.init(trainable)
    for _ in range(3):
        whole, whole_state = whole_step(whole, whole_state)
        part, part_state = part_step(part, part_state)
    from_whole, frozen_after = smoa_jax.partition(whole)
    assert bits(frozen_after) == bits(frozen)
    kernels_close(from_whole, part, atol=1e-5)
    assert not np.array_equal(node_at(whole).b, node_at(params).b)


def test_the_gradient_of_an_adapted_kernel_is_the_derivative_of_its_product():
    # Nobody trains it, but whoever differentiates the whole tree must not be told a falsehood.
    for member in MEMBERS:
        module = jax.tree.map(
            lambda leaf: leaf[0],
            oracle.with_random_factors(adapted_tree(member), 5)["layers"]["self_attn"]["q_proj"],
        )
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)

        def total(kernel, x=x, node=module["smoa"]):
            return jnp.sum(jnp.sin(smoa_jax.modulated_matmul(x, kernel, node)))

        def by_merge(kernel, x=x, node=module["smoa"]):
            merged = smoa_jax.merge_smoa({"q_proj": {"kernel": kernel, "smoa": node}})
            return jnp.sum(jnp.sin(x @ merged["q_proj"]["kernel"]))

        gradient = jax.grad(total)(module["kernel"])
        np.testing.assert_allclose(gradient, jax.grad(by_merge)(module["kernel"]), atol=2e-5)


@pytest.mark.parametrize("member", ["lora", "blocks", "melora", "bands"])
def test_padding_starts_at_zero_and_stays_zero(member):
    # Unequal ranks within a kernel, and a layer that is left out: rank 0, so all of it is padding.
    config = {"layers": (0, 2)}
    if member == "melora":
        config["ranks"] = (1, 3)
    params = adapted_tree(member, **config)
    mask = smoa_jax.trainable_mask(params)
    optimizer = optax.partition(
        {True: optax.adamw(1e-1, weight_decay=0.1), False: optax.set_to_zero()}, mask
    )

    @jax.jit
    def step(params, state):
        gradient = jax.grad(loss)(params, TOKENS)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, gradient

    state = optimizer.init(params)
    for _ in range(5):
        params, state, gradient = step(params, state)
        nodes, slopes = oracle.modulations(params), oracle.modulations(gradient)
        for path, (_, node) in nodes.items():
            for name in ("a", "b"):
                padding = oracle.padding_mask(node, name)
                assert padding[1].all()
                assert 0 < padding[0].mean() < 1 or member == "lora"
                trained = np.asarray(getattr(node, name))
                assert not np.any(trained[padding])
                assert np.all(trained[~padding])
                assert not np.any(np.asarray(getattr(slopes[path][1], name))[padding])


# --- structure of the family ----------------------------------------------------------------------


def with_factors(params: dict, a: np.ndarray, b: np.ndarray) -> dict:
    """The one-module tree `proj` with these factors, in whatever shape its node keeps them."""
    node = params["proj"]["smoa"]
    changed = dataclasses.replace(
        node,
        a=jnp.asarray(np.broadcast_to(a, node.a.shape), jnp.float32),
        b=jnp.asarray(np.broadcast_to(b, node.b.shape), jnp.float32),
    )
    return {"proj": {"kernel": params["proj"]["kernel"], "smoa": changed}}


def one_kernel(shape: tuple[int, int], seed: int = 0) -> dict:
    weight = np.random.default_rng(seed).normal(size=shape) / 3
    return {"proj": {"kernel": jnp.asarray(weight, jnp.float32)}}


def adapt_one(base: dict, **config: Any) -> dict:
    return smoa_jax.apply_smoa(
        base, SmoaConfig(target_modules=["proj"], **config), jax.random.key(0)
    )


def factors(shape: tuple[int, int], rank: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(shape[0], rank)) / 2, rng.normal(size=(shape[1], rank)) / 2


def merged_kernel(params: dict) -> np.ndarray:
    return np.asarray(smoa_jax.merge_smoa(params)["proj"]["kernel"], np.float64)


def forward(params: dict) -> np.ndarray:
    x = np.random.default_rng(9).normal(size=(3, params["proj"]["kernel"].shape[0]))
    module = params["proj"]
    return np.asarray(
        smoa_jax.modulated_matmul(jnp.asarray(x, jnp.float32), module["kernel"], module["smoa"])
    )


ONE_SUBSPACE = {
    "bands": {"partition": "spectral_bands"},
    "blocks": {"partition": "spectral_blocks"},
    "contiguous": {"partition": "contiguous_blocks"},
    "random": {"partition": "random_blocks"},
}


@pytest.mark.parametrize("partition", ONE_SUBSPACE)
@pytest.mark.parametrize("shape", [(7, 5), (13, 40)])
def test_one_subspace_is_hira(partition, shape):
    base = one_kernel(shape)
    a, b = factors(shape, 3)
    config = {"rank": 3, "num_subspaces": 1, "alpha": 2.0}
    one = with_factors(adapt_one(base, **config, **ONE_SUBSPACE[partition]), a, b)
    hira = with_factors(adapt_one(base, **config, partition="none"), a, b)
    np.testing.assert_allclose(merged_kernel(one), merged_kernel(hira), rtol=0, atol=1e-6)
    np.testing.assert_allclose(forward(one), forward(hira), rtol=0, atol=5e-6)
    by_oracle = oracle.adapted_by_hira(np.asarray(base["proj"]["kernel"]), a, b, 2.0 / 3)
    np.testing.assert_allclose(merged_kernel(one), by_oracle, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(13, 40), (48, 36)])
def test_bands_that_share_one_product_are_hira(shape):
    base = one_kernel(shape)
    a, b = factors(shape, 2)
    # alpha / R is 1 in both: R is the total, 6 for the bands and 2 for HiRA.
    bands = with_factors(adapt_one(base, rank=6, num_subspaces=3, partition="spectral_bands"), a, b)
    hira = with_factors(adapt_one(base, rank=2, num_subspaces=1, partition="none"), a, b)
    np.testing.assert_allclose(merged_kernel(bands), merged_kernel(hira), rtol=0, atol=5e-6)
    np.testing.assert_allclose(forward(bands), forward(hira), rtol=0, atol=3e-5)


@pytest.mark.parametrize("modulation", ["weight", "none"])
@pytest.mark.parametrize("shape", [(7, 5), (48, 36)])
def test_blocks_are_hira_or_lora_with_masked_factors(shape, modulation):
    base = one_kernel(shape)
    blocks = oracle.with_random_factors(
        adapt_one(base, rank=3, num_subspaces=3, modulation=modulation), 4
    )
    layer = oracle.read_layer(blocks["proj"]["smoa"], None)
    masked_a, masked_b = np.concatenate(layer.a, axis=1), np.concatenate(layer.b, axis=1)
    whole = with_factors(
        adapt_one(base, rank=3, num_subspaces=1, partition="none", modulation=modulation),
        masked_a,
        masked_b,
    )
    np.testing.assert_allclose(merged_kernel(blocks), merged_kernel(whole), rtol=0, atol=1e-6)
    np.testing.assert_allclose(forward(blocks), forward(whole), rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from([(7, 5), (13, 40), (48, 36)]),
    st.integers(1, 3),
    st.sampled_from(["spectral_blocks", "random_blocks", "contiguous_blocks"]),
    st.integers(0, 10**6),
)
def test_every_coordinate_lies_in_one_block_and_sizes_differ_by_at_most_one(
    shape, num_subspaces, partition, seed
):
    base = one_kernel(shape, seed)
    node = adapt_one(base, rank=3, num_subspaces=num_subspaces, partition=partition)["proj"]["smoa"]
    if num_subspaces == 1 and not hasattr(node, "in_block"):
        return  # kept as HiRA, which it is
    for ids, size in ((node.in_block, shape[0]), (node.out_block, shape[1])):
        assert ids.shape == (size,)
        sizes = np.bincount(np.asarray(ids).astype(int), minlength=num_subspaces)
        assert sizes.shape == (num_subspaces,)
        assert sizes.max() - sizes.min() <= 1
        np.testing.assert_array_equal(ids, np.asarray(ids).astype(int))


@pytest.mark.parametrize("num_subspaces", [2, 3])
def test_bands_sum_to_the_weight_and_have_orthogonal_spaces(num_subspaces):
    base = one_kernel((48, 36))
    config = {"rank": 6, "num_subspaces": num_subspaces, "partition": "spectral_bands"}
    node = adapt_one(base, **config)["proj"]["smoa"]
    weight = np.asarray(base["proj"]["kernel"], np.float64)
    held = list(np.asarray(node.bands, np.float64))
    # The last band is whatever the others leave, so summing to W says nothing of it: each band,
    # that one too, must be what its own part of the decomposition gives.
    every, _ = oracle.spectral_bands(weight, num_subspaces)
    bands = [*held, weight - sum(held)]
    np.testing.assert_allclose(sum(every), weight, atol=1e-12)
    atol = oracle.band_rounding(weight, [int(cut) for cut in node.cuts])
    for ours, from_its_own_part in zip(bands, every, strict=True):
        np.testing.assert_allclose(ours, from_its_own_part, rtol=0, atol=atol)
    norm = np.linalg.norm(weight, 2)
    for index, band in enumerate(bands):
        for other in bands[index + 1 :]:
            assert np.abs(band.T @ other).max() < 10 * atol * norm
            assert np.abs(band @ other.T).max() < 10 * atol * norm
            assert np.linalg.norm(band, 2) * np.linalg.norm(other, 2) > 1e3 * atol * norm


def numerical_rank(matrix: np.ndarray) -> int:
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(values > 2e-5 * values[0]))


def update_rank(params: dict) -> int:
    trained = oracle.with_random_factors(params, 6)
    return numerical_rank(merged_kernel(trained) - np.asarray(params["proj"]["kernel"], np.float64))


def test_the_update_of_twelve_ranks_in_three_blocks_is_full_where_lora_has_four():
    base = one_kernel((48, 36))
    blocks = adapt_one(base, rank=12, num_subspaces=3)
    lora = smoa_jax.apply_smoa(base, SmoaConfig.lora(4, target_modules=["proj"]), jax.random.key(0))
    for params in (blocks, lora):
        layer = oracle.read_layer(params["proj"]["smoa"], None)
        trained = sum(np.count_nonzero(a) for a in layer.a)  # B is all zeros at the start
        assert trained == 48 * 4, "not equal parameters, so not the law's comparison"
    assert update_rank(blocks) == 36
    assert update_rank(lora) == 4


@pytest.mark.parametrize("shape", [(7, 5), (13, 40), (48, 36)])
@pytest.mark.parametrize("rank_of_weight", [2, None])
def test_the_rank_of_an_update_obeys_its_bounds(shape, rank_of_weight):
    base = one_kernel(shape)
    if rank_of_weight:
        left, right = factors(shape, rank_of_weight, seed=3)
        base = {"proj": {"kernel": jnp.asarray(left @ right.T, jnp.float32)}}
    weight = np.asarray(base["proj"]["kernel"], np.float64)
    for partition in ("spectral_blocks", "random_blocks", "none"):
        subspaces = 1 if partition == "none" else 2
        params = adapt_one(base, rank=2, num_subspaces=subspaces, partition=partition)
        layer = oracle.read_layer(params["proj"]["smoa"], None)
        parts = layer.modulation(weight)
        bound = sum(
            min(numerical_rank(part) * rank, *block)
            for part, rank, block in zip(parts, layer.ranks, block_sizes(layer, shape), strict=True)
        )
        rank = update_rank(params)
        assert rank <= min(*shape, bound)
        # Random factors reach the bound, so above R wherever the weight has more than one rank.
        assert rank == min(*shape, bound) > 2


def block_sizes(layer: oracle.Layer, shape: tuple[int, int]) -> list[tuple[int, int]]:
    if layer.partition is None:
        return [shape]
    return [
        (len(inputs), len(outputs))
        for inputs, outputs in zip(layer.partition.inputs, layer.partition.outputs, strict=True)
    ]


@pytest.mark.parametrize("config", [{"partition": "none", "num_subspaces": 1}, {}])
def test_without_modulation_the_rank_is_at_most_that_of_the_factors(config):
    params = adapt_one(one_kernel((48, 36)), rank=6, modulation="none", **config)
    assert update_rank(params) == 6


# --- layouts --------------------------------------------------------------------------------------


@every_member
def test_scanned_layers_equal_unrolled_layers(member):
    params = oracle.with_random_factors(adapted_tree(member), 3)
    module = params["layers"]["mlp"]["up_proj"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)

    def scanned(stack):
        def body(total, layer):
            y = smoa_jax.modulated_matmul(x + jnp.mean(total), layer["kernel"], layer["smoa"])
            return total + y, None

        return jnp.sum(jnp.sin(jax.lax.scan(body, jnp.zeros((5, 13)), stack)[0]))

    def unrolled(stack):
        total = jnp.zeros((5, 13))
        for index in range(3):
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], stack)
            total += smoa_jax.modulated_matmul(x + jnp.mean(total), layer["kernel"], layer["smoa"])
        return jnp.sum(jnp.sin(total))

    value, gradient = jax.value_and_grad(scanned)(module)
    other_value, other_gradient = jax.value_and_grad(unrolled)(module)
    assert float(value) == pytest.approx(float(other_value), rel=1e-5)
    assert np.any(gradient["smoa"].a)
    kernels_close(
        (gradient["smoa"].a, gradient["smoa"].b),
        (other_gradient["smoa"].a, other_gradient["smoa"].b),
        atol=1e-4,
    )


@every_member
def test_one_stack_of_layers_equals_the_layers_alone(member):
    base = base_tree()
    stacked = smoa_jax.apply_smoa(base, member_config(member), jax.random.key(0))
    kernel = base["layers"]["mlp"]["up_proj"]["kernel"]
    layer = oracle.with_random_factors(stacked, 2)["layers"]["mlp"]["up_proj"]
    merged = smoa_jax.merge_smoa({"up_proj": layer})["up_proj"]["kernel"]
    for index in range(3):
        alone = jax.tree.map(lambda leaf, index=index: leaf[index], layer)
        one = smoa_jax.merge_smoa({"up_proj": alone})["up_proj"]["kernel"]
        np.testing.assert_allclose(merged[index], one, rtol=0, atol=1e-6)
        assert not np.array_equal(one, kernel[index])


@pytest.mark.parametrize("member", ["lora", "blocks", "bands"])
@pytest.mark.parametrize("kernel_spec", [Spec(None, "fsdp", "tensor"), Spec(None, None, "fsdp")])
def test_sharded_equals_unsharded(member, kernel_spec):
    if jax.device_count() < 8:
        pytest.fail("the tests run on eight forced host devices; conftest.py sets them")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rng = np.random.default_rng(0)
    base = {"proj": {"kernel": jnp.asarray(rng.normal(size=(2, 16, 24)) / 4, jnp.float32)}}
    sharding = NamedSharding(mesh, kernel_spec)
    spread_base = jax.device_put(base, sharding)
    config = member_config(member, target_modules=["proj"])
    key = jax.random.key(0)
    plain = smoa_jax.apply_smoa(base, config, key)
    spread = smoa_jax.apply_smoa(spread_base, config, key)
    assert spread["proj"]["kernel"].sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_array_equal(plain["proj"]["smoa"].a, spread["proj"]["smoa"].a)

    trained = oracle.with_random_factors(plain, 1)
    kernel_axes = (*kernel_spec, None, None)[:3]
    rows, columns = kernel_axes[1], kernel_axes[2]
    stack = (None,) * (trained["proj"]["smoa"].a.ndim - 3)
    specs = {"a": Spec(None, *stack, rows, None), "b": Spec(None, *stack, columns, None)}
    node = spread["proj"]["smoa"]
    node = dataclasses.replace(
        node,
        **{
            name: jax.device_put(getattr(trained["proj"]["smoa"], name), NamedSharding(mesh, spec))
            for name, spec in specs.items()
        },
    )
    spread = {"proj": {"kernel": spread["proj"]["kernel"], "smoa": node}}
    assert len(node.a.sharding.device_set) == 8

    merged = smoa_jax.merge_smoa(spread)["proj"]["kernel"]
    assert merged.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_allclose(
        merged, smoa_jax.merge_smoa(trained)["proj"]["kernel"], rtol=0, atol=3e-6
    )

    x = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    spread_x = jax.device_put(x, NamedSharding(mesh, Spec("data", None)))

    @jax.jit
    def step(params, x):
        def total(params):
            layer = jax.tree.map(lambda leaf: leaf[1], params["proj"])
            y = smoa_jax.modulated_matmul(x, layer["kernel"], layer["smoa"])
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return y, gradient["proj"]["smoa"].a, gradient["proj"]["smoa"].b

    kernels_close(step(spread, spread_x), step(trained, x), atol=5e-5)
    assert np.any(step(trained, x)[1])
