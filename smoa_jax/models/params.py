"""The decoder's parameters, described once: names, shapes, a random draw.

Shardings, loading and tests read their shapes from ``abstract_params``, which computes nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from smoa_jax.adapter.targets import replaced
from smoa_jax.adapter.types import Params
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.stacks import Stack, layer_stacks


def abstract_params(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Return the whole params tree as ``jax.ShapeDtypeStruct`` leaves."""
    embed, per_layer = config.embed_dim, config.per_layer_dim * config.num_layers

    def leaf(name: str, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}

    tree: dict[str, Any] = {"embed_tokens": leaf("embedding", config.vocab_size, embed)}
    if per_layer:
        tree["embed_tokens_per_layer"] = leaf("embedding", config.vocab_size, per_layer)
        tree["per_layer_model_projection"] = leaf("kernel", embed, per_layer)
        tree["per_layer_projection_norm"] = leaf("scale", config.per_layer_dim)
    for stack in layer_stacks(config):
        tree = replaced(tree, stack.path, _abstract_stack(config, stack, leaf))
    tree["norm"] = leaf("scale", embed)
    if not config.tie_embeddings:
        tree["lm_head"] = leaf("kernel", embed, config.vocab_size)
    return tree


def _abstract_stack(
    config: DecoderConfig, stack: Stack, leaf: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    layers, embed, shape = len(stack.layers), config.embed_dim, stack.shape
    query, key_value = (n * shape.head_dim for n in (config.num_heads, shape.num_kv_heads))
    attention = {"q_proj": leaf("kernel", layers, embed, query)}
    if not shape.shares_kv:
        attention["k_proj"] = leaf("kernel", layers, embed, key_value)
        if not shape.keys_as_values:
            attention["v_proj"] = leaf("kernel", layers, embed, key_value)
    attention["o_proj"] = leaf("kernel", layers, query, embed)
    if config.qk_norm:
        attention["q_norm"] = leaf("scale", layers, shape.head_dim)
        if not shape.shares_kv:
            attention["k_norm"] = leaf("scale", layers, shape.head_dim)
    if config.wide_qk_norm:
        attention["q_norm"] = leaf("scale", layers, query)
        attention["k_norm"] = leaf("scale", layers, key_value)
    tree: dict[str, Any] = {
        "input_layernorm": leaf("scale", layers, embed),
        "self_attn": attention,
        "post_attention_layernorm": leaf("scale", layers, embed),
        "mlp": {
            "gate_proj": leaf("kernel", layers, embed, shape.mlp_dim),
            "up_proj": leaf("kernel", layers, embed, shape.mlp_dim),
            "down_proj": leaf("kernel", layers, shape.mlp_dim, embed),
        },
    }
    if config.post_norms:
        tree["pre_feedforward_layernorm"] = leaf("scale", layers, embed)
        tree["post_feedforward_layernorm"] = leaf("scale", layers, embed)
    if not config.pre_norms:
        del tree["input_layernorm"], tree["pre_feedforward_layernorm"]
    biased = {"none": (), "qkv": "qkv", "all": "qkvo"}[config.attention_bias]
    modules = [attention[f"{name}_proj"] for name in biased]
    for module in [*modules, *(tree["mlp"].values() if config.mlp_bias else ())]:
        module.update(leaf("bias", layers, module["kernel"].shape[-1]))
    if config.per_layer_dim:
        tree["per_layer_input_gate"] = leaf("kernel", layers, embed, config.per_layer_dim)
        tree["per_layer_projection"] = leaf("kernel", layers, config.per_layer_dim, embed)
        tree["post_per_layer_input_norm"] = leaf("scale", layers, embed)
    if config.layer_scalars:
        tree |= leaf("layer_scalar", layers, 1)
    return tree


def init_params(config: DecoderConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Draw random parameters: norms and layers by 1, biases 0, others normal with variance 1 / I.

    A leaf's draw depends on the key and its own path alone.
    """

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("layer_scalar"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name.endswith("scale"):
            return jnp.full(leaf.shape, 1.0 - config.norm_offset, leaf.dtype)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        inputs = leaf.shape[-1] if name.endswith("embedding") else leaf.shape[-2]
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        normal = jax.random.normal(own_key, leaf.shape, jnp.float32)
        return (normal * inputs**-0.5).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config, dtype))
