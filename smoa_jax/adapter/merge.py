"""Merging an adapter into its base, and an honest account of what rounding then loses.

A merge is formed in float32 at the highest precision, one layer at a time, and rounded once. In
bf16 that rounding throws away most of a gentle adapter (method.md, hazard 1): ``merge_report`` says
how much, and ``merge_smoa(params, jnp.float32)`` avoids it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from smoa_jax.adapter.modulation import residual
from smoa_jax.adapter.targets import lookup, replaced
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.adapter.types import SMOA_KEY, Modulation, Params
from smoa_jax.adapter.views import View, view_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeLoss:
    """What rounding a merged kernel loses, over all its layers.

    Attributes:
        update_norm: Frobenius norm of ``W' - W``.
        rounding_norm: Frobenius norm of ``round(W') - W'``.
        kept: Projection of ``round(W') - W`` on ``W' - W``: 1 when the update passes whole.
    """

    update_norm: float
    rounding_norm: float
    kept: float

    @property
    def relative(self) -> float:
        """``rounding_norm / update_norm``; 0 when there is no update to lose."""
        return self.rounding_norm / self.update_norm if self.update_norm else 0.0


def merge_smoa(params: Params, dtype: Any = None) -> Params:
    """Fold every modulation into its kernel: a plain tree with the structure of the base.

    >>> logits = model.apply({"params": merge_smoa(params)}, tokens)

    Differentiable, so it serves inside someone's own step on a float32 base; on a bf16 base the
    rounded weight swallows small updates: use ``modulated_matmul`` there.

    Memory: one layer's kernel in float32 beside the result.

    Args:
        params: As ``apply_smoa`` gave them, trained or not.
        dtype: Of all floating leaves of the result; None keeps each kernel's own.

    Returns:
        Plain nested dicts, without ``smoa``; concrete leaves keep the sharding of the base.

    Raises:
        ValueError: if there is nothing to merge (merging twice).
    """
    modulations = find_modulations(params)
    if not modulations:
        raise ValueError(
            "got params without any adapter; expected a tree from apply_smoa; it may have been "
            "merged already, and merging twice would be wrong"
        )
    merged = params
    for path, modulation, key in modulations.values():
        module = dict(lookup(merged, path))
        del module[SMOA_KEY]
        module[key] = _merge_kernel(module[key], modulation, dtype)
        merged = replaced(merged, path, module)
    return merged if dtype is None else jax.tree.map(lambda leaf: _cast(leaf, dtype), merged)


def merge_report(params: Params, dtype: Any) -> dict[str, MergeLoss]:
    """What rounding the merged kernels to ``dtype`` loses, by dotted module path.

    Raises:
        ValueError: if there is no adapter.
    """
    modulations = find_modulations(params)
    if not modulations:
        raise ValueError("got params without any adapter; expected a tree from apply_smoa")
    report = {}
    for name, (path, modulation, key) in modulations.items():
        kernel = lookup(params, path)[key]
        view = view_of(modulation.view, kernel.ndim, name)
        sums = _map_layers(_layer_loss(dtype), view, view.to_matrix(kernel), modulation)
        update, rounding, along = (float(jnp.sum(part)) for part in sums)
        report[name] = MergeLoss(
            update_norm=update**0.5,
            rounding_norm=rounding**0.5,
            kept=along / update if update else 1.0,
        )
    return report


def _layer_loss(dtype: Any):
    def loss(kernel: jax.Array, modulation: Modulation) -> tuple[jax.Array, ...]:
        change = residual(kernel, modulation)
        base = kernel.astype(jnp.float32)
        exact = base + change
        rounded = exact.astype(dtype).astype(jnp.float32)
        return (
            jnp.sum(change**2),
            jnp.sum((rounded - exact) ** 2),
            jnp.sum((rounded - base) * change),
        )

    return loss


def _merge_kernel(kernel: jax.Array, modulation: Modulation, dtype: Any) -> jax.Array:
    view = view_of(modulation.view, kernel.ndim, "the kernel")
    target = kernel.dtype if dtype is None else dtype

    def merge(matrix: jax.Array, node: Modulation) -> jax.Array:
        return (matrix.astype(jnp.float32) + residual(matrix, node)).astype(target)

    matrix = _map_layers(merge, view, view.to_matrix(kernel), modulation)
    merged = view.from_matrix(matrix, kernel.shape)
    concrete = isinstance(kernel, jax.Array) and not isinstance(merged, Tracer)
    return jax.device_put(merged, kernel.sharding) if concrete else merged


def _map_layers(function: Any, view: View, matrix: jax.Array, modulation: Modulation) -> Any:
    """Apply a function of one layer, one layer at a time."""
    if not view.num_layer_axes:
        return function(matrix, modulation)
    return jax.lax.map(lambda layer: function(*layer), (matrix, modulation))


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
