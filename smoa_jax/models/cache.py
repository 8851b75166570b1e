"""The key-value cache of a batch that is being continued.

All rows write to the same slot: prompts lie at the right edge of the prompt's slots, and ``starts``
says where each row's first token is. So one scalar says how much is filled, a write is one
``dynamic_update_slice``, and a row's position is its slot minus its start. Slots before a row's
start are never attended to.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from smoa_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of every layer, with room for S tokens a row."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    starts: Int[Array, " B"]
    length: Int[Array, ""]


def empty_cache(
    config: DecoderConfig, starts: Int[Array, " B"], num_slots: int, dtype: DTypeLike
) -> KVCache:
    """Return a cache with nothing in it, for rows whose first token comes at slot ``starts``."""
    shape = (
        config.num_layers,
        starts.shape[0],
        num_slots,
        config.num_kv_heads,
        config.head_dim,
    )
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        starts=starts.astype(jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def cache_positions(cache: KVCache, num_new: int) -> Int[Array, "B T"]:
    """Return the positions of the next ``num_new`` tokens; 0 for slots before a row's start."""
    slots = cache.length + jnp.arange(num_new, dtype=jnp.int32)
    return jnp.maximum(slots[None, :] - cache.starts[:, None], 0)


def cache_mask(cache: KVCache, num_new: int, window: int = 0) -> Bool[Array, "B 1 T S"]:
    """Return which slots each of the next ``num_new`` tokens sees, itself included.

    ``window`` above 0 leaves only the last so many. A row's tokens lie in adjacent slots, so a
    difference of slots is one of positions.
    """
    slots = jnp.arange(cache.keys.shape[2], dtype=jnp.int32)[None, None, :]
    queries = cache.length + jnp.arange(num_new, dtype=jnp.int32)[None, :, None]
    visible = (slots <= queries) & (slots >= cache.starts[:, None, None])
    if window:
        visible &= slots > queries - window
    return visible[:, None, :, :]


def select_rows(cache: KVCache, rows: Int[Array, " B"]) -> KVCache:
    """Return the cache of the given rows, in that order; a row may come more than once."""
    return dataclasses.replace(
        cache,
        keys=jnp.take(cache.keys, rows, axis=1),
        values=jnp.take(cache.values, rows, axis=1),
        starts=jnp.take(cache.starts, rows, axis=0),
    )
