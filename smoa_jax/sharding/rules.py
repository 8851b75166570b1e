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

from smoa_jax.adapter.placement import (
    HeadSharding,
    MatmulSharding,
    ProductShardings,
    modulation_shardings,
    num_parts,
)
from smoa_jax.adapter.targets import KERNEL_KEY, lookup, walk
from smoa_jax.adapter.tree import kernel_key
from smoa_jax.adapter.types import Params, is_modulation
from smoa_jax.checks import require
from smoa_jax.sharding.mesh import AXES, BATCH_AXES

#: Path pattern -> comma-separated mesh axes, ``-`` for none, or ``replicate``.
Rules: TypeAlias = Mapping[str, str]

#: Rules for the decoder's own tree.
DECODER_RULES: Rules = {
    r"embed_tokens/embedding": "tensor, fsdp",
    r"layers/(\w+/)?self_attn/[qkv]_proj/kernel": "-, fsdp, tensor",
    r"layers/(\w+/)?mlp/(gate|up)_proj/kernel": "-, fsdp, tensor",
    r"layers/(\w+/)?self_attn/o_proj/kernel": "-, tensor, fsdp",
    r"layers/(\w+/)?mlp/down_proj/kernel": "-, tensor, fsdp",
    r"layers/self_attn/[qkv]_proj/bias": "-, tensor",
    r"layers/mlp/(gate|up)_proj/bias": "-, tensor",
    r"layers/(self_attn/o|mlp/down)_proj/bias": "-, fsdp",
    r"layers/(\w+/)?per_layer_input_gate/kernel": "-, fsdp, tensor",
    r"layers/(\w+/)?per_layer_projection/kernel": "-, tensor, fsdp",
    r"layers/(\w+/)?layer_scalar": "replicate",
    r"embed_tokens_per_layer/embedding": "tensor, fsdp",
    r"per_layer_model_projection/kernel": "fsdp, tensor",
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
    require(
        set(used) <= set(AXES) and len(set(used)) == len(used),
        f"sharding rule {pattern!r}: {text!r}",
        f"one entry per dimension, each a mesh axis ({', '.join(AXES)}; several joined by +) or "
        "-, no axis twice, or the word replicate",
    )
    return PartitionSpec(*(group[0] if group and len(group) == 1 else group for group in axes))


def param_shardings(params: Params, mesh: Mesh, rules: Rules = DECODER_RULES) -> Params:
    """A ``NamedSharding`` for every leaf of a (possibly abstract, possibly adapted) tree.

    Raises:
        ValueError: for a leaf that no rule or more than one covers, or that does not divide.
    """
    parsed = {pattern: parse_rule(pattern, text) for pattern, text in rules.items()}

    def sharding(path: tuple[str, ...], leaf: Any) -> NamedSharding:
        name, shape = "/".join(path), tuple(leaf.shape)
        matching = [pattern for pattern in parsed if re.fullmatch(pattern, name)]
        _check_rule(name, shape, matching, parsed)
        spec = parsed[matching[0]] or PartitionSpec(*(None,) * len(shape))
        _check_divides(name, shape, spec, mesh)
        return NamedSharding(mesh, spec)

    def place(path: Any, leaf: Any) -> Any:
        keys = tuple(key.key for key in path)
        if not is_modulation(leaf):
            return sharding(keys, leaf)
        module = lookup(params, keys[:-1])
        kernel = kernel_key(module, leaf, ".".join(keys[:-1]))
        return modulation_shardings(leaf, sharding((*keys[:-1], kernel), module[kernel]))

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=is_modulation)


def product_shardings(params: Params, mesh: Mesh, rules: Rules = DECODER_RULES) -> ProductShardings:
    """Where the operands of the layers' products lie, from the rules of their kernels.

    A product's rows are divided over the batch axes, so a kernel is whole over those when it meets
    them; over what remains (``tensor``) its inputs and outputs, and x's and y's last axes, stay
    divided. A name that different rules give different axes is left to the compiler.

    Args:
        params: Of the base, abstract or not; layers' kernels are ``(L, I, O)``.
        mesh: The device mesh.
        rules: As ``param_shardings`` takes them.
    """
    if mesh.size == 1:
        return ProductShardings()
    found: dict[str, set[MatmulSharding]] = {}
    for path, sharding in walk(param_shardings(params, mesh, rules)):
        if path[-1] == KERNEL_KEY and len(lookup(params, path).shape) == 3:
            inputs, outputs = (_divided(axes, mesh) for axes in sharding.spec[1:])
            where = MatmulSharding(
                mesh,
                batch=_divided(BATCH_AXES, mesh),
                inputs=tuple(axis for axis in inputs if axis not in BATCH_AXES),
                outputs=tuple(axis for axis in outputs if axis not in BATCH_AXES),
            )
            found.setdefault(path[-2], set()).add(where)
    agreed = {name: next(iter(ways)) for name, ways in found.items() if len(ways) == 1}
    return ProductShardings(tuple(sorted(agreed.items(), key=lambda item: item[0])))


def head_sharding(params: Params, mesh: Mesh, rules: Rules = DECODER_RULES) -> HeadSharding | None:
    """Where the head lies, from the rule of its kernel, or of the embedding that it is tied to.

    None on one device.

    Args:
        params: Adapted or not, abstract or not.
        mesh: The device mesh.
        rules: As ``param_shardings`` takes them.
    """
    if mesh.size == 1:
        return None
    path = ("lm_head", KERNEL_KEY) if "lm_head" in params else ("embed_tokens", "embedding")
    of_head = {path[0]: {path[1]: lookup(params, path)}}
    spec = lookup(param_shardings(of_head, mesh, rules), path).spec
    inputs, outputs = spec if path[1] == KERNEL_KEY else spec[::-1]
    return HeadSharding(
        mesh,
        batch=_divided(BATCH_AXES, mesh),
        inputs=_divided(inputs, mesh),
        outputs=_divided(outputs, mesh),
    )


def _divided(axes: str | tuple[str, ...] | None, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that do divide one dimension: a sum over one device would still be sent."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(name for name in names if mesh.shape[name] > 1)


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
    require(
        num_heads % tensor == 0 and num_kv_heads % tensor == 0,
        f"tensor={tensor} for {num_heads} query and {num_kv_heads} key/value heads",
        "a divisor of both",
        "lower mesh.tensor and raise mesh.fsdp",
    )


def _check_rule(
    name: str,
    shape: tuple[int, ...],
    matching: list[str],
    parsed: Mapping[str, PartitionSpec | None],
) -> None:
    """Refuse a leaf without a rule, with two, or with one for another number of axes."""
    require(
        len(matching) == 1,
        f"{len(matching)} sharding rules for {name} {shape}"
        f"{': ' + ', '.join(matching) if matching else ''}",
        "exactly one",
        "add or narrow a rule (the word replicate keeps a tensor whole)",
    )
    spec = parsed[matching[0]]
    require(
        spec is None or len(spec) == len(shape),
        f"sharding rule {matching[0]!r} with {len(spec or ())} entries for {name} of shape {shape}",
        "one entry per dimension",
    )


def _check_divides(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    """Refuse a leaf whose axes the mesh does not divide."""
    for size, entry in zip(shape, spec, strict=True):
        axes = (entry,) if isinstance(entry, str) else (entry or ())
        parts = num_parts(mesh, axes)
        require(
            size % parts == 0,
            f"{name} of shape {shape} over {'+'.join(axes)}={parts}",
            f"{size} to be a multiple of {parts}",
            "change the mesh, or give this path a rule",
        )
