"""Factors as they are stored, and as they are meant.

Stored factors are as wide as the largest rank, so that subspaces and layers stack: columns beyond a
rank are padding, and zero. Those of blocks hold each row's own block alone; spread out, with zeros
in the columns of the other blocks, their plain product is the update without modulation (Ã, B̃ of
docs/method.md, "Blocks are HiRA with masked factors").
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from smoa_jax.adapter.types import Bands, Blocks, Modulation


def used_columns(ranks: Any, width: int, block: Any = None) -> jax.Array:
    """Which columns of a factor are no padding.

    Args:
        ranks: ``(L?, M)``.
        width: Columns that are stored.
        block: Of each row, ``(L?, N)``; None where the subspaces have factors of their own.

    Returns:
        ``(L?, N, width)`` with blocks, else ``(L?, M, width)``.
    """
    ranks = jnp.asarray(ranks)
    used = jnp.arange(width).reshape((1,) * ranks.ndim + (width,)) < ranks[..., None]
    if block is None:
        return used
    return jnp.take_along_axis(used, jnp.asarray(block).astype(jnp.int32)[..., None], axis=-2)


def used_of(node: Modulation, field: str) -> jax.Array:
    """Where the factor ``a`` or ``b`` is no padding, to be broadcast against it."""
    width = getattr(node, field).shape[-1]
    if isinstance(node, Blocks):
        return used_columns(node.ranks, width, node.in_block if field == "a" else node.out_block)
    used = used_columns(node.ranks, width)
    return used[..., None, :] if isinstance(node, Bands) else used


def padding_is_zero(node: Modulation, field: str) -> bool:
    """Whether the factor ``a`` or ``b`` holds nothing beyond its ranks."""
    return bool(jnp.all(jnp.where(used_of(node, field), 0, getattr(node, field)) == 0))


def spread_factors(node: Modulation) -> tuple[jax.Array, jax.Array]:
    """Factors whose plain product is the update without modulation, padding and all.

    ``(L?, I, M R_m)`` and ``(L?, O, M R_m)`` for blocks; else as they are.
    """
    if not isinstance(node, Blocks):
        return node.a, node.b
    num_subspaces = node.ranks.shape[-1]
    return (
        spread(node.a, node.in_block, num_subspaces),
        spread(node.b, node.out_block, num_subspaces),
    )


def unpadded_factors(node: Modulation) -> tuple[np.ndarray, np.ndarray]:
    """``spread_factors`` of one layer on the host without padding: (I, R) and (O, R) in float32."""
    a, b = (np.asarray(factor, np.float32) for factor in spread_factors(node))
    used = np.asarray(used_columns(node.ranks, node.a.shape[-1])).reshape(-1)
    return a[:, used], b[:, used]


def spread(
    factor: Float[Array, "... N R"], block: Float[Array, "... N"], num_subspaces: int
) -> Float[Array, "... N MR"]:
    """Each row in its own block's columns, zeros elsewhere."""
    own = _membership(block, num_subspaces)
    spread_out = jnp.where(own[..., None], factor[..., :, None, :], 0)
    return spread_out.reshape(*factor.shape[:-1], num_subspaces * factor.shape[-1])


def gather_spread(
    gradient: Float[Array, "N MR"], block: Float[Array, " N"], num_subspaces: int
) -> Float[Array, "N R"]:
    """The transpose of ``spread``."""
    own = _membership(block, num_subspaces)
    split = gradient.reshape(gradient.shape[0], num_subspaces, -1)
    return jnp.where(own[..., None], split, 0).sum(axis=1)


def _membership(block: Float[Array, "... N"], num_subspaces: int) -> Bool[Array, "... N M"]:
    ids = jnp.arange(num_subspaces, dtype=block.dtype)
    return block[..., None] == ids.reshape((1,) * block.ndim + (num_subspaces,))
