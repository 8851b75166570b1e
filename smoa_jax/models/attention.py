"""Grouped-query self-attention (arXiv 2305.13245), the product itself done by JAX's own function.

The softmax is float32. Every mask leaves masked scores finite, so a row that may see nothing (a
padding token) gives a finite average that no one reads, never NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.layers import Linear
from smoa_jax.models.rope import apply_rope

#: Called on activations with the logical name of each axis; returns them, perhaps constrained.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
#: All layers' cached keys and values, and the first slot to write; None when training.
LayerCaches = tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"], Int[Array, ""]]


def no_constraint(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Leave ``x`` as it is: the ``constrain`` of a model that is not sharded."""
    del names
    return x


def segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Return which tokens see which: the same segment's, up to and including themselves."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    time = segment_ids.shape[1]
    return same & jnp.tril(jnp.ones((1, 1, time, time), bool))


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 T S"] | None,
) -> Float[Array, "B T N H"]:
    """Return each query's average of the values; ``mask`` None means causal, T = S."""
    exact = query.dtype == jnp.float32
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=mask is None)


class SelfAttention(nn.Module):
    """Project, turn, attend, project back."""

    config: DecoderConfig
    constrain: Constrain

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        mask: Bool[Array, "B 1 T S"] | None,
        layer: Int[Array, ""],
        caches: LayerCaches | None,
    ) -> tuple[Float[Array, "B T D"], LayerCaches | None]:
        config = self.config
        query = apply_rope(self._heads(x, "q_proj", config.num_heads), rope)
        key = apply_rope(self._heads(x, "k_proj", config.num_kv_heads), rope)
        value = self._heads(x, "v_proj", config.num_kv_heads)
        query = self.constrain(query, ("batch", "time", "heads", "head_dim"))
        if caches is not None:
            key, value, caches = _update(caches, layer, key, value)
        attended = attend(query, key, value, mask)
        attended = self.constrain(attended, ("batch", "time", "heads", "head_dim"))
        width = config.num_heads * config.head_dim
        flat = attended.reshape((*attended.shape[:2], width))
        return Linear(width, config.embed_dim, name="o_proj")(flat), caches

    def _heads(self, x: jax.Array, name: str, count: int) -> Float[Array, "B T N H"]:
        head_dim = self.config.head_dim
        flat = Linear(self.config.embed_dim, count * head_dim, name=name)(x)
        return flat.reshape((*flat.shape[:2], count, head_dim))


def _update(
    caches: LayerCaches, layer: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, LayerCaches]:
    """Write the layer's new keys and values in place; return all of its own, and all caches."""
    keys, values, slot = caches
    zero = jnp.zeros((), slot.dtype)
    at = (layer.astype(slot.dtype), zero, slot, zero, zero)
    keys = jax.lax.dynamic_update_slice(keys, key[None].astype(keys.dtype), at)
    values = jax.lax.dynamic_update_slice(values, value[None].astype(values.dtype), at)
    own_keys = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False).astype(key.dtype)
    own_values = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False).astype(value.dtype)
    return own_keys, own_values, (keys, values, slot)
