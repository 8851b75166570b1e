"""The decoder's parameters, described once: names, shapes, a random draw, the head's kernel.

Shardings, loading and tests read their shapes from ``abstract_params``, which computes nothing.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from smoa_jax.adapter.types import SMOA_KEY, Params
from smoa_jax.models.config import DecoderConfig


def abstract_params(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Return the whole params tree as ``jax.ShapeDtypeStruct`` leaves."""
    layers, embed, mlp = config.num_layers, config.embed_dim, config.mlp_dim
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def leaf(name: str, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}

    tree: dict[str, Any] = {
        "embed_tokens": leaf("embedding", config.vocab_size, embed),
        "layers": {
            "input_layernorm": leaf("scale", layers, embed),
            "self_attn": {
                "q_proj": leaf("kernel", layers, embed, query),
                "k_proj": leaf("kernel", layers, embed, key_value),
                "v_proj": leaf("kernel", layers, embed, key_value),
                "o_proj": leaf("kernel", layers, query, embed),
            },
            "post_attention_layernorm": leaf("scale", layers, embed),
            "mlp": {
                "gate_proj": leaf("kernel", layers, embed, mlp),
                "up_proj": leaf("kernel", layers, embed, mlp),
                "down_proj": leaf("kernel", layers, mlp, embed),
            },
        },
        "norm": leaf("scale", embed),
    }
    if not config.tie_embeddings:
        tree["lm_head"] = leaf("kernel", embed, config.vocab_size)
    return tree


def init_params(config: DecoderConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Draw random parameters: norms one, the rest normal with variance 1 / inputs.

    A leaf's draw depends on the key and its own path alone.
    """

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        inputs = leaf.shape[-1] if name.endswith("embedding") else leaf.shape[-2]
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        normal = jax.random.normal(own_key, leaf.shape, jnp.float32)
        return (normal * inputs**-0.5).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config, dtype))


def unembedding(params: Params) -> Float[Array, "D V"]:
    """Return the head's kernel: the transposed embedding when tied, for losses done in chunks."""
    if "lm_head" not in params:
        return params["embed_tokens"]["embedding"].T
    if SMOA_KEY in params["lm_head"]:
        raise ValueError(
            "got a modulation on lm_head; expected a plain head, whose kernel is all of it; "
            'compute logits with method="unembed", or leave lm_head out of the targets'
        )
    return params["lm_head"]["kernel"]
