"""The score of coordinates that kernels share, by the formula's letter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax import SmoaConfig, apply_smoa, plan_spectra
from smoa_jax.adapter.planning.aligned import SharedAxis

CONFIG = SmoaConfig(
    rank=4, num_subspaces=2, partition="aligned_blocks", target_modules=["up", "out"], layers=(0, 2)
)
STREAM, INNER = SharedAxis("stream"), SharedAxis("inner", per_layer=True, groups=3)
TABLE = {("up", "kernel"): (STREAM, INNER), ("out", "kernel"): (INNER, STREAM)}


def tree():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "up": {
            "kernel": jax.random.normal(keys[0], (3, 10, 12)) * jnp.arange(1, 11)[None, :, None]
        },
        "out": {"kernel": 40 * jax.random.normal(keys[1], (3, 12, 10))},
    }


def centre(weight):
    """[S2], step 2, by NumPy's SVD in float64: of inputs and of outputs."""
    u, s, vt = np.linalg.svd(np.asarray(weight, np.float64), full_matrices=False)
    j = np.arange(len(s))
    return [(vectors**2 * s**2) @ j / ((vectors**2 * s**2).sum(axis=1)) for vectors in (u, vt.T)]


def by_the_formula(params):
    """Scores of the stream's ten coordinates, and of the inner twelve in each selected layer."""
    stream, inner = np.zeros((2, 10)), np.zeros((3, 2, 3))
    for name, sides in (("up", ("stream", "inner")), ("out", ("inner", "stream"))):
        for layer in CONFIG.layers:
            weight = np.asarray(params[name]["kernel"][layer], np.float64)
            energy = weight**2 / (weight**2).sum()
            for side, scores, w in zip(
                sides, centre(weight), (energy.sum(axis=1), energy.sum(axis=0)), strict=True
            ):
                rank = np.argsort(np.argsort(scores)) / (len(scores) - 1)
                if side == "stream":
                    stream += [w * rank, w]
                else:
                    inner[layer] += np.stack([w * rank, w]).reshape(2, 3, 4).sum(axis=-1)
    return stream[0] / stream[1], inner[:, 0] / np.maximum(inner[:, 1], 1e-30)


def test_shared_scores_are_the_energys_mean_of_ranks():
    params = tree()
    spectra = plan_spectra(params, CONFIG, shared_axes=TABLE)
    stream, inner = by_the_formula(params)
    for got in (spectra["up"].inputs, spectra["out"].outputs):
        np.testing.assert_allclose(got, np.broadcast_to(stream, (3, 10)), rtol=1e-5)
    for layer in CONFIG.layers:
        expected = np.repeat(inner[layer], 4)
        np.testing.assert_allclose(spectra["up"].outputs[layer], expected, rtol=1e-5)
        np.testing.assert_allclose(spectra["out"].inputs[layer], expected, rtol=1e-5)


def test_traced_planning_gives_the_same_scores():
    params = tree()
    every = SmoaConfig(**{**CONFIG.to_fields(), "layers": ()})
    planned = plan_spectra(params, every, shared_axes=TABLE)
    traced = jax.jit(lambda p: plan_spectra(p, every, shared_axes=TABLE))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), planned, traced)


def test_without_a_table_each_kernel_has_its_own_order():
    params = tree()
    own = plan_spectra(params, CONFIG)
    spectral = plan_spectra(
        params, SmoaConfig(**{**CONFIG.to_fields(), "partition": "spectral_blocks"})
    )
    jax.tree.map(np.testing.assert_array_equal, own, spectral)
    nodes = apply_smoa(params, CONFIG, jax.random.key(0), own)
    assert not nodes["up"]["smoa"].contiguous


@pytest.mark.parametrize("size", [10, 12])
def test_blocks_of_a_shared_order_are_even(size):
    nodes = apply_smoa(
        tree(), CONFIG, jax.random.key(0), plan_spectra(tree(), CONFIG, shared_axes=TABLE)
    )
    ids = nodes["up"]["smoa"].in_block if size == 10 else nodes["up"]["smoa"].out_block
    assert ids.shape == (3, size)
    assert jnp.array_equal((ids == 0).sum(axis=-1), jnp.full(3, size // 2))
