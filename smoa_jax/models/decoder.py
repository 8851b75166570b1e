"""One Linen decoder for every model family: stacks of equal layers, scanned.

The params tree bears Hugging Face's names, every layer leaf with a leading axis, kernels as
(inputs, outputs). Here a family whose layers all have one shape; ``stacks.py`` draws the others,
which have ``layers/local/...`` and the like in the place of ``layers/...``::

    embed_tokens/embedding                         [V, D]
    layers/input_layernorm/scale                   [L, D]
    layers/self_attn/{q,k,v,o}_proj/kernel         [L, I, O]   (+ smoa beside it, when adapted)
    layers/self_attn/{q,k,v,o}_proj/bias           [L, O]      (Qwen 2: not o_proj's)
    layers/self_attn/{q,k}_norm/scale              [L, H]      (Gemma 3, Qwen 3; OLMo 2: [L, O])
    layers/post_attention_layernorm/scale          [L, D]
    layers/{pre,post}_feedforward_layernorm/scale  [L, D]      (Gemma 2 and 3; OLMo 2: post alone)
    layers/mlp/{gate,up,down}_proj/kernel          [L, I, O]   (+ bias [L, O], where Llama has it)
    layers/per_layer_{input_gate,projection}/kernel  [L, I, O]   (Gemma 4 E2B and E4B)
    layers/post_per_layer_input_norm/scale         [L, D]      (likewise)
    layers/layer_scalar                            [L, 1]      (Gemma 4)
    norm/scale                                     [D]
    lm_head/kernel                                 [D, V]      (absent when tied)
    embed_tokens_per_layer/embedding               [V, L*P]    (Gemma 4 E2B and E4B)
    per_layer_model_projection/kernel              [D, L*P]    (likewise)
    per_layer_projection_norm/scale                [P]         (likewise)

Hugging Face calls two norms ``post_attention_layernorm``: Llama's and Gemma 1's stands before the
feed-forward layer, Gemma 2's and 3's and OLMo 2's on what attention gives; the tree keeps its word.
OLMo 2 has no norms but those on what attention and feed-forward give, so no ``input_layernorm``.

Compile time does not grow with depth, and what differs between layers of one shape is scanned
data, never another stack. Rematerialisation is a policy chosen by name; none of them keeps an array
of a weight's size between forward and backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from smoa_jax.adapter.placement import HeadSharding, ProductShardings
from smoa_jax.checks import require
from smoa_jax.models.attention import (
    AttentionContext,
    Constrain,
    FusedAttention,
    KeysValues,
    LayerCaches,
    Locality,
    SelfAttention,
    causal_mask,
    no_constraint,
    segment_mask,
)
from smoa_jax.models.cache import KVCache, cache_mask, cache_positions, stack_caches
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.layers import (
    ACTIVATION_FUNCTIONS,
    PROJECTION,
    Linear,
    RMSNorm,
    soft_cap,
    wide_matmul,
)
from smoa_jax.models.params import abstract_params, init_params
from smoa_jax.models.rope import local_rope_tables, rope_tables
from smoa_jax.models.sections import LayerSections
from smoa_jax.models.stacks import LayerShape, layer_stacks

__all__ = [
    "REMAT_POLICIES",
    "Decoder",
    "DecoderLayer",
    "abstract_params",
    "init_params",
]

#: What each layer keeps for its backward pass, from most memory to least: everything; the results
#: of all products; of those that involve a kernel (with what adapters add, in float32); only the
#: finished outputs of the projections, in the compute dtype; nothing but the layer's input.
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "projections": jax.checkpoint_policies.save_only_these_names(PROJECTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class MLP(nn.Module):
    """The gated feed-forward layer (SwiGLU or GEGLU, arXiv 2002.05202)."""

    config: DecoderConfig
    inner_dim: int
    constrain: Constrain
    products: ProductShardings = ProductShardings()

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        outer, inner = self.config.embed_dim, self.inner_dim
        bias = self.config.mlp_bias
        linear = functools.partial(Linear, bias=bias, products=self.products)
        gate = linear(outer, inner, name="gate_proj")(x)
        up = linear(outer, inner, name="up_proj")(x)
        product = ACTIVATION_FUNCTIONS[self.config.activation](gate) * up
        product = self.constrain(product, ("batch", "time", "mlp"))
        return linear(inner, outer, name="down_proj")(product)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    Args:
        config: Of the decoder.
        shape: Of this layer.
        constrain: As the decoder has it.
        fused: Likewise.
        products: Likewise.
        returns_kv: Whether to return the keys and values too, for layers that share them.
    """

    config: DecoderConfig
    shape: LayerShape
    constrain: Constrain
    fused: FusedAttention | None = None
    products: ProductShardings = ProductShardings()
    returns_kv: bool = False

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T D"], LayerCaches | None],
        context: AttentionContext,
        layer: Int[Array, ""],
        local: Locality,
        told: Float[Array, "B T P"] | None = None,
        shared: KeysValues | None = None,
    ) -> tuple[tuple[Float[Array, "B T D"], LayerCaches | None], KeysValues | None]:
        """Run the layer.

        Args:
            carry: The residual stream, and the stack's caches.
            context: What all layers share.
            layer: Index in its stack.
            local: Whether it is a local one.
            told: What it is told of each token (per-layer embeddings), if anything.
            shared: Keys and values to attend to, if it has none of its own.
        """
        x, caches = carry
        config, constrain = self.config, self.constrain
        before_mlp = "pre_feedforward" if config.post_norms else "post_attention"
        attention = SelfAttention(
            config, self.shape, constrain, self.fused, self.products, name="self_attn"
        )
        normed = self._norm(x, "input_layernorm") if config.pre_norms else x
        change, caches, kv = attention(normed, context, layer, local, caches, shared)
        if config.post_norms:
            change = self._norm(change, "post_attention_layernorm")
        x = constrain(x + change, ("batch", "time", "embed"))
        normed = self._norm(x, f"{before_mlp}_layernorm") if config.pre_norms else x
        change = MLP(config, self.shape.mlp_dim, constrain, self.products, name="mlp")(normed)
        if config.post_norms:
            change = self._norm(change, "post_feedforward_layernorm")
        x = constrain(x + change, ("batch", "time", "embed"))
        if told is not None:
            x = constrain(x + self._heard(x, told), ("batch", "time", "embed"))
        if config.layer_scalars:
            scalar = self.param("layer_scalar", nn.initializers.ones, (1,))
            x = (x.astype(jnp.float32) * scalar.astype(jnp.float32)[0]).astype(x.dtype)
        return (x, caches), kv if self.returns_kv else None

    def _heard(self, x: jax.Array, told: jax.Array) -> Float[Array, "B T D"]:
        """What a layer makes of what it is told of each token."""
        config = self.config
        linear = functools.partial(Linear, products=self.products)
        gate = linear(config.embed_dim, config.per_layer_dim, name="per_layer_input_gate")(x)
        heard = ACTIVATION_FUNCTIONS[config.activation](gate) * told
        change = linear(config.per_layer_dim, config.embed_dim, name="per_layer_projection")(heard)
        return self._norm(change, "post_per_layer_input_norm")

    def _norm(self, x: jax.Array, name: str) -> Float[Array, "B T D"]:
        config = self.config
        return RMSNorm(config.embed_dim, config.norm_epsilon, config.norm_offset, name=name)(x)


class Embedding(nn.Module):
    """A table of tokens, also the head's kernel when tied; ``scale`` multiplies what is found."""

    vocab_size: int
    embed_dim: int
    scale: float

    def setup(self) -> None:
        shape = (self.vocab_size, self.embed_dim)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape)

    def __call__(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        found = jnp.take(self.embedding, tokens, axis=0).astype(dtype)
        # The factor is rounded too: Gemma was trained with sqrt(3072) = 55.5 in bf16.
        return found if self.scale == 1 else found * jnp.asarray(self.scale, dtype)

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return wide_matmul(hidden, self.embedding, transposed=True)


class Decoder(nn.Module):
    """A decoder-only language model over ``{"params": tree}``.

    Example::

        model = Decoder(config, dtype=jnp.bfloat16, remat="projections")
        logits = model.apply({"params": params}, tokens)

    Args:
        config: sizes and options.
        dtype: of activations and products' inputs; norms, softmax, RoPE and logits are float32.
        remat: a name of ``REMAT_POLICIES``.
        constrain: called on activations with their logical axes, for sharding.
        fused: attention of whole sequences, where the platform has a kernel for it; None is XLA's
            own. Generation with a cache never uses it.
        products: where the operands of adapted products lie on a mesh, so that they move no more
            than plain ones; without it the compiler chooses.
        head: where the head lies on a mesh, so that a loss needn't gather it; None on one device.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.bfloat16
    remat: str = "none"
    constrain: Constrain = no_constraint
    fused: FusedAttention | None = None
    products: ProductShardings = ProductShardings()
    head: HeadSharding | None = None

    def setup(self) -> None:
        config = self.config
        require(
            self.remat in REMAT_POLICIES,
            f"remat {self.remat!r}",
            f"one of {sorted(REMAT_POLICIES)}",
            "choose one",
        )
        self.embed_tokens = Embedding(config.vocab_size, config.embed_dim, config.embed_scale)
        if config.per_layer_dim:
            size = config.num_layers * config.per_layer_dim
            scale = config.per_layer_dim**0.5
            self.embed_tokens_per_layer = Embedding(config.vocab_size, size, scale)
            self.per_layer_model_projection = Linear(config.embed_dim, size)
            self.per_layer_projection_norm = RMSNorm(
                config.per_layer_dim, config.norm_epsilon, config.norm_offset
            )
        self.layers = self._make_layers()
        self.norm = RMSNorm(config.embed_dim, config.norm_epsilon, config.norm_offset)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.embed_dim, config.vocab_size, wide=True)

    def _make_layers(self) -> nn.Module:
        """All layers as one module: Linen's scan over the only stack, or sections of several."""
        config = self.config
        only, *others = layer_stacks(config)
        policy = REMAT_POLICIES[self.remat] if self.remat != "none" else None
        if others:
            make = functools.partial(
                DecoderLayer,
                config,
                constrain=self.constrain,
                fused=self.fused,
                products=self.products,
                parent=None,
            )
            return LayerSections(config, make, policy)
        layer = DecoderLayer
        if policy is not None:
            layer = nn.remat(layer, policy=policy, prevent_cse=False)
        in_axes: Any = (nn.broadcast, 0, 0, 0)
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=config.num_layers,
        )
        return stack(config, only.shape, self.constrain, self.fused, self.products)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Return the logits, float32 [B, T, V]; with a cache, ``(logits, cache)``."""
        hidden = self.hidden(tokens, positions, segment_ids, cache)
        if cache is None:
            return self.unembed(hidden)
        return self.unembed(hidden[0]), hidden[1]

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Return the normed final hidden states [B, T, D]; with a cache, ``(hidden, cache)``.

        Args:
            tokens: token ids; with a cache, those that come next.
            positions: of each token; by default counted from the start of its row or segment.
            segment_ids: tokens see their own segment only; equal ids must be adjacent.
            cache: what came before; its own ``starts`` say which slots are padding.
        """
        require(
            cache is None or segment_ids is None,
            "segment_ids with a cache",
            "one of them",
            "leave one out",
        )
        if positions is None:
            positions = _default_positions(tokens, segment_ids, cache)
        x = self.embed_tokens(tokens, self.dtype)
        x = self.constrain(x, ("batch", "time", "embed"))
        context = self._surroundings(positions, segment_ids, cache)
        x, filled = self._run_layers(x, cache, context, self._told(tokens, x))
        x = self.norm(x)
        if cache is None:
            return x
        keys = {name: caches[0] for name, caches in filled.items()}
        values = {name: caches[1] for name, caches in filled.items()}
        length = cache.length + tokens.shape[1]
        return x, dataclasses.replace(cache, keys=keys, values=values, length=length)

    def _run_layers(
        self,
        x: jax.Array,
        cache: KVCache | None,
        context: AttentionContext,
        told: Float[Array, "L B T P"] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """The residual stream after the last layer, and the filled caches by stack."""
        caches = {} if cache is None else stack_caches(cache)
        only, *others = layer_stacks(self.config)
        if others:
            return self.layers(x, caches, context, told)
        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        local = jnp.asarray(self.config.local_layers) if self.config.local_layers else None
        carry = (x, caches.get(only.name))
        (x, filled), _ = self.layers(carry, context, layers, local, told)
        return x, {} if filled is None else {only.name: filled}

    def _told(
        self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]
    ) -> Float[Array, "L B T P"] | None:
        """What each layer is told of each token, from a table and from the embedding.

        ``(RMSNorm(x W / sqrt(D)) + table[token] sqrt(P)) / sqrt(2)``, all layers' side by side in
        W's outputs and in the table's rows (transformers' Gemma 4).
        """
        config = self.config
        if not config.per_layer_dim:
            return None
        shape = (*tokens.shape, config.num_layers, config.per_layer_dim)
        by_token = self.embed_tokens_per_layer(tokens, x.dtype).reshape(shape)
        projected = self.per_layer_model_projection(x) * jnp.asarray(
            config.embed_dim**-0.5, x.dtype
        )
        by_embedding = self.per_layer_projection_norm(projected.reshape(shape))
        told = (by_embedding + by_token) * jnp.asarray(2**-0.5, x.dtype)
        return jnp.moveaxis(told, 2, 0)

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return the logits of hidden states, accumulated and kept in float32."""
        head = self.embed_tokens.unembed if self.config.tie_embeddings else self.lm_head
        logits = soft_cap(head(hidden), self.config.final_soft_cap)
        return self.constrain(logits, ("batch", "time", "vocab"))

    def with_vocabulary(self, size: int) -> Decoder:
        """The model that unembeds to a part of the vocabulary, on one device."""
        config = dataclasses.replace(self.config, vocab_size=size)
        return self.clone(config=config, constrain=no_constraint, head=None)

    def _surroundings(
        self,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        cache: KVCache | None,
    ) -> AttentionContext:
        config = self.config
        rope, local_rope = rope_tables(config, positions), local_rope_tables(config, positions)
        if cache is None and self.fused is not None:
            return AttentionContext(rope, local_rope, None, None, segment_ids)

        def visible(window: int) -> Bool[Array, "#B 1 T S"]:
            if cache is not None:
                return cache_mask(cache, positions.shape[1], window)
            if segment_ids is not None:
                return segment_mask(segment_ids, window)
            return causal_mask(positions.shape[1], window)

        if config.local_layers:
            masks = visible(0), visible(config.sliding_window)
        else:
            plain = cache is None and segment_ids is None
            masks = (None if plain else visible(0)), None
        return AttentionContext(rope, local_rope, *masks, None)


def _default_positions(
    tokens: jax.Array, segment_ids: jax.Array | None, cache: KVCache | None
) -> Int[Array, "B T"]:
    if cache is not None:
        return cache_positions(cache, tokens.shape[1])
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    if segment_ids is None:
        return index
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
