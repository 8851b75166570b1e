"""Tiny decoders for the tests: shapes that all differ, so that a mix-up cannot go unseen."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.types import Blocks, LowRank
from smoa_jax.models.config import DecoderConfig, RopeScaling
from smoa_jax.models.decoder import Decoder, abstract_params

CONFIG = DecoderConfig(
    vocab_size=61,
    embed_dim=20,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=28,
    rope_base=10000.0,
    norm_epsilon=1e-5,
    tie_embeddings=False,
    max_positions=128,
)


_GEMMA = {
    "tie_embeddings": True,
    "activation": "gelu_tanh",
    "embed_scale": 20**0.5,
    "norm_offset": 1.0,
    "head_dim": 8,
}
_GEMMA2 = {
    **_GEMMA,
    "post_norms": True,
    "query_scale": 0.3,
    "sliding_window": 4,
    "local_layers": (True, False, True),
}


def _pattern(kinds: str) -> dict[str, Any]:
    return {"num_layers": len(kinds), "local_layers": tuple(kind == "L" for kind in kinds)}


_GEMMA4 = {
    **_GEMMA2,
    "norm_offset": 0.0,
    "qk_norm": True,
    "value_norm": True,
    "query_scale": 1.0,
    "global_head_dim": 12,
    "local_rope_base": 100.0,
    "rope_scaling": RopeScaling(kind="proportional", rotated_share=0.34),
    "layer_scalars": True,
}
#: One config per family, each with all that the family does otherwise.
FAMILIES = {
    "llama": CONFIG,
    "llama_tied": dataclasses.replace(CONFIG, tie_embeddings=True),
    "gemma": dataclasses.replace(CONFIG, **_GEMMA),
    "gemma2": dataclasses.replace(CONFIG, **_GEMMA2, attention_soft_cap=2.0, final_soft_cap=1.0),
    "gemma3": dataclasses.replace(
        CONFIG,
        **_GEMMA2,
        qk_norm=True,
        local_rope_base=100.0,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
    ),
    "gemma4_31b": dataclasses.replace(
        CONFIG,
        **{**_GEMMA4, **_pattern("LLG" * 2)},
        num_global_kv_heads=1,
        global_keys_as_values=True,
    ),
    "gemma4_e2b": dataclasses.replace(
        CONFIG,
        **{**_GEMMA4, **_pattern("LLG" * 2 + "LG" * 3)},
        num_kv_shared_layers=6,
        shared_mlp_dim=36,
        per_layer_dim=10,
    ),
    "mistral": dataclasses.replace(CONFIG, local_layers=(True,) * 3, sliding_window=4, head_dim=6),
    "qwen2": dataclasses.replace(
        CONFIG, attention_bias="qkv", local_layers=(False, False, True), sliding_window=3
    ),
    "qwen3": dataclasses.replace(CONFIG, qk_norm=True, tie_embeddings=True, head_dim=8),
    "smollm3": dataclasses.replace(
        CONFIG, rope_layers=(True, False, True), attention_bias="all", mlp_bias=True
    ),
    "olmo2": dataclasses.replace(CONFIG, pre_norms=False, post_norms=True, wide_qk_norm=True),
}


def config(**changes: Any) -> DecoderConfig:
    return dataclasses.replace(CONFIG, **changes)


def model(**changes: Any) -> Decoder:
    return Decoder(config(**changes), dtype=jnp.float32)


def params(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Those of ``CONFIG`` with some changes."""
    return params_of(config(**changes), seed)


def params_of(decoder: DecoderConfig, seed: int = 0) -> dict[str, Any]:
    """Like ``init_params``, drawn by NumPy: nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if "scalar" in str(path[-1]):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        if "scale" in str(path[-1]):
            offset = decoder.norm_offset
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) - offset, jnp.float32)
        if "bias" in str(path[-1]):  # small, or they would drown what the tokens say
            return jnp.asarray(rng.normal(scale=0.2, size=leaf.shape), jnp.float32)
        inputs = leaf.shape[-1 if "embedding" in str(path[-1]) else -2]
        return jnp.asarray(rng.normal(scale=inputs**-0.5, size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(decoder))


@functools.partial(jax.jit, static_argnames=("decoder", "method"))
def apply(
    decoder: Decoder, params: Any, tokens: Any, *arguments: Any, method: str = "__call__", **named
) -> Any:
    """``decoder.apply``, compiled once per shape for all tests."""
    rngs = named.pop("rngs", None)
    return decoder.apply({"params": params}, tokens, *arguments, method=method, rngs=rngs, **named)


def tokens(batch: int, time: int, seed: int = 1, vocab_size: int = 61) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, time)).astype(np.int32)


def adapt(base: dict[str, Any], seed: int, *, b_std: float, dropout: float = 0.0) -> dict[str, Any]:
    """Put blocks beside every layer kernel but q_proj's, which gets a LoRA: both kinds of path."""
    rng = np.random.default_rng(seed)

    def node(kernel: jax.Array, blocks: bool) -> Any:
        layers, inputs, outputs = kernel.shape
        rank = 2
        common = {
            "a": jnp.asarray(rng.uniform(-0.3, 0.3, (layers, inputs, rank)), jnp.float32),
            "b": jnp.asarray(b_std * rng.normal(size=(layers, outputs, rank)), jnp.float32),
            "scale": jnp.ones((layers,)),
            "dropout": dropout,
        }
        if not blocks:
            return LowRank(ranks=jnp.full((layers, 1), 2.0), weight_modulated=False, **common)
        return Blocks(
            in_block=jnp.asarray(rng.permuted(np.arange(layers * inputs) % 2), jnp.float32).reshape(
                layers, inputs
            ),
            out_block=jnp.asarray(
                rng.permuted(np.arange(layers * outputs) % 2), jnp.float32
            ).reshape(layers, outputs),
            ranks=jnp.full((layers, 2), 2.0),
            **common,
        )

    def visit(tree: dict[str, Any], name: str) -> dict[str, Any]:
        tree = {
            key: visit(value, key) if isinstance(value, dict) else value
            for key, value in tree.items()
        }
        return (
            {**tree, "smoa": node(tree["kernel"], name != "q_proj")} if "kernel" in tree else tree
        )

    return {**base, "layers": visit(base["layers"], "layers")}
