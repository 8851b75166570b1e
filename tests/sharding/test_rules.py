"""Every parameter is covered by one rule that divides it, or nothing starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.tree import apply_smoa
from smoa_jax.models.params import abstract_params
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from smoa_jax.sharding.rules import (
    DECODER_RULES,
    activation_constraint,
    check_heads,
    param_shardings,
    parse_rule,
)
from tests.training.tiny_run import DECODER


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("-, fsdp, tensor", P(None, "fsdp", "tensor")),
        (" fsdp+tensor ,-", P(("fsdp", "tensor"), None)),
        ("-", P(None)),
        ("replicate", None),
    ],
)
def test_a_rule_names_the_mesh_axes_of_each_dimension(text, spec):
    assert parse_rule("kernel", text) == spec


@pytest.mark.parametrize("text", ["rows, -", "fsdp, fsdp", "fsdp+tensor, tensor", ""])
def test_a_rule_with_unknown_or_repeated_axes_is_refused(text):
    with pytest.raises(ValueError, match="no axis twice, or the word replicate"):
        parse_rule("kernel", text)


def test_an_adapter_lies_as_its_kernel_does(mesh):
    params = apply_smoa(
        abstract_params(DECODER, jnp.float32), SmoaConfig(rank=4), jax.random.key(0)
    )
    shardings = param_shardings(params, mesh)
    down = shardings["layers"]["mlp"]["down_proj"]
    assert down["kernel"].spec == P(None, "tensor", "fsdp")
    node = down["smoa"]
    assert (node.a.spec, node.b.spec) == (P(None, "tensor", None), P(None, "fsdp", None))
    assert (node.in_block.spec, node.out_block.spec) == (P(None, "tensor"), P(None, "fsdp"))
    assert node.ranks.spec == P(None, None)
    assert shardings["norm"]["scale"].spec == P(None)
    assert shardings["lm_head"]["kernel"].spec == P("fsdp", "tensor")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({r"lm_head/kernel": None}, "got 0 sharding rules for lm_head/kernel"),
        ({r"lm_head/.*": "fsdp, -"}, "got 2 sharding rules for lm_head/kernel"),
        ({r"lm_head/kernel": "fsdp"}, "with 1 entries for lm_head/kernel of shape"),
    ],
)
def test_a_parameter_without_exactly_one_fitting_rule_is_refused(mesh, changes, words):
    rules = {**DECODER_RULES, **changes}
    rules = {pattern: text for pattern, text in rules.items() if text is not None}
    with pytest.raises(ValueError, match=words):
        param_shardings(abstract_params(DECODER, jnp.float32), mesh, rules)


def test_what_the_mesh_does_not_divide_is_refused_and_never_replicated(mesh):
    odd = {"lm_head": {"kernel": jax.ShapeDtypeStruct((32, 7), jnp.float32)}}
    with pytest.raises(ValueError, match="over tensor=2; expected 7 to be a multiple of 2"):
        param_shardings(odd, mesh)
    kept = param_shardings(odd, mesh, {r"lm_head/kernel": "replicate"})
    assert kept["lm_head"]["kernel"].spec == P(None, None)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 2), (4, 1)])
def test_no_head_is_split(mesh, heads, kv_heads):
    check_heads(4, 2, mesh)
    with pytest.raises(ValueError, match="expected a divisor of both"):
        check_heads(heads, kv_heads, mesh)


def test_activations_are_laid_out_by_the_names_of_their_axes(mesh):
    constrain = activation_constraint(mesh)
    x = jnp.arange(8 * 3 * 4 * 2.0).reshape(8, 3, 4, 2)
    got = jax.jit(lambda x: constrain(x, ("batch", "time", "heads", "head_dim")))(x)
    assert got.sharding.spec == P(("data", "fsdp"), None, "tensor")
    np.testing.assert_array_equal(got, x)
