"""Llama and its neighbours: Mistral, Qwen 2 and 3, SmolLM3 and OLMo 2.

Each is a Llama but for one or two things, so each has but a few fields of its own to read and to
write; ``families.py`` holds them together, and Gemma's beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smoa_jax.checkpoint.errors import require
from smoa_jax.checkpoint.huggingface.fields import (
    GLOBAL,
    LOCAL,
    kinds_of,
    layer_kinds,
    read_rope,
    rope_scaling_fields,
    short,
    truth,
    whole,
    windows,
)
from smoa_jax.models.config import DecoderConfig

# SmolLM3's rotary base where its file says none.
_SMOLLM3_THETA = 2e6


def plain_rope(config: DecoderConfig) -> dict[str, Any]:
    """The rotary fields of a model that turns all of its layers alike."""
    # rope_theta, not rope_parameters: transformers 4 and 5 and most other readers know it.
    return {"rope_theta": config.rope_base, **rope_scaling_fields(config.rope_scaling)}


def llama_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {
        **_common(values, source),
        "attention_bias": _bias(values, source),
        "mlp_bias": truth(values, "mlp_bias", source),
    }


def llama_fields(config: DecoderConfig) -> dict[str, Any]:
    return {**_common_fields(config), "mlp_bias": config.mlp_bias}


def mistral_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    count = whole(values, "num_hidden_layers", source)
    has_window = values.get("sliding_window") is not None
    # transformers reads a file's layer_types, warns, and gives every layer the same mask.
    kind = LOCAL if has_window else GLOBAL
    require(
        values.get("layer_types") in (None, [kind] * count),
        f"layer_types {short(values.get('layer_types'))} with sliding_window "
        f"{values.get('sliding_window')}",
        f"{kind} for each of {count} layers, or none",
        where=source,
    )
    return {**_common(values, source), **windows(values, [kind] * count, source)}


def mistral_fields(config: DecoderConfig) -> dict[str, Any]:
    return {**_common_fields(config), "sliding_window": config.sliding_window}


def qwen2_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {**_qwen_options(values, source), "attention_bias": "qkv"}


def qwen2_fields(config: DecoderConfig) -> dict[str, Any]:
    fields = {**_common_fields(config), **_window_fields(config)}
    return {**fields, "attention_bias": True}  # of q, k and v, whatever a file says


def qwen3_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    bias = _bias(values, source)
    return {**_qwen_options(values, source), "attention_bias": bias, "qk_norm": True}


def qwen3_fields(config: DecoderConfig) -> dict[str, Any]:
    return {**_common_fields(config), **_window_fields(config)}


def _qwen_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What both share; from ``max_window_layers`` on layers are local, unless the file says."""
    count = whole(values, "num_hidden_layers", source)
    first = values["max_window_layers"]
    require(
        isinstance(first, int) and not isinstance(first, bool) and first >= 0,
        f"max_window_layers {short(first)}",
        "a whole number",
        where=source,
    )
    local = [layer >= first for layer in range(count)]
    return {**_common(values, source), **_optional_windows(values, local, source)}


def smollm3_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Every fourth layer does not turn, unless the file lists them; local ones are among those."""
    count = whole(values, "num_hidden_layers", source)
    turns = values.get("no_rope_layers")  # 1 where a layer turns, whatever the name says
    if turns is None:
        interval = whole(values, "no_rope_layer_interval", source)
        turns = [int((layer + 1) % interval != 0) for layer in range(count)]
    require(
        isinstance(turns, list) and len(turns) >= count and not set(turns) - {0, 1},
        f"no_rope_layers {short(turns)}",
        f"0 or 1 for each of {count} layers",
        where=source,
    )
    rope_layers = tuple(bool(turn) for turn in turns[:count])
    rope_base, rope_scaling = read_rope(values, source, default_theta=_SMOLLM3_THETA)
    return {
        **llama_options(values, source),
        **_optional_windows(values, [not turn for turn in rope_layers], source),
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
        "rope_layers": () if all(rope_layers) else rope_layers,
    }


def smollm3_fields(config: DecoderConfig) -> dict[str, Any]:
    turns = config.rope_layers or (True,) * config.num_layers
    fields = {**llama_fields(config), **_window_fields(config)}
    return {**fields, "no_rope_layers": [int(turn) for turn in turns]}


def olmo2_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {
        **_common(values, source),
        "attention_bias": _bias(values, source),
        "pre_norms": False,
        "post_norms": True,
        "wide_qk_norm": True,
    }


def olmo2_fields(config: DecoderConfig) -> dict[str, Any]:
    return _common_fields(config)


# ------------------------------------------------------------------------------ what they share


def _common(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    require(
        values["hidden_act"] in ("silu", "swish"),
        f"hidden_act {values['hidden_act']!r}",
        f"silu, as every {values['model_type']} has",
        where=source,
    )
    base, scaling = read_rope(values, source)
    return {"rope_base": base, "rope_scaling": scaling}


def _common_fields(config: DecoderConfig) -> dict[str, Any]:
    bias = config.attention_bias == "all"
    return {"hidden_act": config.activation, "attention_bias": bias, **plain_rope(config)}


def _bias(values: Mapping[str, Any], source: str) -> str:
    return "all" if truth(values, "attention_bias", source) else "none"


def _optional_windows(values: Mapping[str, Any], local: list[bool], source: str) -> dict[str, Any]:
    """The options of local layers, which a switch turns off; ``local`` where none are listed."""
    on = truth(values, "use_sliding_window", source) and values.get("sliding_window") is not None
    default = [LOCAL if on and is_local else GLOBAL for is_local in local]
    kinds = layer_kinds(values, default, source)
    require(
        on or LOCAL not in kinds,
        f"layer_types with {LOCAL}, use_sliding_window {values['use_sliding_window']} and "
        f"sliding_window {values.get('sliding_window')}",
        "a window in use where there are local layers",
        where=source,
    )
    return windows(values, kinds, source)


def _window_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": config.sliding_window > 0,
        "sliding_window": config.sliding_window or None,
        "layer_types": kinds_of(config),
    }
