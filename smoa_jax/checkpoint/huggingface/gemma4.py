"""Gemma 4's ``config.json``: the options of a decoder that its fields stand for, and back.

Two spellings are about. Google's files give the heads of the global layers as ``global_head_dim``
and ``num_global_key_value_heads``; transformers 5 writes ``per_layer_config``, which names each
global layer. Both are read; Google's is written, which transformers and other converters know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smoa_jax.checkpoint.errors import refuse, require
from smoa_jax.checkpoint.huggingface.fields import (
    GLOBAL,
    LOCAL,
    check_gemma_activation,
    kinds_of,
    layer_kinds,
    optional_positive,
    periodic_kinds,
    positive,
    short,
    truth,
    whole,
    windows,
)
from smoa_jax.models.config import DecoderConfig, RopeScaling

_ROPE = {
    LOCAL: {"rope_type": "default", "rope_theta": 1e4},
    GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_PATTERN = 6  # without layer_types every sixth layer is global
_SPELLINGS = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
#: What ``per_layer_config`` stands for.
PER_LAYER_CONFIG = "per_layer_config"

DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "global_head_dim": 512,
}
#: The same decoder without per-layer embeddings, of the model that has no towers.
UNIFIED_DEFAULTS: dict[str, Any] = {
    **DEFAULTS,
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}


def gemma4_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The arguments of ``DecoderConfig`` that a Gemma 4 has beyond those of all families."""
    check_gemma_activation(values, source)
    kinds = _kinds(values, source)
    shared = _count(values, "num_kv_shared_layers", source)
    per_layer = _count(values, "hidden_size_per_layer_input", source)
    table = values.get("vocab_size_per_layer_input")
    require(
        not per_layer or table in (None, values["vocab_size"]),
        f"vocab_size_per_layer_input {short(table)} and vocab_size {short(values['vocab_size'])}",
        "the same, as every Gemma 4 has",
        where=source,
    )
    doubled = truth(values, "use_double_wide_mlp", source) and shared
    rope = {**_ROPE, **(values.get("rope_parameters") or {})}
    return {
        "activation": "gelu_tanh",
        "embed_scale": whole(values, "hidden_size", source) ** 0.5,
        "post_norms": True,
        "qk_norm": True,
        "value_norm": True,
        "query_scale": 1.0,
        "final_soft_cap": optional_positive(values, "final_logit_softcapping", source),
        **windows(values, kinds, source),
        "rope_base": positive(rope[GLOBAL], "rope_theta", f"{source}: {GLOBAL}"),
        "rope_scaling": _global_scaling(rope[GLOBAL], f"{source}: rope_parameters of {GLOBAL}"),
        "local_rope_base": _local_base(rope[LOCAL], source) if LOCAL in kinds else 0.0,
        **_global_heads(values, kinds, source),
        "num_kv_shared_layers": shared,
        "shared_mlp_dim": 2 * whole(values, "intermediate_size", source) if doubled else 0,
        "per_layer_dim": per_layer,
        "layer_scalars": True,
    }


def gemma4_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse, in Google's spelling."""
    scaling = config.rope_scaling
    turned: dict[str, Any] = {"rope_type": "default"}
    if scaling.kind == "proportional":
        turned = {"rope_type": "proportional", "partial_rotary_factor": scaling.rotated_share}
        if scaling.factor != 1:
            turned["factor"] = scaling.factor
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": config.final_soft_cap or None,
        "layer_types": kinds_of(config),
        "sliding_window": config.sliding_window or DEFAULTS["sliding_window"],
        "rope_parameters": {
            LOCAL: {"rope_type": "default", "rope_theta": config.local_rope_base or 1e4},
            GLOBAL: {**turned, "rope_theta": config.rope_base},
        },
        "global_head_dim": config.global_head_dim or config.head_dim,
        "num_global_key_value_heads": config.num_global_kv_heads or None,
        "attention_k_eq_v": config.global_keys_as_values,
        "num_kv_shared_layers": config.num_kv_shared_layers,
        "use_double_wide_mlp": bool(config.shared_mlp_dim),
        "hidden_size_per_layer_input": config.per_layer_dim,
        "vocab_size_per_layer_input": config.vocab_size,
        "enable_moe_block": False,
        "use_bidirectional_attention": None,
    }


def in_googles_spelling(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A text model's fields with ``per_layer_config`` said as Google says it."""
    if fields.get(PER_LAYER_CONFIG) is None:
        return dict(fields)
    values = {**DEFAULTS, **fields}
    heads = _global_heads(values, _kinds(values, source), source)
    spelled = {key: value for key, value in fields.items() if key != PER_LAYER_CONFIG}
    spelled["global_head_dim"] = heads["global_head_dim"] or values["head_dim"]
    spelled["num_global_key_value_heads"] = heads["num_global_kv_heads"] or None
    return spelled


def _kinds(values: Mapping[str, Any], source: str) -> list[str]:
    """The kind of each layer; the last one is global whatever the file says, as in transformers."""
    count = whole(values, "num_hidden_layers", source)
    return [*layer_kinds(values, periodic_kinds(count, _PATTERN), source)[:-1], GLOBAL]


def _global_heads(values: Mapping[str, Any], kinds: list[str], source: str) -> dict[str, Any]:
    """How the heads of global layers differ from the others', in either spelling."""
    keys_as_values = truth(values, "attention_k_eq_v", source)
    by_layer = values.get(PER_LAYER_CONFIG)
    if by_layer is None:
        found = {
            "head_dim": whole(values, "global_head_dim", source),
            "num_key_value_heads": values.get("num_global_key_value_heads"),
        }
        if not keys_as_values:  # then transformers reads no other number of heads
            found["num_key_value_heads"] = None
    else:
        found = _overrides(by_layer, kinds, source)
    head_dim = found.get("head_dim") or values["head_dim"]
    kv_heads = found.get("num_key_value_heads") or values["num_key_value_heads"]
    own = {"head_dim": head_dim, "num_key_value_heads": kv_heads}
    for key, value in own.items():
        whole({_SPELLINGS[key]: value}, _SPELLINGS[key], source)
    return {
        "global_head_dim": 0 if head_dim == values["head_dim"] else head_dim,
        "num_global_kv_heads": 0 if kv_heads == values["num_key_value_heads"] else kv_heads,
        "global_keys_as_values": keys_as_values,
    }


def _overrides(by_layer: Any, kinds: list[str], source: str) -> dict[str, Any]:
    """What ``per_layer_config`` says of the global layers, which must be the same of each."""
    expected = "the same head_dim and num_key_value_heads of every global layer, and of no other"
    if not isinstance(by_layer, Mapping):
        refuse(f"{PER_LAYER_CONFIG} {short(by_layer)}", "an object", where=source)
    try:
        layers = {int(layer): dict(entry) for layer, entry in by_layer.items()}
    except (TypeError, ValueError):
        refuse(f"{PER_LAYER_CONFIG} {short(by_layer)}", "an object by layer", where=source)
    wanted = [layer for layer, kind in enumerate(kinds) if kind == GLOBAL]
    entries = list(layers.values())
    require(
        not entries
        or (
            sorted(layers) == wanted
            and all(entry == entries[0] for entry in entries)
            and not entries[0].keys() - _SPELLINGS.keys()
        ),
        f"{PER_LAYER_CONFIG} {short(dict(by_layer))}",
        expected,
        where=source,
    )
    return entries[0] if entries else {}


def _count(values: Mapping[str, Any], key: str, source: str) -> int:
    """The whole number under ``key``; null and 0 are none."""
    return whole(values, key, source) if values.get(key) else 0


def _local_base(rope: Mapping[str, Any], source: str) -> float:
    where = f"{source}: rope_parameters of {LOCAL}"
    require(
        rope.get("rope_type", "default") == "default",
        f"rope_type {short(rope.get('rope_type'))}",
        "default, as every Gemma 4 has",
        where=where,
    )
    return positive(rope, "rope_theta", where)


def _global_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling:
    kind = rope.get("rope_type", "default")
    require(
        kind in ("default", "proportional"),
        f"rope_type {short(kind)}",
        "proportional (or default), as every Gemma 4 has",
        where=where,
    )
    if kind == "default":
        return RopeScaling()
    values = {"factor": 1.0, "partial_rotary_factor": 1.0, **rope}
    return RopeScaling(
        kind="proportional",
        factor=positive(values, "factor", where),
        rotated_share=positive(values, "partial_rotary_factor", where),
    )
