"""Hazards 1, 2 and 4 of the method: the bf16 dead zone, saved weights, default precision."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smoa_jax
from smoa_jax import SmoaConfig
from tests.adapter import oracle

MEMBERS = {
    "lora": SmoaConfig.lora(8),
    "hira": SmoaConfig.hira(8),
    "melora": SmoaConfig.melora(16, 2),
    "blocks": SmoaConfig(rank=16),
    "bands": SmoaConfig(rank=16, partition="spectral_bands"),
}
every_member = pytest.mark.parametrize("member", MEMBERS)


@functools.cache
def adapted(member: str, shape: tuple[int, int], dtype: str, spread: float) -> dict:
    """A kernel exact in `dtype`, rows repeated, with factors of that standard deviation."""
    half = np.random.default_rng(0).normal(size=(shape[0] // 2, shape[1])) / np.sqrt(shape[0])
    kernel = jnp.asarray(np.concatenate([half, half]), dtype)
    config = dataclasses.replace(MEMBERS[member], target_modules=["proj"])
    if member in ("lora", "melora"):
        spread = spread / np.sqrt(shape[0])  # beside a weight of that size, as a modulated one has
    params = smoa_jax.apply_smoa({"proj": {"kernel": kernel}}, config, jax.random.key(0))
    return oracle.with_random_factors(params, 1, spread)


def exact_residual(params: dict) -> np.ndarray:
    kernel = np.asarray(params["proj"]["kernel"]).astype(np.float64)
    return oracle.read_layer(params["proj"]["smoa"], None).adapted(kernel) - kernel


def product(params: dict, x: jax.Array) -> jax.Array:
    return smoa_jax.modulated_matmul(x, params["proj"]["kernel"], params["proj"]["smoa"])


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def relative_error(ours: Any, truth: np.ndarray) -> float:
    difference = np.asarray(ours).astype(np.float64) - truth
    return float(np.linalg.norm(difference) / np.linalg.norm(truth))


# --- hazard 1: bf16 -------------------------------------------------------------------------------

WIDE = (512, 384)


def cancelling_input() -> jax.Array:
    """bf16 inputs whose product with the frozen kernel is zero, as its rows come in equal pairs.

    What `modulated_matmul` then returns is the float32 accumulator's `x (W' - W)` alone, rounded
    once: the accumulator can be read although the output is bf16.
    """
    half = normal((64, WIDE[0] // 2), 2)
    return jnp.asarray(np.concatenate([half, -half], axis=1), jnp.bfloat16)


@every_member
@pytest.mark.parametrize("spread", [1e-4, 1e-3])
def test_a_gentle_adapter_passes_a_bf16_forward_to_one_percent(member, spread):
    params = adapted(member, WIDE, "bfloat16", spread)
    x = cancelling_input()
    truth = np.asarray(x).astype(np.float64) @ exact_residual(params)
    y = jax.jit(product)(params, x)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, truth) <= 0.01

    # The control: the rounded weight swallows it, so the bound is one that can be broken.
    merged = smoa_jax.merge_smoa(params)["proj"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    swallowed = jnp.dot(x, merged, preferred_element_type=jnp.float32)
    assert relative_error(swallowed, truth) > 0.5


@every_member
def test_the_bf16_layer_output_moves_without_bias(member):
    params = adapted(member, WIDE, "bfloat16", 1e-3)
    x = jnp.asarray(normal((512, WIDE[0]), 3), jnp.bfloat16)
    kernel = params["proj"]["kernel"]
    base = jnp.dot(x, kernel, preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    def projection(y: jax.Array) -> float:
        moved = np.asarray(y).astype(np.float64) - np.asarray(base).astype(np.float64)
        return float(np.sum(moved * truth) / np.sum(truth * truth))

    truth = np.asarray(x).astype(np.float64) @ exact_residual(params)
    assert projection(jax.jit(product)(params, x)) == pytest.approx(1.0, abs=0.03)
    merged = smoa_jax.merge_smoa(params)["proj"]["kernel"]
    swallowed = jnp.dot(x, merged, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
    # A rounded weight is right on average; what it loses is seen entry by entry, not here.
    assert np.isfinite(projection(swallowed))


@every_member
def test_factor_gradients_in_bf16_are_right_to_one_percent(member):
    params = adapted(member, WIDE, "bfloat16", 1e-3)
    node, kernel = params["proj"]["smoa"], params["proj"]["kernel"]
    x = jnp.asarray(normal((32, WIDE[0]), 4), jnp.bfloat16)
    cotangent = jnp.asarray(normal((32, WIDE[1]), 5), jnp.bfloat16)

    @jax.jit
    def pull_back(a, b, x):
        def forward(a, b, x):
            changed = dataclasses.replace(node, a=a, b=b)
            return smoa_jax.modulated_matmul(x, kernel, changed)

        return jax.vjp(forward, a, b, x)[1](cotangent)

    da, db, dx = pull_back(jnp.asarray(node.a), jnp.asarray(node.b), x)
    assert da.dtype == db.dtype == jnp.float32
    assert dx.dtype == jnp.bfloat16
    layer = oracle.read_layer(node, None)
    weight = np.asarray(kernel).astype(np.float64)
    by_hand = oracle.gradients(
        np.asarray(x).astype(np.float64),
        np.asarray(cotangent).astype(np.float64),
        layer.adapted(weight),
        layer.modulation(weight),
        layer.a,
        layer.b,
        layer.scale,
    )
    got = oracle.read_layer(dataclasses.replace(node, a=da, b=db), None)
    for ours, truth in ((got.a, by_hand.a), (got.b, by_hand.b)):
        assert relative_error(np.concatenate(ours, 1), np.concatenate(truth, 1)) <= 0.01
    assert relative_error(dx, by_hand.x) <= 0.01


@pytest.mark.parametrize("member", ["lora", "blocks", "bands"])
def test_a_first_bf16_step_moves_the_output(member):
    # One AdamW step of 1e-3 from the initial B = 0: the smallest movement that training makes.
    config = dataclasses.replace(MEMBERS[member], target_modules=["proj"])
    kernel = adapted(member, WIDE, "bfloat16", 1e-3)["proj"]["kernel"]
    params = smoa_jax.apply_smoa({"proj": {"kernel": kernel}}, config, jax.random.key(0))
    x = cancelling_input()
    node = params["proj"]["smoa"]
    stepped = dataclasses.replace(node, b=jnp.where(oracle.padding_mask(node, "b"), 0.0, 1e-3))
    params = {"proj": {"kernel": kernel, "smoa": stepped}}
    truth = np.asarray(x).astype(np.float64) @ exact_residual(params)
    assert relative_error(product(params, x), truth) <= 0.01


def test_the_merge_report_tells_a_swallowed_adapter_from_one_that_survives():
    gentle = smoa_jax.merge_report(adapted("blocks", WIDE, "bfloat16", 1e-4), jnp.bfloat16)
    strong = smoa_jax.merge_report(adapted("blocks", WIDE, "bfloat16", 1e-1), jnp.bfloat16)
    assert list(gentle) == list(strong) == ["proj"]
    for report, spread in ((gentle, 1e-4), (strong, 1e-1)):
        params = adapted("blocks", WIDE, "bfloat16", spread)
        residual = exact_residual(params)
        kernel = np.asarray(params["proj"]["kernel"]).astype(np.float64)
        merged = np.asarray(smoa_jax.merge_smoa(params)["proj"]["kernel"]).astype(np.float64)
        lost = np.linalg.norm(merged - kernel - residual) / np.linalg.norm(residual)
        along = np.sum((merged - kernel) * residual) / np.sum(residual**2)
        assert report["proj"].relative == pytest.approx(lost, rel=0.02)
        assert report["proj"].update_norm == pytest.approx(np.linalg.norm(residual), rel=0.01)
        assert report["proj"].kept == pytest.approx(along, abs=0.02)
    assert gentle["proj"].relative > 0.9
    assert strong["proj"].relative < 0.05


# --- hazard 2: what the backward keeps ------------------------------------------------------------

SMALL = (64, 48)
WEIGHT_SIZE = SMALL[0] * SMALL[1]


def remat_policies() -> dict[str, Callable[..., Any]]:
    """Every policy that is one, rather than a function that makes one from names or places.

    `everything_saveable` is among them and means something: rematerialisation then keeps every
    value that the backward asks for, so an operation that asks for a weight-sized one is found out.
    The factories are left out because what they keep is named by their caller, and nothing in
    `modulated_matmul` is named for them; `save_anything_except_these_names()` is
    `everything_saveable`, and `save_only_these_names()` is `nothing_saveable`.
    """
    policies = {}
    for name in dir(jax.checkpoint_policies):
        value = getattr(jax.checkpoint_policies, name)
        if name.startswith("_") or not callable(value):
            continue
        kinds = [parameter.kind for parameter in inspect.signature(value).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD in kinds:
            policies[name] = value
    return policies


POLICIES = {"without jax.checkpoint": None} | remat_policies()


def under(policy: str, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    chosen = POLICIES[policy]
    return function if chosen is None else jax.checkpoint(function, policy=chosen)


def kept_of_weight_size(pull_back: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(pull_back) if leaf.size >= WEIGHT_SIZE]


def frozen_inputs(params: dict) -> Iterator[np.ndarray]:
    """What the caller holds anyway: the kernel, and the bands that are part of the adapter."""
    yield np.asarray(params["proj"]["kernel"])
    if hasattr(params["proj"]["smoa"], "bands"):
        yield np.asarray(params["proj"]["smoa"].bands)


def surplus(pull_back: Any, params: dict) -> list[tuple[int, ...]]:
    """Shapes of the kept arrays of weight size that are none of the caller's own, each once."""
    allowed = [array.tobytes() for array in frozen_inputs(params)]
    left = []
    for array in kept_of_weight_size(pull_back):
        if array.tobytes() in allowed:
            allowed.remove(array.tobytes())
        else:
            left.append(array.shape)
    return left


def modulated_loss(params: dict, x: jax.Array, dropout_key: Any, scan: bool) -> jax.Array:
    """A layer with something non-linear behind it, which keeps its own input but no weight."""
    module = params["proj"]
    y = smoa_jax.modulated_matmul(x, module["kernel"], module["smoa"], dropout_key=dropout_key)
    return jnp.sum(jnp.sin(y))


def vjp_of_trainable(function: Callable[..., jax.Array], params: dict, *arguments: Any) -> Any:
    trainable, frozen = smoa_jax.partition(params)
    return jax.vjp(lambda t, x: function(smoa_jax.combine(t, frozen), x), trainable, *arguments)[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", POLICIES)
@every_member
def test_the_backward_keeps_nothing_of_a_weights_size_but_the_kernel(member, policy, dtype):
    params = adapted(member, SMALL, dtype, 0.1)
    x = jnp.asarray(normal((4, SMALL[0]), 0), dtype)

    def loss(params, x):
        return jnp.sum(jnp.sin(product(params, x).astype(jnp.float32)))

    pull_back = vjp_of_trainable(under(policy, loss), params, x)
    assert surplus(pull_back, params) == []
    assert kept_of_weight_size(pull_back), "not even the kernel was found: the search is blind"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("member", ["blocks", "bands"])
def test_dropout_and_the_weights_cast_keep_nothing_either(member, policy):
    # A bf16 kernel under float32 activations, and a dropped input that is not x itself.
    params = adapted(member, SMALL, "bfloat16", 0.1)
    node = dataclasses.replace(params["proj"]["smoa"], dropout=0.5)
    params = {"proj": {"kernel": params["proj"]["kernel"], "smoa": node}}
    x = jnp.asarray(normal((4, SMALL[0]), 0), jnp.float32)

    def loss(params, x):
        module = params["proj"]
        key = jax.random.key(1)
        y = smoa_jax.modulated_matmul(x, module["kernel"], module["smoa"], dropout_key=key)
        return jnp.sum(jnp.sin(y))

    pull_back = vjp_of_trainable(under(policy, loss), params, x)
    assert surplus(pull_back, params) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_a_scan_over_layers_keeps_no_stack_but_the_kernels(policy):
    layers = 12  # so that a stack is many times what one layer needs while it runs
    kernels = jnp.asarray(normal((layers, 64, 64), 0) / 8, jnp.float32)
    config = SmoaConfig(rank=4, target_modules=["proj"])
    params = smoa_jax.apply_smoa({"proj": {"kernel": kernels}}, config, jax.random.key(0))
    params = oracle.with_random_factors(params, 1)
    x = jnp.asarray(normal((4, 64), 0), jnp.float32)

    def body(x, layer):
        return jnp.sin(smoa_jax.modulated_matmul(x, layer["kernel"], layer["smoa"])), None

    def loss(params, x):
        return jnp.sum(jax.lax.scan(under(policy, body), x, params["proj"])[0])

    trainable, frozen = smoa_jax.partition(params)

    @jax.jit
    def gradient(trainable, frozen, x):
        return jax.grad(lambda t: loss(smoa_jax.combine(t, frozen), x))(trainable)

    pull_back = vjp_of_trainable(loss, params, x)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.size >= layers * 64 * 64]
    assert [np.asarray(leaf).tobytes() for leaf in kept] in ([], [np.asarray(kernels).tobytes()])
    # And compiled: beside its arguments the step needs less than one float32 stack of weights.
    memory = gradient.lower(trainable, frozen, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < layers * 64 * 64 * 4


def naive_loss(params: dict, x: jax.Array) -> jax.Array:
    module = params["proj"]
    update = jnp.dot(module["smoa"].a, module["smoa"].b.T)
    return jnp.sum(jnp.sin(jnp.dot(x, module["kernel"] * (1.0 + update))))


def test_plain_autodiff_keeps_weights_under_most_policies():
    # The negative control of the tests above: they would see a weight if one were kept.
    params = adapted("hira", SMALL, "float32", 0.1)
    x = jnp.asarray(normal((4, SMALL[0]), 0), jnp.float32)
    offenders = [
        policy
        for policy in POLICIES
        if surplus(vjp_of_trainable(under(policy, naive_loss), params, x), params)
    ]
    assert {"without jax.checkpoint", "everything_saveable", "dots_saveable"} <= set(offenders)
    assert "nothing_saveable" not in offenders


# --- hazard 4: nothing relies on the default precision of a product -------------------------------


@every_member
def test_float32_products_name_their_precision(member):
    # A CPU refuses a product in TF32, so any that asks for "the default" fails under this setting.
    x = jnp.asarray(normal((4, SMALL[0]), 0), jnp.float32)
    with jax.default_matmul_precision("TF32_TF32_F32"):
        with pytest.raises(ValueError, match="TF32"):
            jax.block_until_ready(jax.jit(jnp.dot)(x, x.T))
        kernel = jnp.asarray(normal(SMALL, 6), jnp.float32)
        config = dataclasses.replace(MEMBERS[member], target_modules=["proj"])
        params = smoa_jax.apply_smoa({"proj": {"kernel": kernel}}, config, jax.random.key(0))
        params = oracle.with_random_factors(params, 1)
        merged = smoa_jax.merge_smoa(params)
        smoa_jax.merge_report(params, jnp.bfloat16)
        trainable, frozen = smoa_jax.partition(params)

        @jax.jit
        def gradient(trainable, x):
            def loss(trainable, x):
                return jnp.sum(jnp.sin(product(smoa_jax.combine(trainable, frozen), x)))

            return jax.value_and_grad(loss, argnums=(0, 1))(trainable, x)

        jax.block_until_ready((merged, gradient(trainable, x)))
