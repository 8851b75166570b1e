"""No rematerialisation policy keeps an array of a weight's size between forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.adapter.types import is_modulation
from smoa_jax.models.decoder import REMAT_POLICIES, Decoder
from smoa_jax.models.options import REMAT_NAMES
from tests.models import tiny

#: Two tokens make every activation smaller than the smallest kernel, k_proj's 20 * 8.
TOKENS = tiny.tokens(1, 2)
SMALLEST_WEIGHT = 160


def kept_sizes(decoder, params, trainable, put) -> list[int]:
    """Sizes per layer of all that the backward pass holds and that is no parameter itself."""

    def loss(trainable):
        return decoder.apply({"params": put(params, trainable)}, TOKENS).sum()

    _, backward = jax.vjp(loss, trainable)
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, trainable))}
    kept = [leaf for leaf in jax.tree.leaves(backward) if hasattr(leaf, "unsafe_buffer_pointer")]
    kept = [leaf for leaf in kept if leaf.unsafe_buffer_pointer() not in own]
    assert kept
    layers = decoder.config.num_layers
    return [leaf.size // layers if leaf.shape[:1] == (layers,) else leaf.size for leaf in kept]


def factors_of(params):
    nodes = jax.tree.leaves(params, is_leaf=is_modulation)
    return [(node.a, node.b) for node in nodes if is_modulation(node)]


def with_factors(params, factors):
    queue = iter(factors)

    def swap(node):
        if not is_modulation(node):
            return node
        a, b = next(queue)
        return type(node)(**{**vars(node), "a": a, "b": b})

    return jax.tree.map(swap, params, is_leaf=is_modulation)


def test_a_configuration_can_name_every_policy_and_no_other():
    assert set(REMAT_NAMES) == set(REMAT_POLICIES)


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES))
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_training_the_factors_keeps_nothing_of_a_weights_size(remat, stored):
    base = jax.tree.map(lambda leaf: leaf.astype(stored), tiny.params())
    params = tiny.adapt(base, 3, b_std=0.1, dropout=0.1)
    decoder = Decoder(tiny.CONFIG, dtype=jnp.bfloat16, remat=remat)
    sizes = kept_sizes(decoder, params, factors_of(params), with_factors)
    assert max(sizes) < SMALLEST_WEIGHT


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES))
def test_training_the_norm_alone_keeps_nothing_of_a_weights_size(remat):
    def put(params, scale):
        layers = {**params["layers"], "input_layernorm": {"scale": scale}}
        return {**params, "layers": layers}

    params = tiny.params()
    scale = params["layers"]["input_layernorm"]["scale"]
    decoder = Decoder(tiny.CONFIG, dtype=jnp.bfloat16, remat=remat)
    assert max(kept_sizes(decoder, params, scale, put)) < SMALLEST_WEIGHT


def test_a_product_left_to_autodiff_would_keep_weight_sized_arrays(monkeypatch):
    def naive(x, kernel, modulation, dropout_key=None, sharding=None):
        del dropout_key, sharding
        change = 1 + modulation.a @ modulation.b.T
        return x @ (kernel * change).astype(x.dtype)

    monkeypatch.setattr("smoa_jax.models.layers.modulated_matmul", naive)
    params = tiny.adapt(tiny.params(), 3, b_std=0.1)
    decoder = Decoder(tiny.CONFIG, dtype=jnp.bfloat16)
    sizes = kept_sizes(decoder, params, factors_of(params), with_factors)
    assert max(sizes) > SMALLEST_WEIGHT


def test_full_keeps_less_than_projections_and_they_less_than_none():
    params = tiny.adapt(tiny.params(), 3, b_std=0.1)
    totals = {
        remat: sum(
            kept_sizes(
                Decoder(tiny.CONFIG, dtype=jnp.bfloat16, remat=remat),
                params,
                factors_of(params),
                with_factors,
            )
        )
        for remat in ("full", "projections", "none")
    }
    assert totals["full"] < totals["projections"] < totals["none"]


def test_rematerialising_repeats_the_dropout_and_gives_the_same_gradient():
    params = tiny.adapt(tiny.params(), 3, b_std=0.3, dropout=0.3)
    rngs = {"dropout": jax.random.key(5)}

    def gradient(remat):
        decoder = Decoder(tiny.CONFIG, dtype=jnp.float32, remat=remat)

        def loss(factors):
            variables = {"params": with_factors(params, factors)}
            return jnp.sum(decoder.apply(variables, TOKENS, rngs=rngs) ** 2)

        return jax.tree.leaves(jax.jit(jax.grad(loss))(factors_of(params)))

    for kept, repeated in zip(gradient("none"), gradient("full"), strict=True):
        assert np.abs(np.asarray(kept)).max() > 0
        np.testing.assert_allclose(repeated, kept, rtol=1e-4, atol=1e-4)
