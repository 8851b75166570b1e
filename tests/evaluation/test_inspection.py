"""Counts by formula, spectra by a dense decomposition of what the merge changes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.merge import merge_smoa
from smoa_jax.adapter.tree import apply_smoa
from smoa_jax.evaluation.inspection import summarise, target_rows, update_spectrum


@pytest.fixture(scope="module")
def base():
    """A stack of three layers and one kernel alone, of other sizes."""
    keys = jax.random.split(jax.random.key(0))
    return {
        "layers": {"q_proj": {"kernel": jax.random.normal(keys[0], (3, 17, 12))}},
        "v_proj": {"kernel": jax.random.normal(keys[1], (10, 13))},
    }


def adapted(base, config):
    """With B of ones, so that every selected layer has an update."""
    params = apply_smoa(base, config, jax.random.key(1))
    for module in (params["layers"]["q_proj"], params["v_proj"]):
        node = module["smoa"]
        module["smoa"] = dataclasses.replace(node, b=jnp.ones_like(node.b))
    return params


def spectra_of(params):
    """Of each layer of the two kernels."""
    stack, alone = params["layers"]["q_proj"], params["v_proj"]
    nodes = [jax.tree.map(lambda leaf, n=n: leaf[n], stack["smoa"]) for n in range(3)]
    return [
        *(
            update_spectrum("layers.q_proj", layer, stack["kernel"][layer], node)
            for layer, node in enumerate(nodes)
        ),
        update_spectrum("v_proj", 0, alone["kernel"], alone["smoa"]),
    ]


CONFIGS = {
    "blocks": SmoaConfig(rank=5, num_subspaces=2, target_modules=["q_proj", "v_proj"]),
    "bands": SmoaConfig(
        rank=5, num_subspaces=2, partition="spectral_bands", target_modules=["q_proj", "v_proj"]
    ),
    "lora": SmoaConfig.lora(3, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_counts_follow_the_ranks_of_the_subspaces(base, kind):
    # Blocks of 17 x 12: (9, 6) and (8, 6) with ranks 3 and 2; of 10 x 13: (5, 7) and (5, 6).
    expected = {
        "blocks": [3 * (3 * (9 + 6) + 2 * (8 + 6)), 3 * (5 + 7) + 2 * (5 + 6)],
        "bands": [3 * 5 * (17 + 12), 5 * (10 + 13)],
        "lora": [3 * 3 * (17 + 12), 3 * (10 + 13)],
    }[kind]
    rows = target_rows(base, CONFIGS[kind])
    assert [row.trainable for row in rows] == expected
    assert [(row.name, row.layers, row.shape) for row in rows] == [
        ("layers.q_proj", 3, (17, 12)),
        ("v_proj", 1, (10, 13)),
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_spectra_are_those_of_what_merging_changes(base, kind):
    params = adapted(base, CONFIGS[kind])
    merged = merge_smoa(params)
    spectra = spectra_of(params)
    assert [(s.name, s.layer) for s in spectra] == [
        *(("layers.q_proj", layer) for layer in range(3)),
        ("v_proj", 0),
    ]
    for spectrum in spectra:
        before, after = (
            np.asarray(
                tree["layers"]["q_proj"]["kernel"][spectrum.layer]
                if spectrum.name == "layers.q_proj"
                else tree["v_proj"]["kernel"],
                np.float64,
            )
            for tree in (base, merged)
        )
        values = np.linalg.svd(after - before, compute_uv=False)
        np.testing.assert_allclose(spectrum.singular_values, values, atol=2e-5 * values[0])
        norm = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert spectrum.relative_norm == pytest.approx(norm, rel=1e-4)
    ranks = [spectrum.rank for spectrum in spectra]
    # B of ones makes A B^T of rank 1, and W * (A B^T) of the rank of W (blocks: of its blocks).
    full = {"blocks": [12, 12, 12, 10], "bands": [12, 12, 12, 10], "lora": [1, 1, 1, 1]}[kind]
    assert ranks == full


def test_a_summary_holds_least_median_and_greatest_of_each_kernel(base):
    spectra = spectra_of(adapted(base, CONFIGS["blocks"]))
    stack, alone = summarise(spectra)
    norms = sorted(spectrum.relative_norm for spectrum in spectra[:3])
    assert (stack.name, stack.layers, stack.full_rank) == ("layers.q_proj", 3, 12)
    assert stack.relative_norm == pytest.approx(tuple(norms))
    assert stack.rank == (12, 12, 12)
    assert stack.largest == pytest.approx(tuple(sorted(s.largest for s in spectra[:3])))
    assert (alone.name, alone.layers, alone.full_rank) == ("v_proj", 1, 10)
    assert len(set(alone.largest)) == 1


def test_a_row_knows_which_layers_are_adapted_and_which_of_them_are_asked_for(base):
    config = dataclasses.replace(CONFIGS["blocks"], layers=(0, 2))
    stack, alone = target_rows(base, config)
    assert stack.selected == (0, 2)
    assert stack.among([]) == (0, 2)
    assert stack.among([1, 2]) == (2,)
    assert (alone.stacked, alone.selected, alone.among([1, 2])) == (False, (0,), (0,))
