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
from smoa_jax.adapter.diagonal import pieces
from smoa_jax.adapter.factors import padding_is_zero
from smoa_jax.adapter.placement import placed_like
from smoa_jax.adapter.planning.spectra import Progress, check_bands, plan_spectra
from smoa_jax.adapter.targets import Target, find_targets, lookup, replaced, walk
from smoa_jax.adapter.tree import abstract_modulations, apply_smoa
from smoa_jax.adapter.types import (
    SMOA_KEY,
    TRAINABLE_FIELDS,
    Bands,
    Blocks,
    Modulation,
    Params,
    is_modulation,
    tensor_fields,
)
from smoa_jax.checkpoint.errors import as_checkpoint_error, listed, require

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
    for path, node in walk(params):
        if is_modulation(node):
            for name, leaf in _stored_fields(node).items():
                if leaf is not None:
                    is_host = isinstance(leaf, np.ndarray)
                    leaves["/".join((*path[:-1], name))] = jnp.asarray(leaf) if is_host else leaf
    return dict(sorted(leaves.items()))


def abstract_adapter(base_params: Params, config: SmoaConfig) -> Params:
    """The adapted tree with ``ShapeDtypeStruct`` leaves; computes nothing."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base_params)
    return apply_smoa(abstract, config, jax.random.key(0))


def attach_leaves(base_params: Params, config: SmoaConfig, leaves: Mapping[str, Any]) -> Params:
    """Stored leaves beside an abstract base: an adapted tree of which only the adapter is there.

    Raises:
        CheckpointError: as ``check_leaves``.
    """
    targets = find_targets(base_params, config)
    params = base_params
    for target, node in zip(targets, _stored_nodes(targets, config, leaves), strict=True):
        params = replaced(params, (*target.path, SMOA_KEY), node)
    return params


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
        leaves: Of the whole adapter, trained and frozen; they come to lie as their kernels do.
        cache_dir: For spectral bands, as ``plan_spectra`` takes it; they are computed again.
        progress: Likewise.

    Raises:
        CheckpointError: if a leaf is missing or surplus or doesn't fit the base or the config, or
            if the bands of this base are not those that the adapter was trained with.
    """
    targets = find_targets(base_params, config)
    nodes = _stored_nodes(targets, config, leaves)
    cuts = {
        target.name: node.cuts
        for target, node in zip(targets, nodes, strict=True)
        if isinstance(node, Bands)
    }
    spectra = {}
    if cuts:
        spectra = plan_spectra(
            base_params,
            config,
            cache_dir=cache_dir,
            progress=progress,
            cuts=cuts,
            targets=targets,
        )
    params = base_params
    for target, node in zip(targets, nodes, strict=True):
        if isinstance(node, Bands):
            node = _with_bands(node, spectra[target.name], target.name)
        node = placed_like(lookup(params, target.kernel_path), node)
        params = replaced(params, (*target.path, SMOA_KEY), node)
    return params


def _with_bands(node: Bands, spectrum: Any, name: str) -> Bands:
    """Stored leaves with the bands of this base, whose norms must be the stored ones."""
    with as_checkpoint_error():
        check_bands(np.asarray(node.norms), spectrum, name)
    return dataclasses.replace(node, bands=jnp.asarray(spectrum.bands))


def check_leaves(base_params: Params, config: SmoaConfig, leaves: Mapping[str, Any]) -> None:
    """Refuse leaves that aren't those of an adapter that ``config`` makes on ``base_params``.

    Raises:
        CheckpointError: naming the leaf.
    """
    _stored_nodes(find_targets(base_params, config), config, leaves)


def _stored_nodes(
    targets: list[Target], config: SmoaConfig, leaves: Mapping[str, Any]
) -> list[Modulation]:
    """The modulation of each target with its stored leaves, checked; bands stay abstract."""
    expected = abstract_modulations(targets, config)
    names = {
        target.name: {name: "/".join((*target.path, name)) for name in _stored_fields(node)}
        for target, node in zip(targets, expected, strict=True)
    }
    _check_names(
        {
            names[target.name][field]: leaf
            for target, node in zip(targets, expected, strict=True)
            for field, leaf in _stored_fields(node).items()
        },
        leaves,
    )
    nodes = []
    for target, node in zip(targets, expected, strict=True):
        fields = {field: leaves[name] for field, name in names[target.name].items()}
        nodes.append(dataclasses.replace(node, **fields))
        _check_values(target, config, nodes[-1])
    return nodes


def _stored_fields(node: Modulation) -> dict[str, Any]:
    return {k: leaf for k, leaf in tensor_fields(node).items() if k not in _NEVER_STORED}


# -------------------------------------------------------------------------------------- refusals


def _check_names(expected: Leaves, leaves: Mapping[str, Any]) -> None:
    """Refuse leaves by other names, of other shapes or of dtypes that aren't floating."""
    missing = [name for name in expected if name not in leaves]
    surplus = [name for name in leaves if name not in expected]
    parts = [f"without {listed(missing)}"] if missing else []
    parts += [f"with {listed(surplus)}, which it has no place for"] if surplus else []
    require(
        not parts,
        f"an adapter {' and '.join(parts)}",
        "the tensors that its config asks for on this base",
        "use the file and the base that belong together",
    )
    for name, leaf in expected.items():
        got = leaves[name]
        require(
            tuple(got.shape) == tuple(leaf.shape),
            f"{name} of shape {tuple(got.shape)}",
            f"{tuple(leaf.shape)} by the adapter's rank, subspaces and base",
            "use the config it was made with",
        )
        is_floating = jnp.issubdtype(got.dtype, jnp.floating)
        require(is_floating, f"{name} of dtype {got.dtype}", "a floating dtype")


def _check_values(target: Target, config: SmoaConfig, node: Modulation) -> None:
    """The small frozen leaves against the config, and zeros where nothing may be."""
    selected = np.asarray(target.selected, np.float32)
    ranks = selected[:, None] * np.asarray(target.subspace_ranks, np.float32)
    scale = selected * np.float32(config.scale(target.rank))
    if not target.leading:
        ranks, scale = ranks[0], scale[0]
    require(
        _equal(node.ranks, ranks),
        f"other ranks for {target.name} than the config's {target.subspace_ranks}",
        "equal ones",
        "use the config that the adapter was made with",
    )
    require(
        _equal(node.scale, scale, 1e-6),
        f"another scale for {target.name} than the config's {config.scale(target.rank):.6g}",
        "equal ones",
        "use the config that the adapter was made with",
    )
    if isinstance(node, Blocks):
        for name, size in zip(("in_block", "out_block"), target.matrix_shape[-2:], strict=True):
            ids, ascending = getattr(node, name), pieces(size, config.num_subspaces)
            require(
                _equal(jnp.sort(ids, axis=-1), ascending),
                f"{name} of {target.name} that doesn't divide {size} coordinates in blocks of "
                f"{listed(split_evenly(size, config.num_subspaces))}",
                "one block id for each",
                "the adapter is damaged",
            )
            require(
                not node.contiguous or _equal(ids, ascending),
                f"{name} of {target.name} in another order than {config.partition}'s",
                "ids that ascend",
                "the adapter is damaged, or its config is another's",
            )
    for name in TRAINABLE_FIELDS:
        require(
            padding_is_zero(node, name),
            f"values in the padding of {name} of {target.name}, beyond its ranks "
            f"{target.subspace_ranks}",
            "zeros",
            "the adapter is damaged",
        )


def _equal(got: Any, expected: np.ndarray, tolerance: float = 0.0) -> bool:
    """Whether arrays agree; on devices, so that it works for what spans several processes."""
    expected = np.broadcast_to(expected, got.shape)
    return bool(jnp.all(jnp.abs(got - expected) <= tolerance * np.abs(expected)))
