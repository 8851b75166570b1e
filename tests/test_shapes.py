"""The shapes that annotations name are checked wherever tests call the package."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.residual import residual
from smoa_jax.adapter.tree import apply_smoa
from smoa_jax.models.attention import attend


def test_an_axis_that_should_be_another_is_refused():
    query, key = jnp.zeros((1, 3, 4, 8)), jnp.zeros((1, 3, 2, 8))
    attend(query, key, key, None, scale=1.0)
    with pytest.raises(TypeCheckError, match="'value'"):
        attend(query, key, jnp.zeros((1, 5, 2, 8)), None, scale=1.0)


def test_a_missing_axis_is_refused_under_jit_too():
    base = {"dense": {"kernel": jnp.ones((6, 4))}}
    params = apply_smoa(base, SmoaConfig.lora(2, target_modules=["dense"]), jax.random.key(0))
    change = jax.jit(lambda kernel: residual(kernel, params["dense"]["smoa"]))
    assert change(base["dense"]["kernel"]).shape == (6, 4)
    with pytest.raises(TypeCheckError, match="'kernel'"):
        change(jnp.ones((2, 6, 4)))
