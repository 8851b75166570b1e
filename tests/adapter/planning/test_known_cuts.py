"""Bands follow the cuts that an adapter was trained with, not those that this host would find."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.planning import decompose
from smoa_jax.adapter.planning import spectra as planning
from smoa_jax.adapter.planning.decompose import layer_bands
from smoa_jax.adapter.planning.spectra import plan_spectra
from smoa_jax.adapter.tree import apply_smoa
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.native.leaves import adapter_leaves, restore_adapter

BANDS = SmoaConfig(
    rank=6, num_subspaces=3, partition="spectral_bands", target_modules=["q_proj", "o_proj"]
)


@pytest.fixture
def base():
    """Two stacked layers of one shape and an unstacked kernel of another."""
    first, second = jax.random.split(jax.random.key(3))
    return {
        "layers": {"q_proj": {"kernel": jax.random.normal(first, (2, 14, 23))}},
        "o_proj": {"kernel": jax.random.normal(second, (19, 11))},
    }


def dense_bands(weight, cuts):
    """By NumPy's SVD in float64."""
    u, s, v = np.linalg.svd(np.asarray(weight, np.float64), full_matrices=False)
    edges = [0, *map(int, cuts), len(s)]
    return [u[:, a:b] * s[a:b] @ v[a:b] for a, b in itertools.pairwise(edges)]


def shifted(leaves, by=1.0):
    """The leaves of an adapter whose host cut every kernel's first band elsewhere."""
    moved = dict(leaves)
    for name, value in leaves.items():
        if name.endswith("/cuts"):
            moved[name] = value.at[..., 0].add(by)
    return moved


def with_norms(leaves, base):
    """The same with the norms that belong to its cuts."""
    kernels = {
        "layers/q_proj": base["layers"]["q_proj"]["kernel"],
        "o_proj": base["o_proj"]["kernel"][None],
    }
    whole = dict(leaves)
    for path, kernel in kernels.items():
        cuts = np.asarray(leaves[f"{path}/cuts"]).reshape(len(kernel), -1)
        norms = [
            [np.linalg.norm(part) for part in dense_bands(layer, cut)]
            for layer, cut in zip(kernel, cuts, strict=True)
        ]
        shape = leaves[f"{path}/norms"].shape
        whole[f"{path}/norms"] = jnp.asarray(norms, jnp.float32).reshape(shape)
    return whole


def test_an_adapter_cut_elsewhere_loads_with_the_bands_of_its_own_cuts(base):
    leaves = adapter_leaves(apply_smoa(base, BANDS, jax.random.key(0)))
    stored = with_norms(shifted(leaves), base)
    params = restore_adapter(base, BANDS, stored)
    for node, kernel in (
        (jax.tree.map(lambda x: x[1], params["layers"]["q_proj"]["smoa"]), 1),
        (params["o_proj"]["smoa"], None),
    ):
        weight = (
            base["o_proj"]["kernel"]
            if kernel is None
            else (base["layers"]["q_proj"]["kernel"][kernel])
        )
        expected = dense_bands(weight, node.cuts)
        for got, part in zip(node.bands, expected[:-1], strict=True):
            np.testing.assert_allclose(got, part, atol=1e-5)
    for name, value in adapter_leaves(params).items():
        np.testing.assert_array_equal(value, stored[name], err_msg=name)


def test_norms_that_do_not_belong_to_the_cuts_are_refused(base):
    leaves = adapter_leaves(apply_smoa(base, BANDS, jax.random.key(0)))
    with pytest.raises(CheckpointError, match=r"bands of (layers\.q_proj|o_proj) whose norms"):
        restore_adapter(base, BANDS, shifted(leaves))


@pytest.mark.parametrize("by", [-20.0, 5.0, 40.0])
def test_cuts_out_of_order_or_of_range_are_refused(base, by):
    leaves = adapter_leaves(apply_smoa(base, BANDS, jax.random.key(0)))
    with pytest.raises(ValueError, match="expected ascending indices inside them"):
        restore_adapter(base, BANDS, shifted(leaves, by))


def test_known_cuts_are_cached_apart_from_those_found_by_energy(base, tmp_path, monkeypatch):
    computed = []
    original = planning.layer_bands

    def counted(*arguments):
        computed.append(arguments[2])
        return original(*arguments)

    monkeypatch.setattr(planning, "layer_bands", counted)
    spectra = plan_spectra(base, BANDS, cache_dir=tmp_path)
    assert len(computed) == 3
    leaves = adapter_leaves(apply_smoa(base, BANDS, jax.random.key(0), spectra))
    restore_adapter(base, BANDS, leaves, cache_dir=tmp_path)
    assert len(computed) == 3  # equal cuts: nothing to compute
    moved = with_norms(shifted(leaves), base)
    first = restore_adapter(base, BANDS, moved, cache_dir=tmp_path)
    assert len(computed) == 6
    second = restore_adapter(base, BANDS, moved, cache_dir=tmp_path)
    assert len(computed) == 6
    jax.tree.map(np.testing.assert_array_equal, first, second)
    again = plan_spectra(base, BANDS, cache_dir=tmp_path)
    assert len(computed) == 6
    jax.tree.map(np.testing.assert_array_equal, again, spectra)


def test_bands_of_other_cuts_share_a_program():
    weight = jax.random.normal(jax.random.key(3), (48, 52))
    for cut in range(10, 13):
        layer_bands(weight, 2, "layer", cuts=[cut])
    programs = decompose._band_product._cache_size()
    for cut in range(13, 40):
        layer_bands(weight, 2, "layer", cuts=[cut])
    assert decompose._band_product._cache_size() - programs <= 9
