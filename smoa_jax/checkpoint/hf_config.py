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

from smoa_jax.checkpoint.errors import CheckpointError, listed
from smoa_jax.models.config import DecoderConfig, RopeScaling

MODEL_TYPES = ("llama",)

# What transformers' LlamaConfig assumes where a file says nothing.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_DEFAULT_ROPE_THETA = 10000.0
_ROPE_TYPES = ("default", "linear", "llama3")

# Fields that would change the function, with the values under which they don't.
_MUST_BE_OFF: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
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
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def config_from_hf(fields: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """The decoder that a ``config.json`` describes.

    Args:
        fields: the parsed file.
        source: what to call it in errors.
    """
    _refuse_other_models(fields, source)
    values = {**_LLAMA_DEFAULTS, **{k: v for k, v in fields.items() if v is not None}}
    heads = _whole(values, "num_attention_heads", source)
    embed_dim = _whole(values, "hidden_size", source)
    if values["hidden_act"] not in ("silu", "swish"):
        raise CheckpointError(
            f"{source}: hidden_act is {values['hidden_act']!r}; expected silu, as every Llama has"
        )
    values = {"num_key_value_heads": heads, "head_dim": embed_dim // heads, **values}
    try:
        rope_base, rope_scaling = _rope(values, source)
        return DecoderConfig(
            vocab_size=_whole(values, "vocab_size", source),
            embed_dim=embed_dim,
            num_layers=_whole(values, "num_hidden_layers", source),
            num_heads=heads,
            num_kv_heads=_whole(values, "num_key_value_heads", source),
            head_dim=_whole(values, "head_dim", source),
            mlp_dim=_whole(values, "intermediate_size", source),
            max_positions=_whole(values, "max_position_embeddings", source),
            norm_epsilon=_positive(values, "rms_norm_eps", source),
            tie_embeddings=_truth(values, "tie_word_embeddings", source),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            activation="silu",
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
    if base:
        described = config_from_hf(base, "hf_config")
        different = [
            field.name
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(described, field.name)
        ]
        if different:
            raise ValueError(
                f"got an hf_config that differs from the model's config in {listed(different)}; "
                "expected the config of the model that the weights belong to"
            )
        fields = dict(base)
    else:
        fields = _fields_of(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in fields]
    return {**fields, **dict.fromkeys(keys or ["torch_dtype"], dtype)}


def _fields_of(config: DecoderConfig) -> dict[str, Any]:
    # rope_theta, not rope_parameters: transformers 4 and 5 and most other readers know it.
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        **rope_scaling_fields(config.rope_scaling),
    }


def _refuse_other_models(fields: Mapping[str, Any], source: str) -> None:
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{source}: model_type is {model_type!r}; expected one of {', '.join(MODEL_TYPES)}"
        )
    for key, off in _MUST_BE_OFF.items():
        value = fields.get(key)
        if value not in off:
            remedy = _REMEDIES.get(key, "the decoder doesn't implement it")
            raise CheckpointError(
                f"{source}: {key} is {_short(value)}; expected {_short(off[0])} or none: {remedy}"
            )


def _rope(fields: Mapping[str, Any], source: str) -> tuple[float, RopeScaling]:
    """The base and the scaling, wherever the file says them; an error where it contradicts itself.

    Newer ``rope_parameters`` hold both; older ``rope_scaling`` stands beside ``rope_theta``.
    """
    bases, scalings = {}, {}
    if fields.get("rope_theta") is not None:
        bases["rope_theta"] = _positive(fields, "rope_theta", source)
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.get(key)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"{source}: {key} is {_short(rope)}; expected an object")
        scalings[key] = _rope_scaling(rope, fields["max_position_embeddings"], f"{source}: {key}")
        if rope.get("rope_theta") is not None:
            bases[key] = _positive(rope, "rope_theta", f"{source}: {key}")
    for values in (bases, scalings):
        if len(set(values.values())) > 1:
            raise CheckpointError(
                f"{source}: {listed(values)} contradict each other; expected the same rotary "
                "embedding in each: remove the wrong one"
            )
    base = next(iter(bases.values()), _DEFAULT_ROPE_THETA)
    return base, next(iter(scalings.values()), RopeScaling())


def _rope_scaling(rope: Mapping[str, Any], max_positions: int, where: str) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise CheckpointError(
            f"{where} has rope_type {_short(kind)}; expected one of {', '.join(_ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError(f"{where} rotates a part of each head; expected all of it")
    if kind == "default":
        return RopeScaling()
    factor = _positive(rope, "factor", where)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    original = {"original_max_position_embeddings": max_positions, **rope}
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=_positive(rope, "low_freq_factor", where),
        high_freq_factor=_positive(rope, "high_freq_factor", where),
        original_max_positions=_whole(original, "original_max_position_embeddings", where),
    )


def rope_scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    """The ``rope_scaling`` entry of a ``config.json``; {} for none."""
    if scaling.kind == "none":
        return {}
    entry: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        entry["low_freq_factor"] = scaling.low_freq_factor
        entry["high_freq_factor"] = scaling.high_freq_factor
        entry["original_max_position_embeddings"] = scaling.original_max_positions
    return {"rope_scaling": entry}


def _whole(values: Mapping[str, Any], key: str, source: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        got = "missing" if value is None else _short(value)
        raise CheckpointError(f"{source}: {key} is {got}; expected a whole number above 0")
    return value


def _positive(values: Mapping[str, Any], key: str, source: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"{source}: {key} is {_short(value)}; expected a number above 0")
    return float(value)


def _truth(values: Mapping[str, Any], key: str, source: str) -> bool:
    value = values.get(key)
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: {key} is {_short(value)}; expected true or false")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
