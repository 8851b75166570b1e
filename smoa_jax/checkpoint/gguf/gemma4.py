"""What a GGUF file says of a Gemma 4: sizes that differ by layer are lists in its metadata.

llama.cpp's converter gives the head sizes of global layers the plain keys and those of local ones
keys of their own (``..._swa``), writes which pairs of a head turn as a tensor of divisors (1, or
1e30 for those that stand still), and leaves the values' projection of a global layer out where keys
are values, too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from smoa_jax.checkpoint.errors import require
from smoa_jax.checkpoint.huggingface.fields import GLOBAL, LOCAL, short

if TYPE_CHECKING:
    from smoa_jax.checkpoint.gguf.config import GgufMetadata

_STANDS_STILL = 1e20  # a divisor above it


def gemma4_config(
    metadata: GgufMetadata, rope_factors: np.ndarray | None, names: Collection[str]
) -> dict[str, Any]:
    """The fields of ``config.json`` by which a Gemma 4 differs from other families.

    Args:
        metadata: Of the file.
        rope_factors: The tensor of divisors of the rotary frequencies, if there is one.
        names: Of all tensors, in Hugging Face's words.
    """
    count = metadata.integer("block_count")
    local = [bool(entry) for entry in _by_layer(metadata, "attention.sliding_window_pattern")]
    shared = metadata.own("attention.shared_kv_layers", 0)
    widths = _by_layer(metadata, "feed_forward_length")
    narrow = widths[0]
    doubled = shared > 0 and widths[-1] == 2 * narrow
    expected = [narrow * (1 + (doubled and layer >= count - shared)) for layer in range(count)]
    require(
        widths == expected,
        f"feed_forward_length {short(widths)}",
        f"one width, or twice as much in the last {shared} layers",
        where=metadata.source,
    )
    kv_heads = _by_kind(metadata, "attention.head_count_kv", local)
    own = range(count - shared)
    projections = {layer: f"model.layers.{layer}.self_attn.v_proj.weight" for layer in own}
    keys_are_values = any(not local[layer] and projections[layer] not in names for layer in own)
    head_dim = metadata.integer("attention.key_length_swa")
    rope = {"rope_type": "default", "rope_theta": metadata.real("rope.freq_base_swa", 1e4)}
    return {
        "intermediate_size": narrow,
        "use_double_wide_mlp": doubled,
        "num_key_value_heads": kv_heads[LOCAL],
        "num_global_key_value_heads": kv_heads[GLOBAL] if keys_are_values else None,
        "attention_k_eq_v": keys_are_values,
        "head_dim": head_dim,
        "global_head_dim": metadata.integer("attention.key_length"),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": metadata.own("embedding_length_per_layer_input", 0),
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [LOCAL if is_local else GLOBAL for is_local in local],
        "sliding_window": metadata.integer("attention.sliding_window"),
        "final_logit_softcapping": metadata.own("final_logit_softcapping") or None,
        "rope_parameters": {
            LOCAL: rope,
            GLOBAL: {
                "rope_type": "proportional",
                "partial_rotary_factor": _turning_share(metadata, rope_factors),
                "rope_theta": metadata.real("rope.freq_base", 1e6),
            },
        },
    }


def _by_layer(metadata: GgufMetadata, key: str) -> list[Any]:
    """One value a layer, of a list or of one number for all."""
    count, value = metadata.integer("block_count"), metadata.own(key)
    values = list(value) if isinstance(value, list) else [value] * count
    require(
        len(values) == count and None not in values,
        f"metadata gemma4.{key} {short(value)}",
        f"a value for each of {count} layers",
        where=metadata.source,
    )
    return values


def _by_kind(metadata: GgufMetadata, key: str, local: list[bool]) -> dict[str, int]:
    """The value of local and of global layers."""
    found: dict[str, set[int]] = {LOCAL: set(), GLOBAL: set()}
    for value, is_local in zip(_by_layer(metadata, key), local, strict=True):
        found[LOCAL if is_local else GLOBAL].add(int(value))
    require(
        all(len(values) <= 1 for values in found.values()),
        f"metadata gemma4.{key} {short(metadata.own(key))}",
        "one number for local layers and one for global ones",
        where=metadata.source,
    )
    known = [value for values in found.values() for value in values]
    return {kind: next(iter(values), known[0]) for kind, values in found.items()}


def _turning_share(metadata: GgufMetadata, factors: np.ndarray | None) -> float:
    if factors is None:
        return 1.0
    turning = factors < _STANDS_STILL
    count = int(turning.sum())
    require(
        bool(np.all(turning == (np.arange(len(factors)) < count)))
        and bool(np.all(factors[:count] == 1))
        and 2 * len(factors) == metadata.integer("attention.key_length"),
        "rope_freqs.weight with other factors than a Gemma 4's",
        "1 for the first pairs of a head and a huge number for the others",
        "use the safetensors of this model",
        where=metadata.source,
    )
    return count / len(factors)
