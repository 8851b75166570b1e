"""What each model type of Hugging Face's means for the decoder, and back.

A family is a table of what transformers assumes where a ``config.json`` says nothing (Google's own
files leave much out), of the fields that must be off because the decoder doesn't implement them,
and two functions: the options of a ``DecoderConfig`` that its fields stand for, and the fields that
stand for a ``DecoderConfig``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from smoa_jax.checkpoint.errors import require
from smoa_jax.checkpoint.huggingface import gemma4, neighbours
from smoa_jax.checkpoint.huggingface.fields import (
    GLOBAL,
    LOCAL,
    check_gemma_activation,
    kinds_of,
    layer_kinds,
    optional_positive,
    periodic_kinds,
    positive,
    read_rope,
    rope_scaling_fields,
    short,
    whole,
    windows,
)
from smoa_jax.checkpoint.huggingface.neighbours import plain_rope
from smoa_jax.models.config import DecoderConfig, RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type`` and how to read and write its config.

    Attributes:
        architecture: What ``architectures`` says.
        defaults: Values of absent fields.
        nullable: Fields that a null switches off, whatever the default.
        must_be_off: Fields that change the function -> the values under which they don't.
        options: From the fields (defaults included) and the file's name to the arguments of
            ``DecoderConfig`` that families don't share.
        fields: The inverse.
        spelling: From a text model's fields and the file's name to the fields as an export says
            them, where there are several ways.
    """

    architecture: str
    defaults: Mapping[str, Any]
    must_be_off: Mapping[str, tuple[Any, ...]]
    options: Callable[[Mapping[str, Any], str], dict[str, Any]]
    fields: Callable[[DecoderConfig], dict[str, Any]]
    nullable: tuple[str, ...] = ()
    spelling: Callable[[Mapping[str, Any], str], dict[str, Any]] | None = None


def family_of(config: DecoderConfig) -> str:
    """The model type whose defaults come closest to a decoder's options."""
    if config.layer_scalars:
        return "gemma4_text"
    if not config.norm_offset:
        return _neighbour_of(config)
    if not config.post_norms:
        return "gemma"
    return "gemma3_text" if config.qk_norm else "gemma2"


def _neighbour_of(config: DecoderConfig) -> str:
    if not config.pre_norms:
        return "olmo2"
    if config.rope_layers:
        return "smollm3"
    if config.qk_norm:
        return "qwen3"
    if config.attention_bias == "qkv":
        return "qwen2"
    return "mistral" if config.local_layers else "llama"


# --------------------------------------------------------------------------------------- Gemma


def _gemma_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    # "gelu" is a legacy value of Google's first files; the models were trained with tanh.
    for key in ("hidden_act", "hidden_activation"):
        require(
            values.get(key) in (None, "gelu", "gelu_pytorch_tanh"),
            f"{key} {short(values.get(key))}",
            "gelu_pytorch_tanh, as every Gemma has",
            where=source,
        )
    base, scaling = read_rope(values, source)
    return {**_gemma_common(values, source), "rope_base": base, "rope_scaling": scaling}


def _gemma_fields(config: DecoderConfig) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", **plain_rope(config)}


def _gemma_common(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {
        "activation": "gelu_tanh",
        "embed_scale": whole(values, "hidden_size", source) ** 0.5,
        "norm_offset": 1.0,
    }


def _gemma2_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    base, scaling = read_rope(values, source)
    return {
        **_later_gemma(values, source, pattern=2),
        "attention_soft_cap": optional_positive(values, "attn_logit_softcapping", source),
        "rope_base": base,
        "rope_scaling": scaling,
    }


def _gemma2_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_later_gemma_fields(config),
        "attn_logit_softcapping": config.attention_soft_cap or None,
        **plain_rope(config),
    }


def _gemma3_options(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    options = {**_later_gemma(values, source, pattern=_pattern(values, source)), "qk_norm": True}
    rope = values.get("rope_parameters") or {}
    by_layer = {key: rope.get(key) or {} for key in (GLOBAL, LOCAL)}
    if rope and not any(by_layer.values()):  # one flat entry is the global layers'
        by_layer[GLOBAL] = rope
    positions = {"max_position_embeddings": values["max_position_embeddings"]}
    older = {key: values[key] for key in ("rope_theta", "rope_scaling") if values.get(key)}
    newer = {"rope_parameters": by_layer[GLOBAL]}
    if by_layer[GLOBAL].get("rope_theta") is not None:
        older.pop("rope_theta", None)  # transformers lets the newer form win
    base, scaling = read_rope({**positions, **older, **newer}, source, default_theta=1e6)
    local, local_scaling = read_rope(
        {**positions, "rope_parameters": by_layer[LOCAL]},
        source,
        default_theta=positive(
            {"rope_local_base_freq": 1e4, **values}, "rope_local_base_freq", source
        ),
    )
    require(
        local_scaling == RopeScaling(),
        f"rope_parameters of {LOCAL} {short(by_layer.get(LOCAL))}",
        "rope_type default, as every Gemma 3 has",
        where=source,
    )
    return {
        **options,
        "rope_base": base,
        "rope_scaling": scaling,
        "local_rope_base": local if "local_layers" in options else 0.0,
    }


def _gemma3_fields(config: DecoderConfig) -> dict[str, Any]:
    scaling = rope_scaling_fields(config.rope_scaling).get("rope_scaling", {"rope_type": "default"})
    local = {"rope_type": "default", "rope_theta": config.local_rope_base or 1e4}
    return {
        **_later_gemma_fields(config),
        # Both forms, since transformers 4 knows the older one alone.
        "rope_theta": config.rope_base,
        "rope_local_base_freq": local["rope_theta"],
        **rope_scaling_fields(config.rope_scaling),
        "rope_parameters": {GLOBAL: {**scaling, "rope_theta": config.rope_base}, LOCAL: local},
    }


def _later_gemma(values: Mapping[str, Any], source: str, pattern: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; every ``pattern``-th layer is global unless the file lists them."""
    check_gemma_activation(values, source)
    count = whole(values, "num_hidden_layers", source)
    kinds = layer_kinds(values, periodic_kinds(count, pattern), source)
    return {
        **_gemma_common(values, source),
        "post_norms": True,
        "query_scale": positive(values, "query_pre_attn_scalar", source) ** -0.5,
        "final_soft_cap": optional_positive(values, "final_logit_softcapping", source),
        **windows(values, kinds, source),
    }


def _pattern(values: Mapping[str, Any], source: str) -> int:
    keys = ("sliding_window_pattern", "_sliding_window_pattern")
    found = next((key for key in keys if values.get(key) is not None), None)
    return 6 if found is None else whole(values, found, source)


def _later_gemma_fields(config: DecoderConfig) -> dict[str, Any]:
    fields = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _near_whole(config.attention_scale**-2),
        "final_logit_softcapping": config.final_soft_cap or None,
        "layer_types": kinds_of(config),
    }
    window = config.sliding_window
    return {**fields, "sliding_window": window} if window else fields


def _near_whole(value: float) -> float | int:
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-6 * value else value


# --------------------------------------------------------------------------------- the families

_SHARED_OFF: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "enable_moe_block": (False, None),
}
# Whose biases are read.
_NEIGHBOURS_OFF = {key: off for key, off in _SHARED_OFF.items() if key != "attention_bias"}
_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_DEFAULTS: dict[str, Any] = {
    **_LLAMA_DEFAULTS,
    "num_key_value_heads": 32,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_CAUSAL = {"use_bidirectional_attention": (False, None)}
_GEMMA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
# Google's multimodal configs rely on these for all that their sizes share.
_LATER_SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def _gemma4(architecture: str, defaults: Mapping[str, Any]) -> Family:
    return Family(
        architecture=architecture,
        defaults=defaults,
        must_be_off={
            **_SHARED_OFF,
            # Tokens of an image see each other, if that is all; here are none.
            "use_bidirectional_attention": (False, None, "vision"),
        },
        options=gemma4.gemma4_options,
        fields=gemma4.gemma4_fields,
        nullable=("hidden_size_per_layer_input",),
        spelling=gemma4.in_googles_spelling,
    )


#: By ``model_type``, as transformers 5 defines them.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults=_LLAMA_DEFAULTS,
        must_be_off=_NEIGHBOURS_OFF,
        options=neighbours.llama_options,
        fields=neighbours.llama_fields,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        must_be_off={**_SHARED_OFF, **_CAUSAL},
        options=_gemma_options,
        fields=_gemma_fields,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults={
            **_GEMMA_DEFAULTS,
            **_LATER_SIZES,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        must_be_off={**_SHARED_OFF, **_CAUSAL},
        options=_gemma2_options,
        fields=_gemma2_fields,
        nullable=("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            **_GEMMA_DEFAULTS,
            **_LATER_SIZES,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
        },
        # transformers reads attn_logit_softcapping into a Gemma 3 and never uses it.
        must_be_off={**_SHARED_OFF, **_CAUSAL, "attn_logit_softcapping": (None,)},
        options=_gemma3_options,
        fields=_gemma3_fields,
        nullable=("sliding_window",),
    ),
    "gemma4_text": _gemma4("Gemma4ForCausalLM", gemma4.DEFAULTS),
    "gemma4_unified_text": _gemma4("Gemma4UnifiedForCausalLM", gemma4.UNIFIED_DEFAULTS),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={
            **_LLAMA_DEFAULTS,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
        must_be_off=_SHARED_OFF,
        options=neighbours.mistral_options,
        fields=neighbours.mistral_fields,
        nullable=("num_key_value_heads", "sliding_window"),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN_DEFAULTS,
        must_be_off={**_NEIGHBOURS_OFF, "use_mrope": (False, None)},
        options=neighbours.qwen2_options,
        fields=neighbours.qwen2_fields,
        nullable=("num_key_value_heads", "sliding_window"),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        must_be_off=_NEIGHBOURS_OFF,
        options=neighbours.qwen3_options,
        fields=neighbours.qwen3_fields,
        nullable=("num_key_value_heads", "sliding_window"),
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults={
            **_LLAMA_DEFAULTS,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
        },
        must_be_off=_NEIGHBOURS_OFF,
        options=neighbours.smollm3_options,
        fields=neighbours.smollm3_fields,
        nullable=("num_key_value_heads",),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        defaults={**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5},
        must_be_off=_NEIGHBOURS_OFF,
        options=neighbours.olmo2_options,
        fields=neighbours.olmo2_fields,
    ),
}
#: Multimodal model types whose text part is one of the families.
MULTIMODAL = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
}
