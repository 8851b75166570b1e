"""Grouped-query self-attention (arXiv 2305.13245), the product itself done by a library's function.

The softmax is float32. Every mask leaves masked scores finite, so a row that may see nothing (a
padding token) gives a finite average that no one reads, never NaN.

Layers differ in what they see and in how they turn: ``AttentionContext`` holds both kinds, made
once, and a layer selects its own. Without local layers there is nothing to select. Whether a layer
is local is scanned data (an array) where local and global layers are stacked together, and a plain
bool where each kind has a stack of its own.
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

from smoa_jax.adapter.placement import ProductShardings
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.layers import Linear, RMSNorm, soft_cap, unit_rms
from smoa_jax.models.rope import RopeTables, apply_rope, turned_where
from smoa_jax.models.stacks import LayerShape

#: Called on activations with the logical name of each axis; returns them, perhaps constrained.
Constrain: TypeAlias = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
#: Cached keys and values of a stack's layers, and the first slot to write; None when training.
LayerCaches: TypeAlias = tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"], Int[Array, ""]]
#: A layer's finished keys (normed and turned) and values, all that a token may attend to.
KeysValues: TypeAlias = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]
#: Whether a layer is local; None in models without local layers.
Locality: TypeAlias = Bool[Array, ""] | bool | None


class FusedAttention(Protocol):
    """Attention of whole sequences in one kernel that never holds the scores.

    Hashable, since it is a field of the model. ``segment_ids`` None means one segment a row;
    ``local`` is a bool or a scalar, None in models without local layers.
    """

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None,
        local: Locality,
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

    def of_layer(self, local: Locality) -> tuple[RopeTables, Bool[Array, "#B 1 T S"] | None]:
        """Return the tables and the mask of one layer."""
        return _select(local, self.local_rope, self.rope), _select(
            local, self.local_mask, self.mask
        )


def _select(local: Locality, if_local: Any, otherwise: Any) -> Any:
    if local is None or if_local is None:
        return otherwise
    if isinstance(local, bool):
        return if_local if local else otherwise
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
    """Project, turn, attend, project back.

    Args:
        config: Of the decoder.
        shape: Of this layer.
        constrain: As the decoder has it.
        fused: Likewise.
        products: Likewise.
    """

    config: DecoderConfig
    shape: LayerShape
    constrain: Constrain
    fused: FusedAttention | None = None
    products: ProductShardings = ProductShardings()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: AttentionContext,
        layer: Int[Array, ""],
        local: Locality,
        caches: LayerCaches | None,
        shared: KeysValues | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCaches | None, KeysValues]:
        """Return the change, the filled caches, and the keys and values that were attended to.

        ``layer`` is the layer's index in its stack; ``shared`` are the keys and values of a layer
        that has none of its own.
        """
        config, head_dim = self.config, self.shape.head_dim
        rope, mask = context.of_layer(local)
        if config.rope_layers:
            rope = turned_where(jnp.asarray(config.rope_layers)[layer], rope)
        query = self._heads(x, "q_proj", config.num_heads)
        if config.qk_norm:
            query = self._norm(query, "q_norm", head_dim)
        query = self.constrain(apply_rope(query, rope), ("batch", "time", "heads", "head_dim"))
        if self.shape.shares_kv:
            assert shared is not None
            key, value = shared
        else:
            key, value = self._keys_values(x, rope)
            if caches is not None:
                key, value, caches = _update(caches, layer, key, value)
        if self.fused is not None and mask is None:  # with a cache there always is one
            segments = context.segment_ids
            attended = self.fused(
                query, key, value, segment_ids=segments, local=local, config=config
            )
        else:
            scale, cap = config.attention_scale, config.attention_soft_cap
            attended = attend(query, key, value, mask, scale=scale, cap=cap)
        attended = self.constrain(attended, ("batch", "time", "heads", "head_dim"))
        width = config.num_heads * head_dim
        flat = attended.reshape((*attended.shape[:2], width))
        bias = config.attention_bias == "all"
        output = Linear(width, config.embed_dim, bias=bias, products=self.products, name="o_proj")
        change = output(flat)
        return change, caches, (key, value)

    def _keys_values(self, x: jax.Array, rope: RopeTables) -> KeysValues:
        config, count = self.config, self.shape.num_kv_heads
        key = self._heads(x, "k_proj", count)
        value = key if self.shape.keys_as_values else self._heads(x, "v_proj", count)
        if config.value_norm:
            value = unit_rms(value, config.norm_epsilon).astype(value.dtype)
        if config.qk_norm:
            key = self._norm(key, "k_norm", self.shape.head_dim)
        return apply_rope(key, rope), value

    def _norm(self, x: Float[Array, "... D"], name: str, size: int) -> Float[Array, "... D"]:
        config = self.config
        return RMSNorm(size, config.norm_epsilon, config.norm_offset, name=name)(x)

    def _heads(self, x: jax.Array, name: str, count: int) -> Float[Array, "B T N H"]:
        config, head_dim = self.config, self.shape.head_dim
        bias = config.attention_bias != "none"
        projection = Linear(
            config.embed_dim, count * head_dim, bias=bias, products=self.products, name=name
        )
        flat = projection(x)
        if config.wide_qk_norm and name != "v_proj":
            flat = self._norm(flat, name.replace("proj", "norm"), count * head_dim)
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
