"""What of an adapted tree has to be stored, and how a stored adapter comes back onto its base.

Of the whole tree only the modulations' leaves are stored, under their path and field:

    layers/self_attn/q_proj/a      layers/self_attn/q_proj/in_block      ...

Never the base, and never the bands of a weight: those are as large as the base and follow from it,
so their cut indices and norms are stored instead, and on the way back the bands are recomputed and
compared. Block ids *are* stored and never recomputed, because another linear-algebra library may
order a spectrum differently and the adapter would be silently wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.config import SmoaConfig, split_evenly
from smoa_jax.adapter.planning.spectra import BandParts, Progress, check_bands, plan_spectra
from smoa_jax.adapter.targets import Target, find_targets, lookup, replaced
from smoa_jax.adapter.tree import apply_smoa, find_modulations
from smoa_jax.adapter.types import (
    SMOA_KEY,
    TRAINABLE_FIELDS,
    Bands,
    Blocks,
    Modulation,
    Params,
    is_modulation,
)
from smoa_jax.checkpoint.errors import CheckpointError, listed

#: "path/field" -> array (or its abstract stand-in).
Leaves: TypeAlias = dict[str, Any]

_NEVER_STORED = ("bands",)


def adapter_leaves(params: Params) -> Leaves:
    """Everything of an adapter that has to be stored, by name.

    >>> state = {"adapter": adapter_leaves(frozen), "trainable": trainable, ...}

    Args:
        params: An adapted tree, or one half of ``partition``; arrays or abstract leaves.

    Returns:
        The leaves of all modulations in sorted order, but the bands and what is None.
    """
    leaves: Leaves = {}

    def visit(tree: Params, path: tuple[str, ...]) -> None:
        for key, value in tree.items():
            if is_modulation(value):
                for name in _stored_fields(value):
                    leaf = getattr(value, name)
                    if leaf is not None:
                        is_host = isinstance(leaf, np.ndarray)
                        leaves["/".join((*path, name))] = jnp.asarray(leaf) if is_host else leaf
            elif isinstance(value, dict):
                visit(value, (*path, key))

    visit(params, ())
    return dict(sorted(leaves.items()))


def attach_leaves(base_params: Params, config: SmoaConfig, leaves: Mapping[str, Any]) -> Params:
    """Stored leaves beside an abstract base: an adapted tree of which only the adapter is there.

    Raises:
        CheckpointError: as ``check_leaves``.
    """
    check_leaves(base_params, config, leaves)
    params = abstract_adapter(base_params, config)
    for path, node, _ in find_modulations(params).values():
        fields = {name: leaves["/".join((*path, name))] for name in _stored_fields(node)}
        params = replaced(params, (*path, SMOA_KEY), dataclasses.replace(node, **fields))
    return params


def abstract_adapter(base_params: Params, config: SmoaConfig) -> Params:
    """The adapted tree with ``ShapeDtypeStruct`` leaves; computes nothing."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base_params)
    return apply_smoa(abstract, config, jax.random.key(0))


def restore_adapter(
    base_params: Params,
    config: SmoaConfig,
    leaves: Mapping[str, Any],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Params:
    """Put stored leaves onto their base: the inverse of ``adapter_leaves``.

    >>> params = restore_adapter(base.params, config, adapter_leaves(params))

    Args:
        base_params: The tree that the adapter was made for, on devices.
        config: The adapter's own.
        leaves: Of the whole adapter, trained and frozen, where they shall lie.
        cache_dir: For spectral bands, as ``plan_spectra`` takes it; they are computed again.
        progress: Likewise.

    Raises:
        CheckpointError: if a leaf is missing or surplus or doesn't fit the base or the config, or
            if the bands of this base are not those that the adapter was trained with.
    """
    check_leaves(base_params, config, leaves)
    expected = abstract_adapter(base_params, config)
    spectra = {}
    if config.partition == "spectral_bands":
        spectra = plan_spectra(
            base_params,
            config,
            cache_dir=cache_dir,
            progress=progress,
            cuts={
                target.name: leaves["/".join((*target.path, "cuts"))]
                for target in find_targets(base_params, config)
            },
        )
    params = base_params
    for target in find_targets(base_params, config):
        node, fields = _fields(expected, target, leaves)
        if isinstance(node, Bands):
            spectrum = spectra[target.name]
            assert isinstance(spectrum, BandParts)
            _check_spectrum(target, fields, spectrum)
            fields["bands"] = jnp.asarray(spectrum.bands)
        module = {**lookup(params, target.path), SMOA_KEY: dataclasses.replace(node, **fields)}
        params = replaced(params, target.path, module)
    return params


def check_leaves(base_params: Params, config: SmoaConfig, leaves: Mapping[str, Any]) -> None:
    """Refuse leaves that aren't those of an adapter that ``config`` makes on ``base_params``.

    Raises:
        CheckpointError: naming the leaf.
    """
    expected = abstract_adapter(base_params, config)
    _check_names(adapter_leaves(expected), leaves)
    for target in find_targets(base_params, config):
        node, fields = _fields(expected, target, leaves)
        _check_values(target, config, dataclasses.replace(node, **fields))


def count_parameters(params: Params) -> int:
    """Trained parameters of an adapted tree by its ranks, padding left out.

    A block's factors have rows of their own block alone, so each row counts its block's rank.
    """
    total = 0
    for _, node, _ in find_modulations(params).values():
        ranks = np.asarray(node.ranks, np.int64)
        if isinstance(node, Blocks):
            for block in (node.in_block, node.out_block):
                ids = np.asarray(block, np.int64)
                total += int(np.take_along_axis(ranks, ids, axis=-1).sum())
        else:
            total += int(ranks.sum()) * (node.a.shape[-2] + node.b.shape[-2])
    return total


def _fields(
    expected: Params, target: Target, leaves: Mapping[str, Any]
) -> tuple[Modulation, dict[str, Any]]:
    """The abstract modulation of a target, and its stored leaves by field."""
    node = lookup(expected, (*target.path, SMOA_KEY))
    fields = {name: leaves["/".join((*target.path, name))] for name in _stored_fields(node)}
    return node, fields


def _stored_fields(node: Modulation) -> tuple[str, ...]:
    return tuple(
        field.name
        for field in dataclasses.fields(node)
        if not field.metadata.get("static") and field.name not in _NEVER_STORED
    )


def _check_names(expected: Leaves, leaves: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in leaves]
    surplus = [name for name in leaves if name not in expected]
    if missing or surplus:
        parts = [f"without {listed(missing)}"] if missing else []
        parts += [f"with {listed(surplus)}, which it has no place for"] if surplus else []
        raise CheckpointError(
            f"got an adapter {' and '.join(parts)}; expected the tensors that its config asks for "
            "on this base; use the file and the base that belong together"
        )
    for name, leaf in expected.items():
        if tuple(leaves[name].shape) != tuple(leaf.shape):
            raise CheckpointError(
                f"got {name} of shape {tuple(leaves[name].shape)}; expected {tuple(leaf.shape)} "
                "by the adapter's rank, subspaces and base; use the config it was made with"
            )
        if not jnp.issubdtype(leaves[name].dtype, jnp.floating):
            raise CheckpointError(
                f"got {name} of dtype {leaves[name].dtype}; expected a floating dtype"
            )


def _check_spectrum(target: Target, fields: Mapping[str, Any], spectrum: BandParts) -> None:
    try:
        check_bands(np.asarray(fields["norms"]), spectrum, target.name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _check_values(target: Target, config: SmoaConfig, node: Modulation) -> None:
    """The small frozen leaves against the config, and zeros where nothing may be."""
    selected = np.asarray(target.selected, np.float32)
    ranks = selected[:, None] * np.asarray(target.subspace_ranks, np.float32)
    scale = selected * np.float32(config.scale(target.rank))
    if not target.leading:
        ranks, scale = ranks[0], scale[0]
    if not _equal(node.ranks, ranks):
        raise CheckpointError(
            f"got other ranks for {target.name} than the config's {target.subspace_ranks}; "
            "expected equal ones; use the config that the adapter was made with"
        )
    if not _equal(node.scale, scale, 1e-6):
        raise CheckpointError(
            f"got another scale for {target.name} than the config's "
            f"{config.scale(target.rank):.6g}; expected equal ones; use the config that the "
            "adapter was made with"
        )
    if isinstance(node, Blocks):
        _check_blocks(target, config, node)
    for name in TRAINABLE_FIELDS:
        if not _padding_is_zero(node, name, ranks):
            raise CheckpointError(
                f"got values in the padding of {name} of {target.name}, beyond its ranks "
                f"{target.subspace_ranks}; expected zeros; the adapter is damaged"
            )


def _check_blocks(target: Target, config: SmoaConfig, node: Blocks) -> None:
    inputs, outputs = target.matrix_shape[-2:]
    for name, size in (("in_block", inputs), ("out_block", outputs)):
        sizes = split_evenly(size, config.num_subspaces)
        pieces = np.repeat(np.arange(len(sizes), dtype=np.float32), sizes)
        if not _equal(jnp.sort(getattr(node, name), axis=-1), pieces):
            raise CheckpointError(
                f"got {name} of {target.name} that doesn't divide {size} coordinates in blocks of "
                f"{listed(sizes)}; expected one block id for each; the adapter is damaged"
            )


def _padding_is_zero(node: Modulation, name: str, ranks: np.ndarray) -> bool:
    factor = getattr(node, name)
    width = factor.shape[-1]
    if float(ranks.min()) == width:
        return True
    used = jnp.asarray(np.arange(width) < ranks[..., None])  # (L?, M, R_m)
    if isinstance(node, Blocks):
        block = node.in_block if name == "a" else node.out_block
        used = jnp.take_along_axis(used, block.astype(jnp.int32)[..., None], axis=-2)
    elif isinstance(node, Bands):
        used = used[..., None, :]
    return bool(jnp.all(jnp.where(used, 0, factor) == 0))


def _equal(got: Any, expected: np.ndarray, tolerance: float = 0.0) -> bool:
    """Whether arrays agree; on devices, so that it works for what spans several processes."""
    expected = np.broadcast_to(expected, got.shape)
    return bool(jnp.all(jnp.abs(got - expected) <= tolerance * np.abs(expected)))
