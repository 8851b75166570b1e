"""The leaves of a state on disk: their names, what may be saved, what a restore must find.

On disk a state is flat, every leaf under its path; keys are kept as their data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Sharding

from smoa_jax import checks
from smoa_jax.checkpoint.errors import CheckpointError, listed, require

_BASE_LEAVES = ("kernel", "embedding", "bands")


def absolute(directory: str | Path) -> epath.Path:
    text = str(directory)
    return epath.Path(text if "://" in text else Path(text).expanduser().absolute())


def leaf_name(name: str) -> str | None:
    """The name among ``adapter_leaves`` of a tensor of a run's state; None for any other."""
    if name.startswith("adapter/"):
        return name.removeprefix("adapter/")
    trained = re.fullmatch(r"run/trainable/(.+)/smoa/(\w+)", name)
    return "/".join(trained.groups()) if trained else None


def flatten(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_saveable(leaves: Mapping[str, Any]) -> None:
    for name, leaf in leaves.items():
        checks.require(
            isinstance(leaf, jax.Array),
            f"{name} of type {type(leaf).__name__} in the state",
            "a jax.Array",
            "put it on devices, or plain JSON into data_position",
        )
        checks.require(
            name.rsplit("/", 1)[-1] not in _BASE_LEAVES,
            f"{name} in the state, a frozen weight",
            "what the adapter adds alone: partition(params)[0] and adapter_leaves(params)",
        )


def as_json(value: Mapping[str, Any]) -> Any:
    try:
        plain = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"got a data_position that is not plain JSON ({error}); expected strings, numbers, "
            "lists and dicts"
        ) from error
    return plain


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: jax.Array) -> dict[str, Any]:
    described: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if is_key(leaf):
        described["key_impl"] = str(jax.random.key_impl(leaf))
    return described


def key_data(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def key_data_target(target: Any) -> jax.ShapeDtypeStruct:
    data = jax.eval_shape(key_data, jax.ShapeDtypeStruct(target.shape, target.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=target.sharding)


def as_key(leaf: jax.Array, described: Mapping[str, Any]) -> jax.Array:
    impl = described.get("key_impl")
    return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)


def check_targets(where: str, targets: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    for name, target in targets.items():
        checks.require(
            isinstance(getattr(target, "sharding", None), Sharding),
            f"an abstract {name} without a sharding",
            "one on every leaf",
            "make the abstract state with jax.ShapeDtypeStruct(shape, dtype, sharding=...)",
        )
    missing = [name for name in targets if name not in tensors]
    surplus = [name for name in tensors if name not in targets]
    if missing or surplus:
        parts = [f"lacks {listed(missing)}"] if missing else []
        parts += [f"holds {listed(surplus)}, which this run doesn't have"] if surplus else []
        raise CheckpointError(
            f"{where} {' and '.join(parts)}; expected the state of this run; resume with the "
            "configuration that it was saved with"
        )
    for name, target in targets.items():
        got = (tuple(tensors[name]["shape"]), tensors[name]["dtype"])
        expected = (tuple(target.shape), str(target.dtype))
        require(
            got == expected,
            f"{name} as {got[1]}{list(got[0])}",
            f"{expected[1]}{list(expected[0])}",
            "resume with the configuration that it was saved with",
            where=where,
        )


def check_restored(where: str, name: str, leaf: Any, target: Any) -> None:
    if (
        not isinstance(leaf, jax.Array)
        or leaf.shape != target.shape
        or leaf.dtype != target.dtype
        or not leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
    ):
        got = getattr(leaf, "sharding", type(leaf).__name__)
        raise CheckpointError(
            f"{where}: {name} came back as {getattr(leaf, 'dtype', '')}"
            f"{list(getattr(leaf, 'shape', ()))} on {got}; expected {target.dtype}"
            f"{list(target.shape)} on {target.sharding}"
        )


def differences(got: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Every field that differs, as "name=value, expected value"."""
    pairs = {"base_fingerprint": (got["base_fingerprint"], expected["base_fingerprint"])}
    stored, ours = got["adapter_config"], expected["adapter_config"]
    for field in {**stored, **ours}:
        pairs[field] = (stored.get(field, "nothing"), ours.get(field, "nothing"))
    return [f"{name}={a!r}, expected {b!r}" for name, (a, b) in pairs.items() if a != b]
