"""Grouped-query self-attention (arXiv 2305.13245), the product itself done by a library's function.

The softmax is float32. Every mask leaves masked scores finite, so a row that may see nothing (a
padding token) gives a finite average that no one reads, never NaN.

Layers differ in what they see and in how they turn: ``AttentionContext`` holds both kinds, made
once, and a layer selects its own. Without local layers there is nothing to select.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.layers import Linear, RMSNorm, soft_cap
from smoa_jax.models.rope import RopeTables, apply_rope, turned_where

#: Called on activations with the logical name of each axis; returns them, perhaps constrained.
Constrain: TypeAlias = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
#: All layers' cached keys and values, and the first slot to write; None when training.
LayerCaches: TypeAlias = tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"], Int[Array, ""]]


class FusedAttention(Protocol):
    """Attention of whole sequences in one kernel that never holds the scores.

    Hashable, since it is a field of the model. ``segment_ids`` None means one segment a row;
    ``local`` is a scalar, None in models without local layers.
    """

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None,
        local: Bool[Array, ""] | None,
        config: DecoderConfig,
    ) -> Float[Array, "B T N H"]: ...


class AttentionContext(NamedTuple):
    """What all layers of a pass share.

    Attributes:
        rope: Rotary tables.
        local_rope: Those of local layers, where they differ.
        mask: What a token sees; None means every earlier one and itself.
        local_mask: Likewise in local layers, where there are any.
        segment_ids: For fused attention, which needs no mask.
    """

    rope: RopeTables
    local_rope: RopeTables | None
    mask: Bool[Array, "#B 1 T S"] | None
    local_mask: Bool[Array, "#B 1 T S"] | None
    segment_ids: Int[Array, "B T"] | None

    def of_layer(
        self, local: Bool[Array, ""] | None
    ) -> tuple[RopeTables, Bool[Array, "#B 1 T S"] | None]:
        """Return the tables and the mask of one layer."""
        return _select(local, self.local_rope, self.rope), _select(
            local, self.local_mask, self.mask
        )


def _select(local: jax.Array | None, if_local: Any, otherwise: Any) -> Any:
    if local is None or if_local is None:
        return otherwise
    return jax.tree.map(lambda one, other: jax.lax.select(local, one, other), if_local, otherwise)


def no_constraint(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Leave ``x`` as it is: the ``constrain`` of a model that is not sharded."""
    del names
    return x


def causal_mask(time: int, window: int = 0) -> Bool[Array, "1 1 T T"]:
    """Return which tokens see which: themselves and earlier ones, ``window`` in all if above 0."""
    distance = jnp.arange(time)[:, None] - jnp.arange(time)[None, :]
    visible = distance >= 0
    if window:
        visible &= distance < window
    return visible[None, None]


def segment_mask(segment_ids: Int[Array, "B T"], window: int = 0) -> Bool[Array, "B 1 T T"]:
    """Return which tokens see which: the same segment's, up to and including themselves."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & causal_mask(segment_ids.shape[1], window)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 T S"] | None,
    *,
    scale: float,
    cap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Return each query's average of the values; ``mask`` None means causal, T = S."""
    exact = query.dtype == jnp.float32
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        if cap:
            return _capped_attention(query, key, value, mask, scale, cap)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=mask is None, scale=scale
        )


def _capped_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    scale: float,
    cap: float,
) -> jax.Array:
    """``jax.nn.dot_product_attention`` with the soft cap that it has no argument for."""
    if mask is None:
        mask = causal_mask(query.shape[1])
    batch, time, heads, head_dim = query.shape
    grouped = query.reshape(batch, time, key.shape[2], -1, head_dim)
    wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = wide("BTKGH,BSKH->BKGTS", grouped, key) * scale
    scores = jnp.where(mask[:, :, None], soft_cap(scores, cap), jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    average = wide("BKGTS,BSKH->BTKGH", shares, value)
    return average.reshape(batch, time, heads, head_dim).astype(query.dtype)


class SelfAttention(nn.Module):
    """Project, turn, attend, project back."""

    config: DecoderConfig
    constrain: Constrain
    fused: FusedAttention | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: AttentionContext,
        layer: Int[Array, ""],
        local: Bool[Array, ""] | None,
        caches: LayerCaches | None,
    ) -> tuple[Float[Array, "B T D"], LayerCaches | None]:
        config = self.config
        rope, mask = context.of_layer(local)
        if config.rope_layers:
            rope = turned_where(jnp.asarray(config.rope_layers)[layer], rope)
        query = self._heads(x, "q_proj", config.num_heads)
        key = self._heads(x, "k_proj", config.num_kv_heads)
        value = self._heads(x, "v_proj", config.num_kv_heads)
        if config.qk_norm:
            norm = (config.head_dim, config.norm_epsilon, config.norm_offset)
            query = RMSNorm(*norm, name="q_norm")(query)
            key = RMSNorm(*norm, name="k_norm")(key)
        query, key = apply_rope(query, rope), apply_rope(key, rope)
        query = self.constrain(query, ("batch", "time", "heads", "head_dim"))
        if caches is not None:
            key, value, caches = _update(caches, layer, key, value)
        if self.fused is not None and caches is None:
            segments = context.segment_ids
            attended = self.fused(
                query, key, value, segment_ids=segments, local=local, config=config
            )
        else:
            scale, cap = config.attention_scale, config.attention_soft_cap
            attended = attend(query, key, value, mask, scale=scale, cap=cap)
        attended = self.constrain(attended, ("batch", "time", "heads", "head_dim"))
        width = config.num_heads * config.head_dim
        flat = attended.reshape((*attended.shape[:2], width))
        bias = config.attention_bias == "all"
        return Linear(width, config.embed_dim, bias=bias, name="o_proj")(flat), caches

    def _heads(self, x: jax.Array, name: str, count: int) -> Float[Array, "B T N H"]:
        config, head_dim = self.config, self.config.head_dim
        bias = config.attention_bias != "none"
        flat = Linear(config.embed_dim, count * head_dim, bias=bias, name=name)(x)
        if config.wide_qk_norm and name != "v_proj":
            norm = (count * head_dim, config.norm_epsilon, config.norm_offset)
            flat = RMSNorm(*norm, name=name.replace("proj", "norm"))(flat)
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
