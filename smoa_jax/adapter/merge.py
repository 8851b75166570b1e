"""Merging an adapter into its base, and an honest account of what rounding then loses.

A merge is formed in float32 at the highest precision, one layer at a time, and rounded once. In
bf16 that rounding throws away most of a gentle adapter (docs/method.md, hazard 1):
``merge_report`` says how much, and ``merge_smoa(params, jnp.float32)`` avoids it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from smoa_jax.adapter.residual import residual
from smoa_jax.adapter.targets import lookup, replaced
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.adapter.types import SMOA_KEY, Modulation, Params
from smoa_jax.adapter.views import View, view_of
from smoa_jax.checks import require


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

    @classmethod
    def of_sums(cls, update: float, rounding: float, along: float) -> MergeLoss:
        """From sums over entries: of both norms squared, and of ``(round(W') - W) * (W' - W)``."""
        return cls(
            update_norm=float(update) ** 0.5,
            rounding_norm=float(rounding) ** 0.5,
            kept=float(along) / float(update) if update else 1.0,
        )

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
    require(
        bool(modulations),
        "params without any adapter",
        "a tree from apply_smoa",
        "it may have been merged already, and merging twice would be wrong",
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
    require(bool(modulations), "params without any adapter", "a tree from apply_smoa")
    report = {}
    for name, (path, modulation, key) in modulations.items():
        kernel = lookup(params, path)[key]
        view = view_of(modulation.view, kernel.ndim, name)
        sums = _map_layers(
            functools.partial(layer_loss, dtype=jnp.dtype(dtype)),
            view,
            view.to_matrix(kernel),
            modulation,
        )
        report[name] = MergeLoss.of_sums(*(float(jnp.sum(part)) for part in sums))
    return report


@functools.partial(jax.jit, static_argnames="dtype")
def layer_loss(weight: jax.Array, modulation: Modulation, dtype: Any) -> tuple[jax.Array, ...]:
    """The three sums of ``MergeLoss.of_sums`` for one (I, O) layer rounded to ``dtype``."""
    change = residual(weight, modulation)
    base = weight.astype(jnp.float32)
    exact = base + change
    rounded = exact.astype(dtype).astype(jnp.float32)
    return (
        jnp.sum(change**2),
        jnp.sum((rounded - exact) ** 2),
        jnp.sum((rounded - base) * change),
    )


@jax.jit
def merge_layer(weight: jax.Array, modulation: Modulation) -> jax.Array:
    """W' of one (I, O) layer in float32: to the last bit what ``merge_smoa`` makes of a stack."""
    stack = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (weight, modulation))
    return jax.lax.map(lambda layer: _merged(layer[0], layer[1], jnp.float32), stack)[0]


def _merged(matrix: jax.Array, node: Modulation, dtype: Any) -> jax.Array:
    return (matrix.astype(jnp.float32) + residual(matrix, node)).astype(dtype)


def _merge_kernel(kernel: jax.Array, modulation: Modulation, dtype: Any) -> jax.Array:
    view = view_of(modulation.view, kernel.ndim, "the kernel")
    target = kernel.dtype if dtype is None else dtype

    merge = functools.partial(_merged, dtype=target)
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
