"""The key-value cache of a batch that is being continued.

All rows write to the same slot: prompts lie at the right edge of the prompt's slots, and ``starts``
says where each row's first token is. So one scalar says how much is filled, a write is one
``dynamic_update_slice``, and a row's position is its slot minus its start. Slots before a row's
start are never attended to.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.stacks import layer_stacks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of every layer that has its own, with room for S tokens a row.

    By the name of the layers' stack, since layers of different stacks may differ in K and H.
    """

    keys: dict[str, Any]  # [L', B, S, K, H] each
    values: dict[str, Any]
    starts: Int[Array, " B"]
    length: Int[Array, ""]

    @property
    def num_slots(self) -> int:
        """S."""
        return next(iter(self.keys.values())).shape[2]


def empty_cache(
    config: DecoderConfig, starts: Int[Array, " B"], num_slots: int, dtype: DTypeLike
) -> KVCache:
    """Return a cache with nothing in it, for rows whose first token comes at slot ``starts``."""
    shapes = {
        stack.name: (
            len(stack.layers),
            starts.shape[0],
            num_slots,
            stack.shape.num_kv_heads,
            stack.shape.head_dim,
        )
        for stack in layer_stacks(config)
        if not stack.shape.shares_kv
    }
    return KVCache(
        keys={name: jnp.zeros(shape, dtype) for name, shape in shapes.items()},
        values={name: jnp.zeros(shape, dtype) for name, shape in shapes.items()},
        starts=starts.astype(jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def stack_caches(
    cache: KVCache,
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """The keys and values of each stack, and the slot that is written next, as layers take them."""
    return {name: (cache.keys[name], cache.values[name], cache.length) for name in cache.keys}


def cache_positions(cache: KVCache, num_new: int) -> Int[Array, "B T"]:
    """Return the positions of the next ``num_new`` tokens; 0 for slots before a row's start."""
    slots = cache.length + jnp.arange(num_new, dtype=jnp.int32)
    return jnp.maximum(slots[None, :] - cache.starts[:, None], 0)


def cache_mask(cache: KVCache, num_new: int, window: int = 0) -> Bool[Array, "B 1 T S"]:
    """Return which slots each of the next ``num_new`` tokens sees, itself included.

    ``window`` above 0 leaves only the last so many. A row's tokens lie in adjacent slots, so a
    difference of slots is one of positions.
    """
    slots = jnp.arange(cache.num_slots, dtype=jnp.int32)[None, None, :]
    queries = cache.length + jnp.arange(num_new, dtype=jnp.int32)[None, :, None]
    visible = (slots <= queries) & (slots >= cache.starts[:, None, None])
    if window:
        visible &= slots > queries - window
    return visible[:, None, :, :]


def select_rows(cache: KVCache, rows: Int[Array, " B"]) -> KVCache:
    """Return the cache of the given rows, in that order; a row may come more than once."""
    keys, values = (
        {name: jnp.take(stack, rows, axis=1) for name, stack in stacks.items()}
        for stacks in (cache.keys, cache.values)
    )
    starts = jnp.take(cache.starts, rows, axis=0)
    return dataclasses.replace(cache, keys=keys, values=values, starts=starts)
