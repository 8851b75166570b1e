"""Where every tensor lies: one rule per path, and adapter tensors after their kernel.

A rule is a regular expression on the whole path (``layers/self_attn/q_proj/kernel``) and the mesh
axis of each dimension, or the word ``replicate``. A tensor that no rule covers, that two rules
cover, or that a rule does not divide is an error: nothing is replicated in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoa_jax.adapter.placement import modulation_shardings
from smoa_jax.adapter.tree import kernel_key
from smoa_jax.adapter.types import Params, is_modulation
from smoa_jax.sharding.mesh import AXES, BATCH_AXES

#: Path pattern -> comma-separated mesh axes, ``-`` for none, or ``replicate``.
Rules: TypeAlias = Mapping[str, str]

#: Rules for the decoder's own tree.
DECODER_RULES: Rules = {
    r"embed_tokens/embedding": "tensor, fsdp",
    r"layers/self_attn/[qkv]_proj/kernel": "-, fsdp, tensor",
    r"layers/mlp/(gate|up)_proj/kernel": "-, fsdp, tensor",
    r"layers/self_attn/o_proj/kernel": "-, tensor, fsdp",
    r"layers/mlp/down_proj/kernel": "-, tensor, fsdp",
    r"(.*/)?(norm|\w+norm)/scale": "replicate",
    r"lm_head/kernel": "fsdp, tensor",
}

_ACTIVATION_AXES = {
    "batch": BATCH_AXES,
    "time": None,
    "embed": None,
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}


def parse_rule(pattern: str, text: str) -> PartitionSpec | None:
    """The spec of a rule; None for ``replicate``.

    Raises:
        ValueError: for an unknown axis or one that is named twice.
    """
    if text.strip() == "replicate":
        return None
    names = [name.strip() for name in text.split(",")]
    axes = [None if name == "-" else tuple(name.split("+")) for name in names]
    used = [axis for group in axes if group for axis in group]
    if any(axis not in AXES for axis in used) or len(set(used)) != len(used):
        raise ValueError(
            f"got sharding rule {pattern!r}: {text!r}; expected one entry per dimension, each a "
            f"mesh axis ({', '.join(AXES)}; several joined by +) or -, no axis twice, or the word "
            "replicate"
        )
    return PartitionSpec(*(group[0] if group and len(group) == 1 else group for group in axes))


def param_shardings(params: Params, mesh: Mesh, rules: Rules = DECODER_RULES) -> Params:
    """A ``NamedSharding`` for every leaf of a (possibly abstract, possibly adapted) tree.

    Raises:
        ValueError: for a leaf that no rule or more than one covers, or that does not divide.
    """
    parsed = {pattern: parse_rule(pattern, text) for pattern, text in rules.items()}

    def spec_of(path: tuple[str, ...], leaf: Any) -> PartitionSpec:
        name = "/".join(path)
        matching = [pattern for pattern in parsed if re.fullmatch(pattern, name)]
        if len(matching) != 1:
            raise ValueError(
                f"got {len(matching)} sharding rules for {name} {tuple(leaf.shape)}"
                f"{': ' + ', '.join(matching) if matching else ''}; expected exactly one; add or "
                "narrow a rule (the word replicate keeps a tensor whole)"
            )
        spec = parsed[matching[0]]
        if spec is None:
            return PartitionSpec(*(None,) * len(leaf.shape))
        if len(spec) != len(leaf.shape):
            raise ValueError(
                f"got sharding rule {matching[0]!r} with {len(spec)} entries for {name} of shape "
                f"{tuple(leaf.shape)}; expected one entry per dimension"
            )
        _check_divides(name, leaf.shape, spec, mesh)
        return spec

    def visit(tree: Params, path: tuple[str, ...]) -> Params:
        result: Params = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                result[key] = visit(value, (*path, key))
            elif not is_modulation(value):
                result[key] = NamedSharding(mesh, spec_of((*path, key), value))
        for key, value in tree.items():
            if is_modulation(value):
                kernel = kernel_key(tree, value, ".".join(path))
                result[key] = modulation_shardings(value, result[kernel])
        return {key: result[key] for key in tree}

    return visit(params, ())


def activation_constraint(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """What the decoder calls on its activations, with the logical name of each axis."""

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = PartitionSpec(*(None if axis is None else _ACTIVATION_AXES[axis] for axis in axes))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def check_heads(num_heads: int, num_kv_heads: int, mesh: Mesh) -> None:
    """Refuse a tensor axis that would split a head.

    Raises:
        ValueError: naming the numbers.
    """
    tensor = mesh.shape["tensor"]
    if num_heads % tensor or num_kv_heads % tensor:
        raise ValueError(
            f"got tensor={tensor} for {num_heads} query and {num_kv_heads} key/value heads; "
            "expected a divisor of both; lower mesh.tensor and raise mesh.fsdp"
        )


def _check_divides(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    for size, entry in zip(shape, spec, strict=True):
        axes = (entry,) if isinstance(entry, str) else (entry or ())
        parts = 1
        for axis in axes:
            parts *= mesh.shape[axis]
        if size % parts:
            raise ValueError(
                f"got {name} of shape {tuple(shape)} over {'+'.join(axes)}={parts}; expected "
                f"{size} to be a multiple of {parts}; change the mesh, or give this path a rule"
            )
