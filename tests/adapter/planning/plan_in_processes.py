"""A program for the tests: one of several processes plans and adapts kernels that span them all.

``base_params``, ``CONFIGS`` and ``digests`` serve the test too, which plans the same alone.
"""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.planning import spectra as planning
from smoa_jax.adapter.planning.spectra import plan_spectra
from smoa_jax.adapter.tree import apply_smoa
from smoa_jax.adapter.types import is_modulation
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from smoa_jax.sharding.rules import param_shardings
from tests.processes import join, report

CONFIGS = {
    "blocks": SmoaConfig(
        rank=4, num_subspaces=2, target_modules=["flat", "wide", "deep", "rounded"]
    ),
    "blocks of three": SmoaConfig(rank=6, num_subspaces=3, target_modules=["wide"]),
    "some layers": SmoaConfig(rank=4, target_modules=["wide"], layers=(0, 3)),
    "bands": SmoaConfig(
        rank=4, num_subspaces=2, partition="spectral_bands", target_modules=["flat", "deep"]
    ),
    "a view": SmoaConfig(
        rank=4,
        target_modules=["heads"],
        kernel_views={"heads/kernel|heads": "D L N H -> L | D | N H"},
    ),
}
#: Divided every way that there is: both axes, the layers, one axis, none (so the array is copied).
RULES = {
    "flat/kernel": "tensor, fsdp",
    "wide/kernel": "-, fsdp, tensor",
    "deep/kernel": "fsdp, -, tensor",
    "rounded/kernel": "replicate",
    "heads/kernel": "fsdp, -, tensor, -",
}


def base_params() -> dict:
    """Kernels of every layout, on the host; alike in shape, since each shape is compiled for."""
    draw = np.random.default_rng(3).standard_normal
    return {
        "flat": {"kernel": draw((24, 32)).astype(np.float32)},
        "wide": {"kernel": draw((4, 24, 32)).astype(np.float32)},
        "deep": {"kernel": draw((4, 24, 32)).astype(np.float32)},
        "rounded": {"kernel": draw((4, 24, 32)).astype(jnp.bfloat16)},
        "heads": {"kernel": draw((40, 3, 2, 8)).astype(np.float32)},
    }


def digests(tree) -> dict[str, str]:
    """A digest of every array of a tree, wherever its parts lie."""

    def digest(leaf) -> str:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        values = np.asarray(leaf)
        return hashlib.sha256(
            str((values.dtype, values.shape)).encode() + values.tobytes()
        ).hexdigest()

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): digest(leaf) for path, leaf in leaves}


def outcome_of(params, config: SmoaConfig, mesh=None) -> dict:
    """Digests of the spectra and of the modulations, placed on the mesh if there is one."""
    spectra = plan_spectra(params, config)
    found = {"spectra": digests(spectra)}
    if config.kernel_views:  # rules know no views
        return found
    adapted = apply_smoa(params, config, jax.random.key(1), spectra)
    if mesh is not None:
        where = param_shardings(adapted, mesh, RULES)
        adapted = jax.tree.map(
            lambda node, place: jax.device_put(node, place) if is_modulation(node) else node,
            adapted,
            where,
            is_leaf=is_modulation,
        )
        assert jax.tree.map(lambda leaf: leaf.sharding, adapted) == where
    return {**found, "adapted": digests(adapted)}


def main() -> None:
    (cache_dir,) = join()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    host = base_params()
    where = param_shardings(host, mesh, RULES)
    params = jax.tree.map(jax.device_put, host, where)
    assert not params["wide"]["kernel"].is_fully_addressable
    outcomes = {name: outcome_of(params, config, mesh) for name, config in CONFIGS.items()}
    # Kernels that each process holds whole are shared out too.
    outcomes["whole"] = outcome_of(host, CONFIGS["blocks"])

    decomposed = []
    original = planning.layer_scores
    planning.layer_scores = lambda matrix: decomposed.append(matrix.shape) or original(matrix)
    for _ in range(2):
        plan_spectra(params, CONFIGS["blocks"], cache_dir=cache_dir)
    outcomes["decomposed"] = len(decomposed)

    host["wide"]["kernel"][1, 2, 3] = np.inf  # of the second process's share
    poisoned = jax.tree.map(jax.device_put, host, where)
    try:
        plan_spectra(poisoned, CONFIGS["some layers"])
        outcomes["unselected"] = "passed"
        plan_spectra(poisoned, CONFIGS["blocks"])
    except ValueError as error:
        outcomes["error"] = str(error)
    report(outcomes)


if __name__ == "__main__":
    main()
