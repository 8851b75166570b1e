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
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.config import SmoaConfig, split_evenly
from smoa_jax.adapter.diagonal import pieces
from smoa_jax.adapter.factors import used_columns
from smoa_jax.adapter.placement import placed_like
from smoa_jax.adapter.planning.spectra import plan_spectra
from smoa_jax.adapter.planning.stack import (
    SPECTRAL_PARTITIONS,
    BandParts,
    BlockScores,
    Spectra,
    abstract_spectrum,
)
from smoa_jax.adapter.targets import Target, find_targets, lookup, replaced, walk
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
from smoa_jax.checks import require


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
    if spectra is None:
        spectra = plan_spectra(base_params, config, targets=targets)
    _check_spectra(spectra, targets, config)
    abstract = any(
        isinstance(lookup(base_params, target.kernel_path), jax.ShapeDtypeStruct)
        for target in targets
    )
    params = base_params
    for target in targets:
        path_key = jax.random.fold_in(key, zlib.crc32(target.name.encode()))
        build = functools.partial(_initial, target, config)
        if abstract:
            node = jax.eval_shape(build, path_key, spectra.get(target.name))
        else:
            node = build(path_key, spectra.get(target.name))
            node = placed_like(lookup(params, target.kernel_path), node)
        params = replaced(params, (*target.path, SMOA_KEY), node)
    return params


def abstract_modulations(targets: list[Target], config: SmoaConfig) -> list[Modulation]:
    """What ``apply_smoa`` would put beside each target, of ``ShapeDtypeStruct``."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return [
        jax.eval_shape(
            functools.partial(_initial, target, config), key, abstract_spectrum(target, config)
        )
        for target in targets
    ]


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
        require(
            (left is None) != (right is None),
            f"two trees of which {'neither has' if left is None else 'both have'} a leaf at "
            f"{jax.tree_util.keystr(path)}",
            "exactly one",
            "pass the two results of partition",
        )
        return left if right is None else right

    return jax.tree_util.tree_map_with_path(
        pick, trainable, frozen, is_leaf=lambda leaf: leaf is None
    )


def find_modulations(params: Params) -> dict[str, tuple[tuple[str, ...], Modulation, str]]:
    """Every adapted module: dotted name -> (path, modulation, key of its kernel)."""
    found = {}
    for (*path, _), node in walk(params):
        if is_modulation(node):
            name = ".".join(path)
            found[name] = (tuple(path), node, kernel_key(lookup(params, path), node, name))
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
    sizes = config.subspace_shapes(inputs, outputs)
    per_layer = sum(
        rank * (rows + columns)
        for rank, (rows, columns) in zip(target.subspace_ranks, sizes, strict=True)
    )
    return per_layer * sum(target.selected)


# ------------------------------------------------------------------------------ initial values


def _initial(target: Target, config: SmoaConfig, key: jax.Array, spectrum: Any) -> Modulation:
    """The modulation of one kernel, stacked as its kernel is."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(target.selected)))
    scores = spectrum if isinstance(spectrum, BlockScores) else None
    if not target.leading:
        scores = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], scores)
    one_layer = functools.partial(_initial_layer, target, config)
    node = jax.vmap(one_layer)(keys, jnp.asarray(target.selected), scores)
    if not target.leading:
        node = jax.tree.map(lambda leaf: leaf[0], node)
    if isinstance(spectrum, BandParts):  # as they are laid out: out of the vmap
        node = dataclasses.replace(
            node,
            bands=jnp.asarray(spectrum.bands),
            cuts=jnp.asarray(spectrum.cuts),
            norms=jnp.asarray(spectrum.norms),
        )
    return node


def _initial_layer(
    target: Target, config: SmoaConfig, key: jax.Array, selected: jax.Array, scores: Any
) -> Modulation:
    """One layer: A uniform within 1/sqrt(inputs of its subspace), B zero; bands come later."""
    inputs, outputs = target.matrix_shape[-2:]
    width = max(target.subspace_ranks)
    kept = selected.astype(jnp.float32)  # a layer left out has rank 0 and scale 0
    ranks = np.asarray(target.subspace_ranks, np.float32) * kept
    common: dict[str, Any] = {
        "scale": config.scale(target.rank) * kept,
        "ranks": ranks,
        "weight_modulated": config.modulation == "weight",
        "dropout": config.dropout,
        "view": target.view_text,
    }
    if config.has_blocks:
        in_block, out_block = _block_ids(config, key, inputs, outputs, scores)
        sizes = np.asarray(split_evenly(inputs, config.num_subspaces), np.float32)
        bound = jnp.asarray(1.0 / np.sqrt(sizes), jnp.float32)[in_block.astype(jnp.int32)][:, None]
        a = _uniform(key, (inputs, width), bound) * used_columns(ranks, width, in_block)
        b = jnp.zeros((outputs, width), jnp.float32)
        common["contiguous"] = config.partition == "contiguous_blocks"
        return Blocks(a=a, b=b, in_block=in_block, out_block=out_block, **common)
    bound = jnp.asarray(1.0 / np.sqrt(inputs), jnp.float32)
    used = used_columns(ranks, width)[:, None, :]
    a = _uniform(key, (len(target.subspace_ranks), inputs, width), bound) * used
    b = jnp.zeros((len(target.subspace_ranks), outputs, width), jnp.float32)
    if config.partition == "none":
        return LowRank(a=a[0], b=b[0], **common)
    return Bands(a=a, b=b, bands=None, cuts=None, norms=None, **common)


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: jax.Array) -> jax.Array:
    return bound * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)


def _block_ids(
    config: SmoaConfig, key: jax.Array, inputs: int, outputs: int, spectrum: Any
) -> tuple[jax.Array, jax.Array]:
    """Block of every input and output coordinate: pieces of an order, back in kernel order."""

    in_order, out_order = (
        jnp.asarray(pieces(size, config.num_subspaces)) for size in (inputs, outputs)
    )
    if config.partition == "contiguous_blocks":
        return in_order, out_order
    if config.partition == "random_blocks":
        for_inputs, for_outputs = jax.random.split(jax.random.fold_in(key, 1))
        return (
            jax.random.permutation(for_inputs, in_order),
            jax.random.permutation(for_outputs, out_order),
        )
    return (
        jnp.zeros_like(in_order).at[jnp.argsort(spectrum.inputs, stable=True)].set(in_order),
        jnp.zeros_like(out_order).at[jnp.argsort(spectrum.outputs, stable=True)].set(out_order),
    )


# ------------------------------------------------------------------------------------- plumbing


def _check_spectra(spectra: Spectra, targets: list[Target], config: SmoaConfig) -> None:
    """Refuse spectra of another partition or other params than the targets'."""
    if config.partition not in SPECTRAL_PARTITIONS:
        return
    for target in targets:
        got, expected = spectra.get(target.name), abstract_spectrum(target, config)
        require(
            type(got) is type(expected),
            f"{type(got).__name__} as spectrum of {target.name}",
            type(expected).__name__,
            "plan the spectra with the same config",
        )
        shapes = [
            tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(found)) for found in (got, expected)
        ]
        require(
            shapes[0] == shapes[1],
            f"a spectrum of {target.name} with shapes {shapes[0]}",
            f"{shapes[1]}",
            "plan the spectra of these params with the same config",
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
    require(
        len(candidates) == 1,
        f"{len(candidates)} kernels beside the adapter of {name}",
        "one",
        "keep the tree as apply_smoa made it",
    )
    return candidates[0]
