"""Fields of a ``config.json``, read one by one; each error names file, field and value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smoa_jax.checkpoint.errors import CheckpointError, listed, require
from smoa_jax.models.config import DecoderConfig, RopeScaling

#: What ``layer_types`` calls local and global layers.
LOCAL, GLOBAL = "sliding_attention", "full_attention"

_ROPE_TYPES = ("default", "linear", "llama3")
_ORIGINAL = "original_max_position_embeddings"


def read_rope(
    fields: Mapping[str, Any], source: str, default_theta: float = 10000.0
) -> tuple[float, RopeScaling]:
    """The base and the scaling, wherever the file says them; an error where it contradicts itself.

    Newer ``rope_parameters`` hold both; older ``rope_scaling`` stands beside ``rope_theta``.
    """
    bases, scalings = {}, {}
    if fields.get("rope_theta") is not None:
        bases["rope_theta"] = positive(fields, "rope_theta", source)
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.get(key)
        if rope is None or rope == {}:
            continue
        require(isinstance(rope, Mapping), f"{key} {short(rope)}", "an object", where=source)
        if fields.get(_ORIGINAL) is not None:  # transformers lets the outer one win
            rope = {**rope, _ORIGINAL: fields[_ORIGINAL]}
        scalings[key] = read_rope_scaling(
            rope, fields["max_position_embeddings"], f"{source}: {key}"
        )
        if rope.get("rope_theta") is not None:
            bases[key] = positive(rope, "rope_theta", f"{source}: {key}")
    for values in (bases, scalings):
        require(
            len(set(values.values())) <= 1,
            f"{listed(values)}, which contradict each other",
            "the same rotary embedding in each",
            "remove the wrong one",
            where=source,
        )
    base = next(iter(bases.values()), default_theta)
    return base, next(iter(scalings.values()), RopeScaling())


def read_rope_scaling(rope: Mapping[str, Any], max_positions: int, where: str) -> RopeScaling:
    """The scaling that one entry describes, newer or older."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise CheckpointError(
            f"{where} has rope_type {short(kind)}; expected one of {', '.join(_ROPE_TYPES)}"
        )
    by_layer = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if by_layer:
        raise CheckpointError(
            f"{where} differs by kind of layer ({listed(by_layer)}); expected one rotary embedding "
            "for all layers, as every model of this type has"
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError(f"{where} rotates a part of each head; expected all of it")
    if kind == "default":
        return RopeScaling()
    factor = positive(rope, "factor", where)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    original = {_ORIGINAL: max_positions, **rope}
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=positive(rope, "low_freq_factor", where),
        high_freq_factor=positive(rope, "high_freq_factor", where),
        original_max_positions=whole(original, _ORIGINAL, where),
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


def layer_kinds(values: Mapping[str, Any], default: Sequence[str], source: str) -> list[str]:
    """The kind of each layer: what the file lists, or ``default``."""
    kinds = values.get("layer_types")
    kinds = list(default) if kinds is None else kinds
    require(
        isinstance(kinds, list) and len(kinds) == len(default) and not set(kinds) - {LOCAL, GLOBAL},
        f"layer_types {short(kinds)}",
        f"{LOCAL} or {GLOBAL} for each of {len(default)} layers",
        where=source,
    )
    return kinds


def periodic_kinds(count: int, period: int) -> list[str]:
    """Of ``count`` layers every ``period``-th is global."""
    return [LOCAL if (layer + 1) % period else GLOBAL for layer in range(count)]


def windows(values: Mapping[str, Any], kinds: Sequence[str], source: str) -> dict[str, Any]:
    """The options of a decoder that local layers stand for; none where there are none."""
    if LOCAL not in kinds:
        return {}
    return {
        "local_layers": tuple(kind == LOCAL for kind in kinds),
        "sliding_window": whole(values, "sliding_window", source),
    }


def kinds_of(config: DecoderConfig) -> list[str]:
    """The ``layer_types`` of a decoder."""
    local = config.local_layers or (False,) * config.num_layers
    return [LOCAL if is_local else GLOBAL for is_local in local]


def check_gemma_activation(values: Mapping[str, Any], source: str) -> None:
    """Refuse another activation than that of Gemma 2 and later."""
    require(
        values["hidden_activation"] == "gelu_pytorch_tanh",
        f"hidden_activation {short(values['hidden_activation'])}",
        "gelu_pytorch_tanh, as every Gemma has",
        where=source,
    )


def whole(values: Mapping[str, Any], key: str, source: str) -> int:
    """The whole number above 0 under ``key``."""
    value: Any = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        got = "missing" if value is None else short(value)
        raise CheckpointError(f"{source}: {key} is {got}; expected a whole number above 0")
    return value


def positive(values: Mapping[str, Any], key: str, source: str) -> float:
    """The number above 0 under ``key``."""
    value: Any = values.get(key)
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0,
        f"{key} {short(value)}",
        "a number above 0",
        where=source,
    )
    return float(value)


def optional_positive(values: Mapping[str, Any], key: str, source: str) -> float:
    """Likewise; 0 where it is null or absent."""
    return 0.0 if values.get(key) is None else positive(values, key, source)


def truth(values: Mapping[str, Any], key: str, source: str) -> bool:
    """The boolean under ``key``."""
    value: Any = values.get(key)
    require(isinstance(value, bool), f"{key} {short(value)}", "true or false", where=source)
    return value


def short(value: object) -> str:
    """A value as errors show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
