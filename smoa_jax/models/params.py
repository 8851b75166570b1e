"""The decoder's parameters, described once: names, shapes, a random draw.

Shardings, loading and tests read their shapes from ``abstract_params``, which computes nothing.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from smoa_jax.adapter.types import Params
from smoa_jax.models.config import DecoderConfig


def abstract_params(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Return the whole params tree as ``jax.ShapeDtypeStruct`` leaves."""
    layers, embed, mlp = config.num_layers, config.embed_dim, config.mlp_dim
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def leaf(name: str, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}

    attention = {
        "q_proj": leaf("kernel", layers, embed, query),
        "k_proj": leaf("kernel", layers, embed, key_value),
        "v_proj": leaf("kernel", layers, embed, key_value),
        "o_proj": leaf("kernel", layers, query, embed),
    }
    if config.qk_norm:
        attention["q_norm"] = leaf("scale", layers, config.head_dim)
        attention["k_norm"] = leaf("scale", layers, config.head_dim)
    if config.wide_qk_norm:
        attention["q_norm"] = leaf("scale", layers, query)
        attention["k_norm"] = leaf("scale", layers, key_value)
    stack = {
        "input_layernorm": leaf("scale", layers, embed),
        "self_attn": attention,
        "post_attention_layernorm": leaf("scale", layers, embed),
        "mlp": {
            "gate_proj": leaf("kernel", layers, embed, mlp),
            "up_proj": leaf("kernel", layers, embed, mlp),
            "down_proj": leaf("kernel", layers, mlp, embed),
        },
    }
    if config.post_norms:
        stack["pre_feedforward_layernorm"] = leaf("scale", layers, embed)
        stack["post_feedforward_layernorm"] = leaf("scale", layers, embed)
    if not config.pre_norms:
        del stack["input_layernorm"], stack["pre_feedforward_layernorm"]
    biased = {"none": (), "qkv": "qkv", "all": "qkvo"}[config.attention_bias]
    modules = [attention[f"{name}_proj"] for name in biased]
    for module in [*modules, *(stack["mlp"].values() if config.mlp_bias else ())]:
        module.update(leaf("bias", layers, module["kernel"].shape[-1]))
    tree: dict[str, Any] = {
        "embed_tokens": leaf("embedding", config.vocab_size, embed),
        "layers": stack,
        "norm": leaf("scale", embed),
    }
    if not config.tie_embeddings:
        tree["lm_head"] = leaf("kernel", embed, config.vocab_size)
    return tree


def init_params(config: DecoderConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Draw random parameters: norms by one, biases 0, the rest normal with variance 1 / inputs.

    A leaf's draw depends on the key and its own path alone.
    """

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("scale"):
            return jnp.full(leaf.shape, 1.0 - config.norm_offset, leaf.dtype)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        inputs = leaf.shape[-1] if name.endswith("embedding") else leaf.shape[-2]
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        normal = jax.random.normal(own_key, leaf.shape, jnp.float32)
        return (normal * inputs**-0.5).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config, dtype))
