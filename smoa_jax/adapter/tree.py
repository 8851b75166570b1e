"""Adapters as pure functions of a parameter tree.

Before and after, for one stacked kernel of an L-layer model (I inputs, O outputs, M subspaces):

    layers/self_attn/q_proj/kernel   bf16[L, I, O]
    ------------------------------------------------------------------------------
    layers/self_attn/q_proj/kernel   bf16[L, I, O]                          frozen
    layers/self_attn/q_proj/smoa     Blocks(a=f32[L, I, R_m],               trained
                                            b=f32[L, O, R_m],               trained
                                            in_block=f32[L, I],             frozen
                                            out_block=f32[L, O],            frozen
                                            scale=f32[L], ranks=f32[L, M])  frozen

Nothing else changes, no model class is known, and abstract trees work as concrete ones do.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.config import SmoaConfig, split_evenly
from smoa_jax.adapter.placement import placed_like
from smoa_jax.adapter.planning.spectra import BandParts, BlockScores, Spectra, plan_spectra
from smoa_jax.adapter.targets import Target, find_targets, lookup, replaced
from smoa_jax.adapter.types import (
    SMOA_KEY,
    TRAINABLE_FIELDS,
    Bands,
    Blocks,
    LowRank,
    Modulation,
    Params,
    is_modulation,
)


def apply_smoa(
    base_params: Params,
    config: SmoaConfig,
    key: jax.Array,
    spectra: Spectra | None = None,
) -> Params:
    """Put a modulation beside every targeted kernel; the model stays the same, bit for bit.

    >>> params = apply_smoa(base_params, SmoaConfig(rank=32), jax.random.key(0))

    Memory: the kernels are shared with ``base_params``, not copied, and the new tensors lie as
    they do: a kernel with a ``NamedSharding`` has its adapter on the same mesh. A kernel's draw
    depends on ``key``, its path and its layer alone, so other targets don't change it.

    Args:
        base_params: Nested dict of arrays, tracers or ``ShapeDtypeStruct``.
        config: What to adapt and how.
        key: Of the initial draw of A, and of the partition of ``random_blocks``.
        spectra: From ``plan_spectra``; planned here when None. Under ``jit``, pass them.

    Returns:
        A new tree: A ~ U(-1/sqrt(I_m), 1/sqrt(I_m)) and B = 0, float32 [S2, step 6].

    Raises:
        ValueError: for targets, ranks or spectra that do not fit ``base_params``.
    """
    targets = find_targets(base_params, config)
    kernels = [lookup(base_params, target.path)[target.key] for target in targets]
    if spectra is None:
        spectra = plan_spectra(base_params, config)
    _check_spectra(spectra, targets, config)
    abstract = any(isinstance(kernel, jax.ShapeDtypeStruct) for kernel in kernels)
    params = base_params
    for target in targets:

        def build(key: jax.Array, spectrum: Any, target: Target = target) -> Modulation:
            path_key = jax.random.fold_in(key, zlib.crc32(target.name.encode()))
            return _initial(target, config, path_key, spectrum)

        spectrum = spectra.get(target.name)
        module = dict(lookup(params, target.path))
        if abstract:
            node = jax.eval_shape(build, key, spectrum)
        else:
            node = placed_like(module[target.key], build(key, spectrum))
        module[SMOA_KEY] = node
        params = replaced(params, target.path, module)
    return params


def trainable_mask(params: Params) -> Params:
    """The optax contract: a tree of the same structure, True exactly on ``a`` and ``b``.

    >>> transform = optax.partition({True: optax.adamw(1e-2), False: optax.set_to_zero()}, mask)

    ``optax.masked`` alone does not freeze: it passes the raw gradients of False leaves through.
    """

    def mask(node: Any) -> Any:
        if not is_modulation(node):
            return False
        frozen = jax.tree.map(lambda _: False, node)
        return dataclasses.replace(frozen, **dict.fromkeys(TRAINABLE_FIELDS, True))

    return jax.tree.map(mask, params, is_leaf=is_modulation)


def partition(params: Params) -> tuple[Params, Params]:
    """Split into (trainable, frozen): two trees of the same dicts, None where the other has a leaf.

    Differentiating the trainable tree alone means that gradients of frozen weights never exist.
    """
    mask = trainable_mask(params)
    trainable = jax.tree.map(lambda leaf, trains: leaf if trains else None, params, mask)
    frozen = jax.tree.map(lambda leaf, trains: None if trains else leaf, params, mask)
    return trainable, frozen


def combine(trainable: Params, frozen: Params) -> Params:
    """The inverse of ``partition``.

    Raises:
        ValueError: if both trees, or neither, have a leaf at a place.
    """

    def pick(path: Any, left: Any, right: Any) -> Any:
        if (left is None) == (right is None):
            which = "neither tree has" if left is None else "both trees have"
            raise ValueError(
                f"got two trees of which {which} a leaf at {jax.tree_util.keystr(path)}; expected "
                "exactly one; pass the two results of partition"
            )
        return left if right is None else right

    return jax.tree_util.tree_map_with_path(
        pick, trainable, frozen, is_leaf=lambda leaf: leaf is None
    )


def find_modulations(params: Params) -> dict[str, tuple[tuple[str, ...], Modulation, str]]:
    """Every adapted module: dotted name -> (path, modulation, key of its kernel)."""
    found: dict[str, tuple[tuple[str, ...], Modulation, str]] = {}

    def visit(tree: Params, path: tuple[str, ...]) -> None:
        for key, value in tree.items():
            if is_modulation(value):
                found[".".join(path)] = (path, value, kernel_key(tree, value, ".".join(path)))
            elif isinstance(value, dict):
                visit(value, (*path, key))

    visit(params, ())
    return dict(sorted(found.items()))


def strip_smoa(params: Params) -> Params:
    """The base params of an adapted tree: the same arrays without the modulations."""
    return {
        key: strip_smoa(value) if isinstance(value, dict) else value
        for key, value in params.items()
        if not is_modulation(value)
    }


def count_trainable(base_params: Params, config: SmoaConfig) -> int:
    """Trained parameters of an adapter, by its ranks (padding does not count)."""
    return sum(count_target(target, config) for target in find_targets(base_params, config))


def count_target(target: Target, config: SmoaConfig) -> int:
    """Trained parameters of one kernel, over its selected layers."""
    inputs, outputs = target.matrix_shape[-2:]
    sizes = [(inputs, outputs)] * config.num_subspaces
    if config.has_blocks:
        pieces = (split_evenly(size, config.num_subspaces) for size in (inputs, outputs))
        sizes = list(zip(*pieces, strict=True))
    per_layer = sum(
        rank * (rows + columns)
        for rank, (rows, columns) in zip(target.subspace_ranks, sizes, strict=True)
    )
    return per_layer * sum(target.selected)


# ------------------------------------------------------------------------------ initial values


def _initial(target: Target, config: SmoaConfig, key: jax.Array, spectrum: Any) -> Modulation:
    """The modulation of one kernel at init, with its leading layer axis if it has one."""
    keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(len(target.selected)))
    selected = jnp.asarray(target.selected)
    build = jax.vmap(lambda *arguments: _initial_layer(target, config, *arguments))
    planned = isinstance(spectrum, BandParts)
    if planned:  # bands stay as they are laid out, out of the vmap
        bands, spectrum = spectrum, None
    elif not target.leading and spectrum is not None:
        spectrum = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], spectrum)
    node = build(keys, selected, spectrum)
    node = node if target.leading else jax.tree.map(lambda leaf: leaf[0], node)
    if planned:
        parts = {name: jnp.asarray(getattr(bands, name)) for name in ("bands", "cuts", "norms")}
        node = dataclasses.replace(node, **parts)
    return node


def _initial_layer(
    target: Target, config: SmoaConfig, key: jax.Array, selected: jax.Array, spectrum: Any
) -> Modulation:
    inputs, outputs = target.matrix_shape[-2:]
    ranks = np.asarray(target.subspace_ranks)
    width = int(ranks.max())
    kept = selected.astype(jnp.float32)
    common: dict[str, Any] = {
        "scale": config.scale(target.rank) * kept,
        "ranks": ranks.astype(np.float32) * kept,
        "weight_modulated": config.modulation == "weight",
        "dropout": config.dropout,
        "view": target.view_text,
    }
    if config.has_blocks:
        in_block, out_block = _block_ids(config, key, inputs, outputs, spectrum)
        sizes = np.asarray(split_evenly(inputs, config.num_subspaces), np.float32)
        own = in_block.astype(jnp.int32)
        used = jnp.arange(width)[None, :] < jnp.asarray(ranks)[own][:, None]
        bound = jnp.asarray(1.0 / np.sqrt(sizes), jnp.float32)[own][:, None]
        a = _uniform(key, (inputs, width), bound) * used * kept
        b = jnp.zeros((outputs, width), jnp.float32)
        return Blocks(a=a, b=b, in_block=in_block, out_block=out_block, **common)
    bound = jnp.asarray(1.0 / np.sqrt(inputs), jnp.float32)
    if config.partition == "none":
        a = _uniform(key, (inputs, width), bound) * kept
        return LowRank(a=a, b=jnp.zeros((outputs, width), jnp.float32), **common)
    used = jnp.arange(width)[None, :] < jnp.asarray(ranks)[:, None]
    a = _uniform(key, (len(ranks), inputs, width), bound) * used[:, None, :] * kept
    return Bands(
        a=a,
        b=jnp.zeros((len(ranks), outputs, width), jnp.float32),
        bands=None,  # _initial puts in what was planned
        cuts=None,
        norms=None,
        **common,
    )


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: jax.Array) -> jax.Array:
    return bound * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)


def _block_ids(
    config: SmoaConfig, key: jax.Array, inputs: int, outputs: int, spectrum: Any
) -> tuple[jax.Array, jax.Array]:
    """Block of every input and output coordinate: pieces of an order, back in kernel order."""

    def pieces(size: int) -> jax.Array:
        sizes = split_evenly(size, config.num_subspaces)
        return jnp.asarray(np.repeat(np.arange(len(sizes)), sizes), jnp.float32)

    if config.partition == "contiguous_blocks":
        return pieces(inputs), pieces(outputs)
    if config.partition == "random_blocks":
        for_inputs, for_outputs = jax.random.split(jax.random.fold_in(key, 1))
        return (
            jax.random.permutation(for_inputs, pieces(inputs)),
            jax.random.permutation(for_outputs, pieces(outputs)),
        )
    orders = (jnp.argsort(jnp.asarray(s), stable=True) for s in (spectrum.inputs, spectrum.outputs))
    in_order, out_order = orders
    return (
        jnp.zeros(inputs, jnp.float32).at[in_order].set(pieces(inputs)),
        jnp.zeros(outputs, jnp.float32).at[out_order].set(pieces(outputs)),
    )


# ------------------------------------------------------------------------------------- plumbing


def _check_spectra(spectra: Spectra, targets: list[Target], config: SmoaConfig) -> None:
    expected_type = {"spectral_blocks": BlockScores, "spectral_bands": BandParts}.get(
        config.partition
    )
    if expected_type is None:
        return
    for target in targets:
        *leading, inputs, outputs = target.matrix_shape
        spectrum = spectra.get(target.name)
        if not isinstance(spectrum, expected_type):
            raise ValueError(
                f"got {type(spectrum).__name__} as spectrum of {target.name}; expected "
                f"{expected_type.__name__}; plan the spectra with the same config"
            )
        if isinstance(spectrum, BlockScores):
            got = (tuple(spectrum.inputs.shape), tuple(spectrum.outputs.shape))
            expected = ((*leading, inputs), (*leading, outputs))
        else:
            assert isinstance(spectrum, BandParts)
            got = tuple(spectrum.bands.shape)
            expected = (*leading, config.num_subspaces - 1, inputs, outputs)
        if got != expected:
            raise ValueError(
                f"got a spectrum of {target.name} with shape {got}; expected {expected}; plan the "
                "spectra of these params with the same config"
            )


def kernel_key(module: Params, modulation: Modulation, name: str) -> str:
    """The kernel that a modulation belongs to: ``kernel``, or else the one matrix beside it."""
    candidates = [
        key
        for key, leaf in module.items()
        if not isinstance(leaf, dict)
        and not is_modulation(leaf)
        and leaf is not None
        and len(leaf.shape) >= 2
    ]
    if "kernel" in candidates:
        return "kernel"
    if len(candidates) > 1:  # a bias may have several axes too
        size = modulation.scale.size * modulation.a.shape[-2] * modulation.b.shape[-2]
        candidates = [key for key in candidates if math.prod(module[key].shape) == size]
    if len(candidates) != 1:
        raise ValueError(
            f"got {len(candidates)} kernels beside the adapter of {name}; expected one; keep the "
            "tree as apply_smoa made it"
        )
    return candidates[0]
