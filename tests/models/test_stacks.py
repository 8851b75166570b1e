"""Decoders whose layers differ in shape: the stacks, the order in which they run, their scans."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from smoa_jax import combine, partition
from smoa_jax.models.attention import AttentionContext, causal_mask, no_constraint
from smoa_jax.models.decoder import Decoder, DecoderLayer
from smoa_jax.models.layers import RMSNorm
from smoa_jax.models.rope import local_rope_tables, rope_tables
from smoa_jax.models.sections import LayerSections
from smoa_jax.models.stacks import LayerShape, layer_sections, layer_stacks
from tests.models import tiny

FAMILIES = ["gemma4_31b", "gemma4_e2b"]
TOKENS = tiny.tokens(2, 7)


def irregular(kinds: str = "LGLLG") -> dict:
    return {"num_layers": len(kinds), "local_layers": tuple(kind == "L" for kind in kinds)}


def drawn(config) -> list[str]:
    """The sections of a decoder as the module's docstring writes them."""
    return [
        f"{section.num_periods} x "
        + ", ".join(f"{run.length} {run.stack.name}[{run.first}:]" for run in section.runs)
        for section in layer_sections(config)
    ]


def test_the_layers_of_gemma_4_lie_and_run_as_written_here():
    config = tiny.FAMILIES["gemma4_e2b"]
    assert {"/".join(stack.path): stack.layers for stack in layer_stacks(config)} == {
        "layers/local": (0, 1, 3, 4),
        "layers/global": (2, 5),
        "layers/local_shared": (6, 8, 10),
        "layers/global_shared": (7, 9, 11),
    }
    assert drawn(config) == [
        "2 x 2 local[0:], 1 global[0:]",
        "3 x 1 local_shared[0:], 1 global_shared[0:]",
    ]
    once = dataclasses.replace(tiny.FAMILIES["gemma4_31b"], **irregular())
    assert drawn(once) == ["1 x 1 local[0:], 1 global[0:], 2 local[1:], 1 global[1:]"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_family_of_one_shape_has_one_stack(family):
    (stack,) = layer_stacks(tiny.FAMILIES[family])
    assert stack.path == ("layers",)
    assert stack.layers == (0, 1, 2)


def unrolled(config, params, tokens):
    """All layers one by one, in plain sight: hidden states before the last norm."""
    model = Decoder(config, dtype=jnp.float32)
    variables = {"params": params}
    x = model.apply(variables, tokens, method=lambda m, t: m.embed_tokens(t, jnp.float32))
    told = model.apply(variables, tokens, x, method="_told")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    tables = {False: rope_tables(config, positions), True: local_rope_tables(config, positions)}
    own = config.num_layers - config.num_kv_shared_layers
    last: dict[bool, tuple] = {}
    seen: dict[str, int] = {}
    for layer, local in enumerate(config.local_layers):
        name = ("local" if local else "global") + ("_shared" if layer >= own else "")
        stack = next(stack for stack in layer_stacks(config) if stack.name == name)
        index = seen[name] = seen.get(name, -1) + 1
        mask = causal_mask(tokens.shape[1], config.sliding_window if local else 0)
        module = DecoderLayer(config, stack.shape, no_constraint, returns_kv=True)
        weights = jax.tree.map(lambda leaf: leaf[index], params["layers"][name])  # noqa: B023
        (x, _), kv = module.apply(
            {"params": weights},
            (x, None),
            AttentionContext(tables[local], None, mask, None, None),
            jnp.asarray(0),
            None,
            None if told is None else told[layer],
            last.get(local) if layer >= own else None,
        )
        if layer < own:
            last[local] = kv
    norm = RMSNorm(config.embed_dim, config.norm_epsilon, config.norm_offset)
    return norm.apply({"params": params["norm"]}, x)


@pytest.mark.parametrize("kinds", ["", "LGLLG"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sections_equal_layers_one_by_one(family, kinds):
    config = tiny.FAMILIES[family]
    if kinds:
        config = dataclasses.replace(config, **irregular("LG" + kinds + "LG" + kinds))
    params = tiny.adapt(tiny.params_of(config), 3, b_std=0.5)
    scanned = tiny.apply(Decoder(config, dtype=jnp.float32), params, TOKENS, method="hidden")
    np.testing.assert_allclose(scanned, unrolled(config, params, TOKENS), atol=2e-4)


def loss_of(model, params):
    trainable, frozen = partition(params)

    def loss(trainable):
        logits = model.apply({"params": combine(trainable, frozen)}, TOKENS[:, :-1])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1)
        return -chosen.mean()

    return loss, trainable


@pytest.mark.parametrize("remat", ["projections", "full"])
def test_no_policy_changes_a_gradient(remat):
    config = tiny.FAMILIES["gemma4_e2b"]
    params = tiny.adapt(tiny.params_of(config), 3, b_std=0.5)
    gradients = []
    for policy in ("none", remat):
        loss, trainable = loss_of(Decoder(config, dtype=jnp.float32, remat=policy), params)
        gradients.append(jax.jit(jax.grad(loss))(trainable))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
        assert np.abs(np.asarray(one)).max() > 1e-6


def shapes_in(jaxpr) -> list[tuple[int, ...]]:
    """The shapes of all that any equation makes, those inside of others included."""
    found = []
    for equation in jaxpr.eqns:
        found += [tuple(out.aval.shape) for out in equation.outvars if hasattr(out.aval, "shape")]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += shapes_in(inner)
    return found


def test_shared_keys_are_kept_once_not_for_every_period():
    config = dataclasses.replace(
        tiny.FAMILIES["gemma4_e2b"], **irregular("LLG" * 2 + "LG" * 7), num_kv_shared_layers=14
    )
    params = tiny.adapt(tiny.params_of(config), 3, b_std=0.5)
    loss, trainable = loss_of(Decoder(config, dtype=jnp.float32, remat="full"), params)
    made = shapes_in(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr)
    one = {(2, 6, 2, 8), (2, 6, 2, 12)}  # B, T, K, H of the two kinds
    assert one <= set(made)
    assert not {(7, *shape) for shape in one} & set(made)
    assert (7, 2, 6, 20) in made  # what is kept for every period: the stream that enters it


def test_the_program_does_not_grow_with_depth():
    def size(periods: int) -> int:
        config = dataclasses.replace(
            tiny.FAMILIES["gemma4_e2b"],
            **irregular("LLG" * periods + "LG" * periods),
            num_kv_shared_layers=2 * periods,
        )
        params = tiny.adapt(tiny.params_of(config), 3, b_std=0.5)
        loss, trainable = loss_of(Decoder(config, dtype=jnp.float32, remat="full"), params)
        return len(shapes_in(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr))

    assert size(2) == size(5)


class Recorder(nn.Module):
    """In the place of a layer: notes the key that it would draw dropout masks with."""

    note: Callable[[Any], None]
    shape: LayerShape
    returns_kv: bool

    @nn.compact
    def __call__(self, carry, context, layer, local, told, shared=None):
        key = jax.random.key_data(self.make_rng("dropout"))
        jax.debug.callback(lambda *seen: self.note(seen), layer, key, ordered=True)
        x, caches = carry
        kv = (jnp.zeros((2, 7, self.shape.num_kv_heads, self.shape.head_dim)),) * 2
        return (x, caches), kv if self.returns_kv else None


def test_every_layer_draws_dropout_with_a_key_of_its_own():
    config = tiny.FAMILIES["gemma4_e2b"]
    notes: list[tuple] = []
    make = functools.partial(Recorder, notes.append, parent=None)
    sections = LayerSections(config, make, None)
    params = tiny.params_of(config)["layers"]
    x, context = jnp.zeros((2, 7, 20)), AttentionContext((), None, None, None, None)
    key = jax.random.key(5)
    sections.apply({"params": params}, x, {}, context, None, rngs={"dropout": key})
    jax.effects_barrier()
    indices = [int(index) for index, _ in notes]
    assert indices == [0, 1, 0, 2, 3, 1, 0, 0, 1, 1, 2, 2]  # of each layer in its stack
    assert len({key.tobytes() for _, key in notes}) == config.num_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_follows_its_key(family):
    config = tiny.FAMILIES[family]
    params = tiny.adapt(tiny.params_of(config), 3, b_std=0.5, dropout=0.5)
    model = Decoder(config, dtype=jnp.float32)
    first, again, other = (
        np.asarray(tiny.apply(model, params, TOKENS, rngs={"dropout": jax.random.key(seed)}))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - np.asarray(tiny.apply(model, params, TOKENS))).max() > 1e-3
