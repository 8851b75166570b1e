"""Dropout on the input of an adapter's path, the same on any mesh and for rows of any shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def dropout(
    x: Float[Array, "... I"], key: Key[Array, ""] | None, rate: float
) -> Float[Array, "... I"]:
    """x without ``rate`` of its entries, the others scaled up to keep its mean."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
