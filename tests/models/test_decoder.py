"""What the decoder computes: masks, positions, layers, dtypes, parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.adapter.types import Blocks, LowRank
from smoa_jax.models import decoder as decoder_module
from smoa_jax.models.attention import AttentionContext, attend, causal_mask, no_constraint
from smoa_jax.models.cache import cache_positions, empty_cache
from smoa_jax.models.config import RopeScaling
from smoa_jax.models.decoder import Decoder, DecoderLayer, abstract_params, init_params
from smoa_jax.models.layers import RMSNorm
from smoa_jax.models.rope import rope_tables
from smoa_jax.models.stacks import layer_stacks
from tests.models import tiny

GOLDEN = Path(__file__).parents[1] / "golden"


def described(tree) -> str:
    lines = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}: "
        f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("tied", [True, False])
def test_the_params_tree_is_the_golden_one(tied):
    name = "llama_tied.txt" if tied else "llama_untied.txt"
    tree = abstract_params(tiny.config(tie_embeddings=tied), jnp.bfloat16)
    assert described(tree) == (GOLDEN / name).read_text()


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "smollm3", "olmo2"])
def test_the_params_tree_of_a_family_is_the_golden_one(family):
    tree = abstract_params(tiny.FAMILIES[family], jnp.bfloat16)
    assert described(tree) == (GOLDEN / f"{family}.txt").read_text()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_described_params_are_those_the_modules_make(family):
    model = Decoder(tiny.FAMILIES[family])
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert described(made["params"]) == described(abstract_params(model.config))


def test_random_params_depend_on_key_and_path_alone():
    small, large = (
        init_params(tiny.config(num_layers=1, mlp_dim=mlp_dim), jax.random.key(0))
        for mlp_dim in (28, 30)
    )
    np.testing.assert_array_equal(
        small["layers"]["self_attn"]["q_proj"]["kernel"],
        large["layers"]["self_attn"]["q_proj"]["kernel"],
    )
    first, second = (small["layers"]["self_attn"][name]["kernel"] for name in ("k_proj", "v_proj"))
    assert not np.allclose(first, second)


def test_random_params_begin_without_biases():
    module = init_params(tiny.FAMILIES["smollm3"], jax.random.key(0))["layers"]["mlp"]["down_proj"]
    assert not module["bias"].any()
    assert module["kernel"].any()


def test_logits_are_float32_in_every_compute_dtype():
    params = init_params(tiny.CONFIG, jax.random.key(0), jnp.bfloat16)
    tokens = tiny.tokens(2, 5)
    exact = tiny.apply(tiny.model(), params, tokens)
    rounded = tiny.apply(Decoder(tiny.CONFIG, dtype=jnp.bfloat16), params, tokens)
    assert exact.dtype == rounded.dtype == jnp.float32
    # bf16 rounding shows in the activations, and yet the logits are not themselves rounded.
    assert not np.array_equal(rounded, rounded.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(exact, rounded, atol=0.15)
    assert np.abs(np.asarray(exact - rounded)).max() > 1e-4


def test_a_token_sees_nothing_after_itself():
    params, tokens = tiny.params(), tiny.tokens(1, 8)
    changed = tokens.copy()
    changed[0, 5] = (changed[0, 5] + 1) % 61
    before, after = (tiny.apply(tiny.model(), params, t)[0] for t in (tokens, changed))
    np.testing.assert_array_equal(before[:5], after[:5])
    assert np.abs(np.asarray(before - after))[5:].max(axis=-1).min() > 1e-3


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3", "smollm3", "gemma4_31b", "gemma4_e2b"]
)
def test_packed_segments_equal_separate_rows(family):
    model = Decoder(tiny.FAMILIES[family], dtype=jnp.float32)
    params = tiny.params_of(model.config)
    tokens = tiny.tokens(1, 9)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    packed = tiny.apply(model, params, tokens, segment_ids=segments)[0]
    first = tiny.apply(model, params, tokens[:, :4])[0]
    second = tiny.apply(model, params, tokens[:, 4:])[0]
    np.testing.assert_allclose(packed, np.concatenate([first, second]), atol=3e-5)
    whole = tiny.apply(model, params, tokens)[0]
    assert np.abs(np.asarray(packed - whole))[4:].max() > 1e-2


def test_positions_count():
    model, params, tokens = tiny.model(), tiny.params(), tiny.tokens(1, 6)
    default = tiny.apply(model, params, tokens)
    counted = np.arange(6)[None]
    np.testing.assert_array_equal(tiny.apply(model, params, tokens, counted), default)
    # RoPE is relative: a common shift changes nothing but rounding, stretching does.
    shifted = tiny.apply(model, params, tokens, counted + 3)
    stretched = tiny.apply(model, params, tokens, counted * 3)
    np.testing.assert_allclose(shifted, default, atol=1e-5)
    assert np.abs(np.asarray(stretched - default)).max() > 1e-2


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_fully_masked_rows_are_finite_forward_and_backward(cap):
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 6))
    mask = jnp.zeros((1, 1, 4, 4), bool).at[:, :, 2:, :].set(True)

    def total(query):
        return attend(query, key, value, mask, scale=0.4, cap=cap).sum()

    assert np.isfinite(total(query))
    assert np.isfinite(jax.grad(total)(query)).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_scanned_equals_unrolled_layers(family):
    config = tiny.FAMILIES[family]
    params, tokens = tiny.adapt(tiny.params_of(config), 3, b_std=0.5), tiny.tokens(2, 7)
    model = Decoder(config, dtype=jnp.float32)
    scanned = tiny.apply(model, params, tokens, method="hidden")
    x = params["embed_tokens"]["embedding"][tokens] * config.embed_scale
    positions = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
    layer = DecoderLayer(config, layer_stacks(config)[0].shape, no_constraint)
    for index in range(config.num_layers):
        is_local = bool(config.local_layers) and config.local_layers[index]
        base = config.local_rope_base if is_local else 0.0
        turned = rope_tables(
            dataclasses.replace(config, rope_base=base, rope_scaling=RopeScaling())
            if base
            else config,
            positions,
        )
        mask = causal_mask(7, config.sliding_window if is_local else 0)
        own = jax.tree.map(lambda leaf: leaf[index], params["layers"])  # noqa: B023
        around = AttentionContext(turned, None, mask, None, None)
        (x, _), _ = layer.apply({"params": own}, (x, None), around, jnp.asarray(index), None)
    norm = RMSNorm(config.embed_dim, config.norm_epsilon, config.norm_offset)
    x = norm.apply({"params": params["norm"]}, x)
    np.testing.assert_allclose(scanned, x, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral"])
def test_a_local_layer_sees_its_window_and_no_more(family):
    config = dataclasses.replace(tiny.FAMILIES[family], num_layers=1, local_layers=(True,))
    params, tokens = tiny.params_of(config), tiny.tokens(1, 9)
    changed = tokens.copy()
    changed[0, 2] = (changed[0, 2] + 1) % 61
    model = Decoder(config, dtype=jnp.float32)
    before, after = (np.asarray(tiny.apply(model, params, t)[0]) for t in (tokens, changed))
    moved = np.abs(before - after).max(axis=-1) > 1e-4
    last = 2 + config.sliding_window - 1
    assert moved.tolist() == [2 <= place <= last for place in range(9)]


def test_an_adapter_changes_nothing_at_init_and_something_later():
    base, tokens = tiny.params(), tiny.tokens(2, 7)
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Decoder(tiny.CONFIG, dtype=dtype)
        plain = tiny.apply(model, base, tokens)
        fresh = tiny.apply(model, tiny.adapt(base, 3, b_std=0.0), tokens)
        np.testing.assert_array_equal(plain, fresh)
        moved = tiny.apply(model, tiny.adapt(base, 3, b_std=0.5), tokens)
        assert np.abs(np.asarray(plain - moved)).max() > 1e-2


def test_every_kernel_of_a_layer_listens_to_its_modulation():
    base, tokens = tiny.params(), tiny.tokens(2, 7)
    still, moved = (tiny.adapt(base, 3, b_std=b_std)["layers"] for b_std in (0.0, 0.5))
    plain = tiny.apply(tiny.model(), base, tokens)
    seen = set()
    for part in ("self_attn", "mlp"):
        for name, module in moved[part].items():
            layers = {**still, part: {**still[part], name: module}}
            logits = tiny.apply(tiny.model(), {**base, "layers": layers}, tokens)
            assert np.abs(np.asarray(logits - plain)).max() > 1e-3, name
            seen.add(name.removesuffix("_proj"))
    assert seen == {"q", "k", "v", "o", "gate", "up", "down"}


def test_the_head_listens_to_its_modulation():
    base, tokens = tiny.params(), tiny.tokens(2, 7)
    head = LowRank(
        a=jnp.ones((20, 1)), b=jnp.ones((61, 1)), scale=jnp.ones(()), ranks=jnp.ones((1,))
    )
    doubled = {**base, "lm_head": {**base["lm_head"], "smoa": head}}  # W * (1 + 1)
    logits = tiny.apply(tiny.model(), doubled, tokens)
    np.testing.assert_allclose(logits, 2 * tiny.apply(tiny.model(), base, tokens), atol=1e-5)


def test_dropout_needs_a_key_and_a_rate_and_differs_by_layer_and_kernel():
    base, tokens = tiny.params(), tiny.tokens(2, 6)
    params = tiny.adapt(base, 3, b_std=0.5, dropout=0.5)

    def logits(params, seed=None):
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        return np.asarray(tiny.apply(tiny.model(), params, tokens, rngs=rngs))

    still = logits(tiny.adapt(base, 3, b_std=0.5))
    np.testing.assert_array_equal(logits(params), still)
    np.testing.assert_array_equal(logits(tiny.adapt(base, 3, b_std=0.5), 0), still)
    np.testing.assert_array_equal(logits(params, 0), logits(params, 0))
    assert np.abs(logits(params, 0) - still).max() > 1e-3
    assert np.abs(logits(params, 0) - logits(params, 1)).max() > 1e-3


def test_dropout_keys_differ_from_layer_to_layer_and_kernel_to_kernel(monkeypatch):
    seen = []

    def record(x, kernel, modulation, dropout_key=None, sharding=None):
        del modulation, sharding
        if not isinstance(dropout_key, jax.core.Tracer):  # Flax also traces the layer once
            seen.append(tuple(jax.random.key_data(dropout_key).tolist()))
        return x @ kernel

    monkeypatch.setattr("smoa_jax.models.layers.modulated_matmul", record)
    params = tiny.adapt(tiny.params(), 3, b_std=0.5, dropout=0.5)
    rngs = {"dropout": jax.random.key(0)}
    with jax.disable_jit():  # the scan becomes a loop in Python, whose keys can be looked at
        tiny.model().apply({"params": params}, tiny.tokens(1, 4), rngs=rngs)
    assert len(seen) == len(set(seen)) == 7 * tiny.CONFIG.num_layers


def test_hidden_and_unembed_make_the_logits():
    for tied in (True, False):
        model, params = tiny.model(tie_embeddings=tied), tiny.params(tie_embeddings=tied)
        tokens = tiny.tokens(2, 5)
        hidden = tiny.apply(model, params, tokens, method="hidden")
        logits = tiny.apply(model, params, tokens)
        np.testing.assert_array_equal(tiny.apply(model, params, hidden, method="unembed"), logits)
        head = params["embed_tokens"]["embedding"].T if tied else params["lm_head"]["kernel"]
        np.testing.assert_allclose(hidden @ head, logits, atol=1e-5)


def test_activations_are_constrained_by_their_logical_axes():
    shapes = {}

    def constrain(x, names):
        shapes.setdefault(names, set()).add(x.shape)
        return x

    model = Decoder(tiny.CONFIG, dtype=jnp.float32, constrain=constrain)
    tiny.apply(model, tiny.params(), tiny.tokens(2, 5))
    assert shapes == {
        ("batch", "time", "embed"): {(2, 5, 20)},
        ("batch", "time", "heads", "head_dim"): {(2, 5, 6, 4)},
        ("batch", "time", "mlp"): {(2, 5, 28)},
        ("batch", "time", "vocab"): {(2, 5, 61)},
    }


def test_a_cache_continues_as_if_everything_came_at_once():
    model, params, tokens = tiny.model(), tiny.params(), tiny.tokens(2, 9)
    whole = tiny.apply(model, params, tokens)
    cache = empty_cache(model.config, jnp.zeros(2, jnp.int32), 9, jnp.float32)
    parts = []
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        logits, cache = tiny.apply(model, params, part, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    assert int(cache.length) == 9


def test_positions_count_from_each_rows_own_start():
    cache = empty_cache(tiny.CONFIG, jnp.array([0, 3]), 8, jnp.float32)
    np.testing.assert_array_equal(cache_positions(cache, 5), [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]])
    later = dataclasses.replace(cache, length=jnp.asarray(5))
    np.testing.assert_array_equal(cache_positions(later, 2), [[5, 6], [2, 3]])


def test_padding_before_a_row_is_not_seen_and_stays_finite():
    model, params, tokens = tiny.model(), tiny.params(), tiny.tokens(1, 5)
    padded = np.concatenate([np.full((1, 3), 7, np.int32), tokens], axis=1)
    cache = empty_cache(model.config, jnp.array([3]), 8, jnp.float32)
    logits, _ = tiny.apply(model, params, padded, cache=cache)
    assert np.isfinite(logits).all()
    alone = tiny.apply(model, params, tokens)
    np.testing.assert_allclose(logits[:, 3:], alone, atol=1e-5)


def test_unknown_remat_and_segments_with_a_cache_are_refused():
    model, params, tokens = tiny.model(), tiny.params(), tiny.tokens(1, 4)
    with pytest.raises(ValueError, match=r"got remat 'some'; expected one of \['dots'"):
        dataclasses.replace(model, remat="some").apply({"params": params}, tokens)
    cache = empty_cache(model.config, jnp.array([0]), 8, jnp.float32)
    with pytest.raises(ValueError, match="got segment_ids with a cache"):
        tiny.apply(model, params, tokens, segment_ids=tokens, cache=cache)


def test_real_sizes_need_no_memory():
    config = tiny.config(
        vocab_size=128256,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14336,
        max_positions=8192,
    )
    tree = abstract_params(config, jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 8_030_261_248  # Llama 3 8B
    logits = jax.eval_shape(
        lambda params, tokens: Decoder(config).apply({"params": params}, tokens),
        tree,
        jax.ShapeDtypeStruct((2, 64), jnp.int32),
    )
    assert logits.shape == (2, 64, 128256)
    assert decoder_module.REMAT_POLICIES.keys() >= {"none", "full", "dots", "dots_no_batch"}


def test_a_modulation_passes_the_scan_as_a_node():
    params = tiny.adapt(tiny.params(), 3, b_std=0.5)
    assert isinstance(params["layers"]["mlp"]["up_proj"]["smoa"], Blocks)
    gradients = jax.grad(lambda params: tiny.apply(tiny.model(), params, tiny.tokens(1, 4)).sum())(
        params
    )
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    node = gradients["layers"]["mlp"]["up_proj"]["smoa"]
    assert np.abs(np.asarray(node.a)).min(axis=(1, 2)).shape == (3,)
    assert (np.abs(np.asarray(node.a)).max(axis=(1, 2)) > 0).all()


def products(jaxpr) -> list:
    """Every dot_general of a program, inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += products(getattr(inner, "jaxpr", inner))
    return found


def test_float32_products_name_the_highest_precision_forward_and_backward():
    params = tiny.adapt(tiny.params(), 3, b_std=0.5)

    def loss(params):
        return tiny.model().apply({"params": params}, tiny.tokens(1, 4)).sum()

    highest = (jax.lax.Precision.HIGHEST,) * 2
    program = products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    named = {equation.params["precision"] for equation in program}
    assert named == {highest}


def test_bf16_products_accumulate_in_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params())

    def logits(params):
        return Decoder(tiny.CONFIG).apply({"params": params}, tiny.tokens(1, 4))

    projections = [
        equation
        for equation in products(jax.make_jaxpr(logits)(params).jaxpr)
        if equation.invars[1].aval.ndim == 2
    ]
    assert len(projections) == 8  # seven kernels of the scanned layer, and the head
    for equation in projections:
        assert {str(operand.aval.dtype) for operand in equation.invars} == {"bfloat16"}
        assert equation.params["preferred_element_type"] == jnp.float32
