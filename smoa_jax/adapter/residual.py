"""What an adapter changes of a weight: ``W' - W = s sum_m G_m * (A_m B_m^T)``, and where.

Everything here is of one layer, in float32 at the highest precision.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smoa_jax.adapter.diagonal import Division, Span, block_of, diagonal_blocks, with_blocks
from smoa_jax.adapter.factors import spread_factors
from smoa_jax.adapter.products import HIGHEST, contract
from smoa_jax.adapter.types import Bands, Blocks, Modulation


def residual(kernel: Float[Array, "I O"], modulation: Modulation) -> Float[Array, "I O"]:
    """``W' - W = s sum_m G_m * (A_m B_m^T)`` of one layer in float32, at the highest precision."""
    if modulation.weight_modulated:
        terms = (
            anchor(kernel, modulation, m) * low_rank(modulation, m)
            for m in range(num_terms(modulation))
        )
        return functools.reduce(jnp.add, terms)
    a, b = spread_factors(modulation)
    return f32(modulation.scale) * contract(a, b, 1, 1, HIGHEST)


def adapted_weight(
    kernel: Float[Array, "I O"], modulation: Modulation, division: Division, dtype: Any
) -> Float[Array, "I O"]:
    """W' in a dtype, added in float32 and rounded once."""
    parts = parts_of(kernel, modulation, division)
    values = [(f32(part.kernel) + part.change()).astype(dtype) for part in parts]
    return with_blocks(kernel.astype(dtype), [(part.rows, part.columns) for part in parts], values)


class Part(NamedTuple):
    """A part of W that the adapter changes, with the modulation of it."""

    rows: Span
    columns: Span
    kernel: Float[Array, "I O"]
    modulation: Modulation

    def change(self) -> Float[Array, "I O"]:
        """``W' - W`` there, in float32."""
        return residual(self.kernel, self.modulation)


def parts_of(kernel: Float[Array, "I O"], modulation: Modulation, division: Division) -> list[Part]:
    """The diagonal blocks where they are slices; else all of W at once."""
    blocks = diagonal_blocks(modulation, division)
    if blocks is None:
        return [Part(Span(0, kernel.shape[0]), Span(0, kernel.shape[1]), kernel, modulation)]
    return [
        Part(rows, columns, columns.of(rows.of(kernel, 0), 1), block_of(modulation, rows, columns))
        for rows, columns in blocks
    ]


# ------------------------------------------------------------------------- parts of the formula


def num_terms(modulation: Modulation) -> int:
    """Dense terms of the sum over subspaces: blocks are one, since they do not overlap."""
    return modulation.ranks.shape[-1] if isinstance(modulation, Bands) else 1


def factors_of(modulation: Modulation, m: int) -> tuple[jax.Array, jax.Array]:
    if isinstance(modulation, Bands):
        return modulation.a[m], modulation.b[m]
    return modulation.a, modulation.b


def low_rank(modulation: Modulation, m: int) -> Float[Array, "I O"]:
    """``A_m B_m^T``."""
    a, b = factors_of(modulation, m)
    return contract(a, b, 1, 1, HIGHEST)


def anchor(
    kernel: Float[Array, "I O"] | Float[Array, ""], modulation: Modulation, m: int
) -> Float[Array, "I O"] | Float[Array, ""]:
    """``s G_m`` in float32; for blocks all G_m at once, since at most one is not zero.

    With the number 1 for the kernel: its derivative by the weight, the last band's of bands.
    """
    scale, weight = f32(modulation.scale), f32(kernel)
    if isinstance(modulation, Blocks):
        same = modulation.in_block[:, None] == modulation.out_block[None, :]
        return jnp.where(same, scale * weight, 0.0)
    if isinstance(modulation, Bands) and m < modulation.ranks.shape[-1] - 1:
        return scale * f32(modulation.bands[m])
    if isinstance(modulation, Bands) and weight.ndim:
        return scale * (weight - f32(modulation.bands).sum(axis=0))
    return scale * weight


def f32(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32)
