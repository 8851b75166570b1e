"""The public API against `oracle.py`, the independent transcription of the published algorithm."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import smoa_jax
from smoa_jax import SmoaConfig
from tests.adapter import oracle

FEW = settings(max_examples=15, deadline=None, derandomize=True)
SHAPES = ((7, 5), (13, 40), (48, 36), (36, 48))
MEMBERS = {
    "lora": {"partition": "none", "modulation": "none", "num_subspaces": 1},
    "hira": {"partition": "none", "modulation": "weight", "num_subspaces": 1},
    "melora": {"partition": "contiguous_blocks", "modulation": "none"},
    "contiguous": {"partition": "contiguous_blocks", "modulation": "weight"},
    "random": {"partition": "random_blocks", "modulation": "weight"},
    "random, not modulated": {"partition": "random_blocks", "modulation": "none"},
    "spectral blocks": {"partition": "spectral_blocks", "modulation": "weight"},
    "spectral blocks, not modulated": {"partition": "spectral_blocks", "modulation": "none"},
    "bands": {"partition": "spectral_bands", "modulation": "weight"},
}


def member_config(member: str, num_subspaces: int, **changes: Any) -> SmoaConfig:
    settings_of_member = {"num_subspaces": num_subspaces, "target_modules": ["proj"]}
    return SmoaConfig(**(settings_of_member | MEMBERS[member] | changes))


def random_weight(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 4


def adapt(weight: np.ndarray, config: SmoaConfig, seed: int = 0) -> dict:
    """A tree of one module `proj`, adapted, factors still at their initial values."""
    return smoa_jax.apply_smoa(
        {"proj": {"kernel": jnp.asarray(weight)}}, config, jax.random.key(seed)
    )


def node_of(params: dict) -> Any:
    return params["proj"]["smoa"]


def layer_of(params: dict, layer: int) -> dict:
    return jax.tree.map(lambda leaf: leaf[layer], params)


# --- partitions -----------------------------------------------------------------------------------


def assert_same_partition(node: Any, weight: np.ndarray, num_subspaces: int) -> None:
    published = oracle.spectral_blocks(weight, num_subspaces)
    scores = oracle.spectral_scores(weight)
    for ids, pieces, score in zip(
        (node.in_block, node.out_block), (published.inputs, published.outputs), scores, strict=True
    ):
        decided = ~oracle.may_differ(score, num_subspaces, min(weight.shape))
        np.testing.assert_array_equal(np.asarray(ids)[decided], oracle.block_ids(pieces)[decided])
        assert np.bincount(np.asarray(ids).astype(int)).tolist() == oracle.even_sizes(
            len(score), num_subspaces
        )


@FEW
@given(st.sampled_from(SHAPES), st.integers(2, 4), st.integers(0, 10**6))
def test_spectral_blocks_are_the_published_ones(shape, num_subspaces, seed):
    weight = random_weight(shape, seed)
    node = node_of(
        adapt(weight, member_config("spectral blocks", num_subspaces, rank=num_subspaces))
    )
    assert_same_partition(node, weight, num_subspaces)


def test_spectral_blocks_of_a_large_weight_are_the_published_ones():
    weight = random_weight((300, 200), 7)
    node = node_of(adapt(weight, member_config("spectral blocks", 3, rank=6)))
    assert_same_partition(node, weight, 3)
    scores = oracle.spectral_scores(weight)
    left_out = [oracle.may_differ(score, 3, 200).mean() for score in scores]
    assert max(left_out) < 0.1, "the comparison would leave out too much to mean anything"


def test_spectral_blocks_of_a_shuffled_diagonal_follow_its_singular_values():
    # Input i and output j share singular value number `rank`, so both scores equal that number.
    ranks = np.array([3, 0, 6, 1, 5, 2, 4])
    columns = np.array([2, 5, 0, 6, 1, 3, 4])
    weight = np.zeros((7, 7), np.float32)
    weight[np.arange(7), columns] = (2.0**-ranks) * np.array([1, -1, 1, 1, -1, 1, 1])
    node = node_of(adapt(weight, member_config("spectral blocks", 3, rank=3)))
    blocks = np.array([0, 0, 0, 1, 1, 2, 2])  # of the seven singular values: sizes 3, 2, 2
    np.testing.assert_array_equal(node.in_block, blocks[ranks])
    np.testing.assert_array_equal(np.asarray(node.out_block)[columns], blocks[ranks])


def test_equal_scores_are_ordered_by_index():
    node = node_of(adapt(np.zeros((7, 5), np.float32), member_config("spectral blocks", 3, rank=3)))
    np.testing.assert_array_equal(node.in_block, [0, 0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(node.out_block, [0, 0, 1, 1, 2])


def test_contiguous_blocks_are_consecutive_and_the_first_are_larger():
    node = node_of(adapt(random_weight((11, 5), 0), member_config("melora", 3, rank=3)))
    pieces = oracle.contiguous_blocks((11, 5), 3)
    np.testing.assert_array_equal(node.in_block, oracle.block_ids(pieces.inputs))
    np.testing.assert_array_equal(node.out_block, oracle.block_ids(pieces.outputs))


@FEW
@given(st.integers(0, 10**6))
def test_random_blocks_have_the_published_sizes_and_follow_the_key(seed):
    config = member_config("random", 3, rank=3)
    weight = random_weight((13, 40), 0)
    node, again = (node_of(adapt(weight, config, seed)) for _ in range(2))
    other = node_of(adapt(weight, config, seed + 1))
    for field, size in (("in_block", 13), ("out_block", 40)):
        ids = np.asarray(getattr(node, field)).astype(int)
        assert np.bincount(ids).tolist() == oracle.even_sizes(size, 3)
        np.testing.assert_array_equal(ids, getattr(again, field))
    assert not np.array_equal(node.out_block, other.out_block)
    assert np.any(np.diff(np.asarray(node.out_block)) < 0), "random blocks came out contiguous"


@FEW
@given(st.sampled_from(SHAPES), st.integers(2, 3), st.integers(0, 10**6))
def test_bands_are_cut_at_equal_shares_of_the_singular_values(shape, num_subspaces, seed):
    weight = random_weight(shape, seed)
    assume(not oracle.bands_that_rounding_decides(weight, num_subspaces))
    node = node_of(adapt(weight, member_config("bands", num_subspaces, rank=num_subspaces)))
    matrices, cuts = oracle.spectral_bands(weight, num_subspaces)
    np.testing.assert_array_equal(node.cuts, cuts)
    for band, matrix in zip(np.asarray(node.bands), matrices, strict=False):
        np.testing.assert_allclose(band, matrix, rtol=0, atol=oracle.band_rounding(weight, cuts))
    np.testing.assert_allclose(node.norms, [np.linalg.norm(m) for m in matrices], rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "num_subspaces", "cuts"),
    [
        ([4.0, 2.0, 1.0, 1.0], 2, [1]),  # E(0) = 1/2 exactly: the bound belongs to the lower band
        ([1.0, 1.0, 1.0, 1.0], 4, [1, 2, 3]),
        ([3.0, 2.0, 2.0, 1.0], 2, [1]),  # of squares, E(0) = 1/2 as well; E(1) = 5/8
        ([2.0, 2.0, 2.0, 1.0, 1.0], 2, [2]),  # energies of squares would cut after 1
    ],
)
def test_band_cuts_worked_out_by_hand(values, num_subspaces, cuts):
    weight = np.diag(np.asarray(values, np.float32))[:, ::-1].copy()
    node = node_of(adapt(weight, member_config("bands", num_subspaces, rank=num_subspaces)))
    assert np.asarray(node.cuts).tolist() == cuts
    assert [members[0] for members in oracle.band_cuts(np.array(values), num_subspaces)[1:]] == cuts


def test_an_empty_band_is_an_error_that_names_the_kernel():
    weight = np.diag(np.array([100.0, 1.0, 0.5, 0.1], np.float32))
    with pytest.raises(ValueError, match=r"is empty"):
        oracle.spectral_bands(weight, 2)
    with pytest.raises(ValueError, match=r"deep\W+narrow_proj"):
        smoa_jax.apply_smoa(
            {"deep": {"narrow_proj": {"kernel": jnp.asarray(weight)}}},
            member_config("bands", 2, rank=2, target_modules=["narrow_proj"]),
            jax.random.key(0),
        )


# --- ranks, scale, initial values -----------------------------------------------------------------


@pytest.mark.parametrize("member", ["spectral blocks", "melora", "bands"])
def test_the_rank_is_split_like_the_coordinates_unless_ranks_are_given(member):
    weight = random_weight((48, 36), 3)
    even = node_of(adapt(weight, member_config(member, 3, rank=8)))
    assert np.asarray(even.ranks).tolist() == oracle.even_sizes(8, 3) == [3, 3, 2]
    given_ranks = node_of(adapt(weight, member_config(member, 3, rank=8, ranks=(1, 5, 2))))
    assert np.asarray(given_ranks.ranks).tolist() == [1, 5, 2]
    with pytest.raises(ValueError, match="8"):
        member_config(member, 3, rank=8, ranks=(1, 5, 3))


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("alpha", [None, 12.0])
@pytest.mark.parametrize("member", ["lora", "melora", "spectral blocks", "bands"])
def test_the_scale_divides_by_the_total_rank(member, alpha, scaling):
    config = member_config(member, 3, rank=6, alpha=alpha, scaling=scaling)
    scale = float(node_of(adapt(random_weight((48, 36), 3), config)).scale)
    assert scale == pytest.approx(oracle.update_scale(alpha, 6, scaling), rel=1e-6)


@pytest.mark.parametrize("member", MEMBERS)
def test_initial_factors_are_uniform_up_to_the_blocks_bound_and_zero(member):
    weight = random_weight((200, 61), 4)
    node = node_of(adapt(weight, member_config(member, 3, rank=9, ranks=()), seed=5))
    layer = oracle.read_layer(node, None)
    assert not np.any(node.b)
    assert node.a.dtype == node.b.dtype == jnp.float32
    for subspace, a in enumerate(layer.a):
        rows = layer.partition.inputs[subspace] if layer.partition else np.arange(200)
        bound = oracle.initial_bound(len(rows))
        drawn = a[rows]
        assert np.all(np.abs(drawn) <= bound * (1 + 1e-6))
        assert np.abs(drawn).max() > 0.95 * bound
        # Uniform on (-bound, bound): variance bound^2 / 3; 4.5 standard errors allowed.
        assert abs(drawn.mean()) < 4.5 * bound / np.sqrt(3 * drawn.size)
        assert abs(drawn.var() * 3 / bound**2 - 1) < 4.5 * np.sqrt(0.8 / drawn.size)


# --- adapted weights, forward, gradients ----------------------------------------------------------


def check_everything(params: dict, weight: np.ndarray, seed: int) -> None:
    """Merged weight, forward and gradients of the module `proj`, one unstacked layer."""
    node = node_of(params)
    layer = oracle.read_layer(node, None)
    adapted = layer.adapted(weight)
    merged = smoa_jax.merge_smoa(params)["proj"]["kernel"]
    rounding = layer.rounding(weight)
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=rounding)

    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, weight.shape[0])).astype(np.float32)
    cotangent = rng.normal(size=(3, weight.shape[1])).astype(np.float32)

    def product(x, a, b):
        changed = dataclasses.replace(node, a=a, b=b)
        return smoa_jax.modulated_matmul(x, params["proj"]["kernel"], changed)

    y, pull_back = jax.vjp(product, x, jnp.asarray(node.a), jnp.asarray(node.b))
    truth = x.astype(np.float64) @ adapted
    np.testing.assert_allclose(y, truth, rtol=0, atol=rounding * np.abs(x).sum(1).max())

    dx, da, db = pull_back(cotangent)
    by_hand = oracle.gradients(
        x, cotangent, adapted, layer.modulation(weight), layer.a, layer.b, layer.scale
    )
    np.testing.assert_allclose(dx, by_hand.x, rtol=0, atol=4e-5 * np.abs(by_hand.x).max())
    got = oracle.read_layer(dataclasses.replace(node, a=da, b=db), None)
    for ours, theirs in ((got.a, by_hand.a), (got.b, by_hand.b)):
        largest = max(np.abs(part).max() for part in theirs)
        for mine, hand in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, hand, rtol=0, atol=4e-5 * largest)
    for name, gradient in (("a", da), ("b", db)):
        assert not np.any(np.asarray(gradient)[oracle.padding_mask(node, name)])


@pytest.mark.parametrize("member", MEMBERS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.sampled_from(((7, 5), (13, 40), (48, 36))),
    st.integers(0, 10**6),
    st.sampled_from([None, 3.0]),
)
def test_adapted_weight_forward_and_gradients_are_the_papers(member, shape, seed, alpha):
    weight = random_weight(shape, seed)
    assume(member != "bands" or not oracle.bands_that_rounding_decides(weight, 3))
    params = adapt(weight, member_config(member, 3, rank=4, alpha=alpha), seed)
    check_everything(oracle.with_random_factors(params, seed), weight, seed)


@pytest.mark.parametrize("member", ["spectral blocks", "melora", "bands"])
@pytest.mark.parametrize("ranks", [(1, 4, 2), (3, 1, 1)])
def test_unequal_ranks_are_assembled_like_equal_ones(member, ranks):
    weight = random_weight((48, 36), 8)
    config = member_config(member, 3, rank=sum(ranks), ranks=ranks)
    params = oracle.with_random_factors(adapt(weight, config), 8)
    check_everything(params, weight, 8)


@pytest.mark.parametrize("member", MEMBERS)
def test_stacked_layers_left_out_and_patterned_ranks_are_each_their_own(member):
    weights = {name: random_weight((3, 13, 40), seed) for seed, name in enumerate(("q", "v"))}
    base = {"stack": {f"{name}_proj": {"kernel": jnp.asarray(w)} for name, w in weights.items()}}
    config = member_config(
        member,
        2,
        rank=6,
        alpha=9.0,
        layers=(0, 2),
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r".*v_proj": 3},
    )
    params = oracle.with_random_factors(smoa_jax.apply_smoa(base, config, jax.random.key(1)), 1)
    merged = smoa_jax.merge_smoa(params)
    for name, rank in (("q", 6), ("v", 3)):
        module = params["stack"][f"{name}_proj"]
        for index in range(3):
            result = np.asarray(merged["stack"][f"{name}_proj"]["kernel"][index])
            if index == 1:
                np.testing.assert_array_equal(result, weights[name][1])
                assert not np.any(np.asarray(module["smoa"].ranks)[1])
                continue
            layer = oracle.read_layer(module["smoa"], index)
            assert layer.ranks == oracle.even_sizes(rank, len(layer.ranks))
            assert layer.scale == pytest.approx(9.0 / rank)
            weight = weights[name][index]
            if member == "spectral blocks":
                node = jax.tree.map(lambda leaf, index=index: leaf[index], module["smoa"])
                assert_same_partition(node, weight, 2)
            adapted = layer.adapted(weight)
            np.testing.assert_allclose(result, adapted, rtol=0, atol=layer.rounding(weight))
            x = random_weight((2, 13), index)
            one = layer_of(module, index)
            y = smoa_jax.modulated_matmul(x, one["kernel"], one["smoa"])
            atol = layer.rounding(weight) * np.abs(x).sum(1).max()
            np.testing.assert_allclose(y, x @ adapted, rtol=0, atol=atol)


@pytest.mark.parametrize("member", ["hira", "spectral blocks", "bands"])
def test_a_view_of_a_kernel_is_adapted_like_the_plain_kernel(member):
    plain = random_weight((2, 12, 15), 3)
    viewed = jnp.asarray(plain.reshape(2, 12, 3, 5))
    config = member_config(member, 3, rank=6, kernel_views={".*proj.*": "L | D | N H"})
    key = jax.random.key(0)
    params = smoa_jax.apply_smoa({"proj": {"kernel": viewed}}, config, key)
    twin = smoa_jax.apply_smoa(
        {"proj": {"kernel": jnp.asarray(plain)}}, member_config(member, 3, rank=6), key
    )
    np.testing.assert_array_equal(node_of(params).a, node_of(twin).a)
    merged = smoa_jax.merge_smoa(oracle.with_random_factors(params, 4))["proj"]["kernel"]
    assert merged.shape == viewed.shape
    trained = oracle.with_random_factors(twin, 4)
    for index in range(2):
        layer = oracle.read_layer(node_of(trained), index)
        np.testing.assert_allclose(
            np.asarray(merged[index]).reshape(12, 15),
            layer.adapted(plain[index]),
            rtol=0,
            atol=layer.rounding(plain[index]),
        )


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["lora", "spectral blocks", "bands"])
def test_dropout_acts_on_the_input_of_the_adapters_path_alone(member):
    weight = random_weight((24, 40), 2)
    config = member_config(member, 2, rank=24, dropout=0.25)
    params = oracle.with_random_factors(adapt(weight, config), 2, spread=1.0)
    kernel, node = params["proj"]["kernel"], node_of(params)
    residual = oracle.read_layer(node, None).adapted(weight) - weight
    assert np.linalg.cond(residual) < 1e4, "the dropped input could not be read back"
    x = np.random.default_rng(0).uniform(1, 2, size=(64, 24)).astype(np.float32)

    def product(x, key=None):
        return smoa_jax.modulated_matmul(x, kernel, node, dropout_key=key)

    y, pull_back = jax.vjp(lambda x: product(x, jax.random.key(3)), x)
    adapter_input = (np.asarray(y, np.float64) - x @ weight.astype(np.float64)) @ np.linalg.pinv(
        residual
    )
    kept = np.round(adapter_input / x * 0.75)
    np.testing.assert_allclose(adapter_input, kept * x / 0.75, atol=2e-2)
    assert set(np.unique(kept)) == {0.0, 1.0}
    assert abs(kept.mean() - 0.75) < 0.05
    cotangent = random_weight((64, 40), 1)
    by_hand = cotangent @ weight.T + kept / 0.75 * (cotangent @ residual.T)
    np.testing.assert_allclose(pull_back(cotangent)[0], by_hand, atol=1e-4)
    assert not np.array_equal(y, product(x, jax.random.key(4)))
    np.testing.assert_allclose(product(x), x @ (weight + residual), atol=1e-4)
