"""Dropout on the input of an adapter's path: cheap to draw, and the same on any mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def dropout(
    x: Float[Array, "... I"], key: Key[Array, ""] | None, rate: float
) -> Float[Array, "... I"]:
    """x without about ``rate`` of its entries, the others scaled up to keep its mean.

    Each entry is kept by a byte, four of them drawn in a word, since drawing is what dropout costs;
    so rates are multiples of 1/256, from 1 to 255. Words run along the last axis but one, which no
    mesh divides.
    """
    if key is None or rate == 0.0:
        return x
    dropped = min(max(1, round(256 * rate)), 255)
    rows = x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x.reshape(1, 1, -1)
    batch, time, inputs = rows.shape
    words = jax.random.bits(key, (batch, -(-time // 4), inputs), jnp.uint32)
    drawn = jnp.concatenate([(words >> shift) & 255 for shift in (0, 8, 16, 24)], axis=1)
    keep = (drawn[:, :time] >= dropped).reshape(x.shape)
    return jnp.where(keep, x * (256 / (256 - dropped)), 0).astype(x.dtype)
