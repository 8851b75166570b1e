"""Hugging Face's ``config.json`` and our ``DecoderConfig``, in both directions.

Files written by transformers 4 say ``rope_theta`` and ``rope_scaling``, those of transformers 5
``rope_parameters``; both are read. A field that changes what the model computes and that the
decoder doesn't implement is an error, never ignored; fields that change nothing here are kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoa_jax import checks
from smoa_jax.checkpoint.errors import CheckpointError, listed, refuse, require
from smoa_jax.checkpoint.huggingface.families import FAMILIES, MULTIMODAL, family_of
from smoa_jax.checkpoint.huggingface.fields import positive, short, truth, whole
from smoa_jax.models.config import DecoderConfig

MODEL_TYPES = (*FAMILIES, *MULTIMODAL)

_TEXT_CONFIG = "text_config"
_EXPERTS = "a mixture of experts"
# What the decoder doesn't compute, of model types that one might take for those it does.
_UNREAD = {
    "mixtral": f"Mixtral, {_EXPERTS}",
    "qwen2_moe": f"Qwen2-MoE, {_EXPERTS}",
    "qwen3_moe": f"Qwen3-MoE, {_EXPERTS}",
    "olmoe": f"OLMoE, {_EXPERTS}",
    "llama4": f"Llama 4, {_EXPERTS}",
    "llama4_text": f"Llama 4, {_EXPERTS}",
    "mistral4": f"Mistral 4, {_EXPERTS}",
    "phi": "Phi, whose layers run side by side",
    "phi3": "Phi 3 and 4, whose kernels are fused",
    "phimoe": f"Phi-MoE, {_EXPERTS}",
    "gemma3n": "Gemma 3n, whose layers predict and correct several streams",
    "gemma3n_text": "Gemma 3n, whose layers predict and correct several streams",
    "mistral3": "Mistral 3, which sees images",
    "ministral": "Ministral with layers of two kinds",
    "ministral3": "Ministral 3, whose rotary embedding is scaled by YaRN",
    "olmo": "OLMo 1, whose norms have no weights",
    "olmo3": "OLMo 3, whose rotary embeddings differ by layer",
    "qwen2_vl": "Qwen2-VL, which sees images",
    "qwen2_5_vl": "Qwen2.5-VL, which sees images",
    "qwen3_vl": "Qwen3-VL, which sees images",
    "qwen3_next": "Qwen3-Next, whose attention is linear in most layers",
    "qwen3_5": "Qwen3.5, whose attention is linear in most layers",
    "qwen3_5_text": "Qwen3.5, whose attention is linear in most layers",
    "qwen3_5_moe": f"Qwen3.5-MoE, {_EXPERTS}",
    "qwen3_5_moe_text": f"Qwen3.5-MoE, {_EXPERTS}",
}
_REMEDIES = {
    "quantization_config": "name the unquantised model",
    "auto_map": "models that need remote code are refused",
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or one clear line on why there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON ({error})") from error
    require(isinstance(value, dict), f"a {type(value).__name__}", "a JSON object", where=path)
    return value


def is_multimodal(fields: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` describes a model whose decoder is but a part of it."""
    return fields.get("model_type") in MULTIMODAL


def text_fields(fields: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The fields of the language model: all of them, or a multimodal model's ``text_config``."""
    if not is_multimodal(fields):
        return dict(fields)
    inner = fields.get(_TEXT_CONFIG)
    if not isinstance(inner, Mapping):
        refuse(f"{_TEXT_CONFIG} {short(inner)}", "an object", where=source)
    expected = MULTIMODAL[fields["model_type"]]
    require(
        inner.get("model_type", expected) == expected,
        f"{_TEXT_CONFIG} of model_type {inner.get('model_type')!r}",
        f"{expected}",
        where=source,
    )
    outer = {key: fields[key] for key in ("quantization_config", "auto_map") if key in fields}
    if fields.get("tie_word_embeddings") is not None:
        outer["tie_word_embeddings"] = fields["tie_word_embeddings"]
    for key in outer.keys() & inner.keys():
        require(
            inner[key] in (None, outer[key]),
            f"{key} {short(outer[key])} and in {_TEXT_CONFIG} {short(inner[key])}",
            "the same in both",
            where=source,
        )
    return {**inner, "model_type": expected, **outer}


def config_from_hf(fields: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """The decoder that a ``config.json`` describes.

    Args:
        fields: the parsed file.
        source: what to call it in errors.

    Raises:
        CheckpointError: for a model type or a field that the decoder doesn't implement.
    """
    _refuse_other_types(fields, source)
    fields = text_fields(fields, source)
    family = FAMILIES[fields["model_type"]]
    _refuse_what_must_be_off(fields, family.must_be_off, source)
    stated = {key: value for key, value in fields.items() if value is not None}
    nulls = {key for key in family.nullable if key in fields}
    values = {k: v for k, v in family.defaults.items() if k not in nulls} | stated
    heads = whole(values, "num_attention_heads", source)
    embed_dim = whole(values, "hidden_size", source)
    values = {"num_key_value_heads": heads, "head_dim": embed_dim // heads, **values}
    try:
        return DecoderConfig(
            vocab_size=whole(values, "vocab_size", source),
            embed_dim=embed_dim,
            num_layers=whole(values, "num_hidden_layers", source),
            num_heads=heads,
            num_kv_heads=whole(values, "num_key_value_heads", source),
            head_dim=whole(values, "head_dim", source),
            mlp_dim=whole(values, "intermediate_size", source),
            max_positions=whole(values, "max_position_embeddings", source),
            norm_epsilon=positive(values, "rms_norm_eps", source),
            tie_embeddings=truth(values, "tie_word_embeddings", source),
            **family.options(values, source),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def config_to_hf(
    config: DecoderConfig, base: Mapping[str, Any] | None = None, *, dtype: str
) -> dict[str, Any]:
    """The ``config.json`` for weights of ``dtype`` ("float32", "bfloat16").

    Args:
        config: the decoder.
        base: the source model's own fields, kept whole except for the dtype. ValueError where
            they describe another model than ``config``.
        dtype: how the weights are stored.
    """
    fields = dict(base) if base else _fields_of(config)
    described = config_from_hf(fields, "hf_config")
    different = [
        field.name
        for field in dataclasses.fields(config)
        if not _same(getattr(config, field.name), getattr(described, field.name))
    ]
    checks.require(
        not different or not base,
        f"an hf_config that differs from the model's config in {listed(different)}",
        "the config of the model that the weights belong to",
    )
    checks.require(
        not different,
        f"a decoder whose {listed(different)} no {fields['model_type']} has",
        "options that a model type of transformers stands for",
        "give the source's hf_config",
    )
    spelling = FAMILIES[text_fields(fields)["model_type"]].spelling
    if is_multimodal(fields):
        inner = fields[_TEXT_CONFIG]
        inner = spelling(inner, "hf_config") if spelling else inner
        fields[_TEXT_CONFIG] = _with_dtype(inner, dtype, always=False)
    elif spelling:
        fields = spelling(fields, "hf_config")
    return _with_dtype(fields, dtype, always=True)


def _with_dtype(fields: Mapping[str, Any], dtype: str, *, always: bool) -> dict[str, Any]:
    keys = [key for key in ("dtype", "torch_dtype") if key in fields]
    if always and not keys:
        keys = ["torch_dtype"]
    return {**fields, **dict.fromkeys(keys, dtype)}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-12 * max(abs(one), abs(other))
    return one == other


def _fields_of(config: DecoderConfig) -> dict[str, Any]:
    model_type = family_of(config)
    family = FAMILIES[model_type]
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,  # of a Gemma; the others say it themselves
        **family.fields(config),
    }


def _refuse_other_types(fields: Mapping[str, Any], source: str) -> None:
    model_type = fields.get("model_type")
    what = _UNREAD.get(str(model_type), "")
    require(
        model_type in MODEL_TYPES,
        f"model_type {model_type!r}{f' ({what})' if what else ''}",
        f"one of {', '.join(MODEL_TYPES)}",
        where=source,
    )


def _refuse_what_must_be_off(
    fields: Mapping[str, Any], must_be_off: Mapping[str, tuple[Any, ...]], source: str
) -> None:
    for key, off in must_be_off.items():
        value = fields.get(key)
        if value not in off:
            remedy = _REMEDIES.get(key, "the decoder doesn't implement it")
            raise CheckpointError(
                f"{source}: {key} is {short(value)}; expected {short(off[0])} or none: {remedy}"
            )
