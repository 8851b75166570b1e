"""Whatever a configuration asks for and does not find is an error, never a silent miss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import smoa_jax
from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.targets import find_targets


def unstacked(*indices: int) -> dict:
    """A tree with a module per layer, as models without ``nn.scan`` have it."""
    kernel = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    return {f"layers_{index}": {"q_proj": {"kernel": kernel}} for index in indices}


def config(**changes) -> SmoaConfig:
    return SmoaConfig(rank=4, **({"target_modules": ["q_proj"]} | changes))


def test_layers_of_an_unstacked_tree_are_those_whose_path_holds_the_index():
    found = find_targets(unstacked(0, 1, 10), config(layers=(1, 10)))
    assert [target.name for target in found] == ["layers_1.q_proj", "layers_10.q_proj"]


@pytest.mark.parametrize("layers", [(0, 7), (7,)])
def test_a_layer_that_an_unstacked_tree_lacks_is_refused(layers):
    with pytest.raises(ValueError, match=r"of which 7 is no layer .* from 0 to 2"):
        find_targets(unstacked(0, 1, 2), config(layers=layers))


def test_a_layer_beyond_the_stack_is_refused():
    stacked = {"layers": {"q_proj": {"kernel": jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)}}}
    assert find_targets(stacked, config(layers=(0, 2)))[0].selected == (True, False, True)
    with pytest.raises(ValueError, match=r"of which 3, 4 is no layer .* from 0 to 2"):
        find_targets(stacked, config(layers=(0, 3, 4)))


def test_layers_of_a_tree_without_any_are_refused():
    with pytest.raises(ValueError, match=r"layers=\(0,\)"):
        find_targets({"q_proj": unstacked(0)["layers_0"]["q_proj"]}, config(layers=(0,)))


def test_a_viewed_kernel_is_told_from_a_bias_of_several_axes_beside_it():
    base = {"heads": {"w": jnp.ones((16, 2, 8)), "b": jnp.zeros((2, 8))}}
    views = {"heads.w": "| D | N H"}
    adapter = SmoaConfig.hira(2, target_modules=["heads"], kernel_views=views)
    params = smoa_jax.apply_smoa(base, adapter, jax.random.key(0))
    merged = smoa_jax.merge_smoa(params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert merged["heads"]["w"].shape == (16, 2, 8)


def test_a_quantised_kernel_is_refused():
    with pytest.raises(ValueError, match="got a kernel of int8 at q_proj"):
        find_targets({"q_proj": {"kernel": jnp.ones((8, 8), jnp.int8)}}, config())


def test_a_configuration_stays_what_it_was_checked_to_be():
    config = SmoaConfig(rank=8, layers=[0, 1])  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 0  # type: ignore[misc]
    assert (config.rank, config.layers) == (8, (0, 1))
