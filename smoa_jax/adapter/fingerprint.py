"""A short identity of base weights, so that an adapter is never put on another base in silence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from smoa_jax.adapter.planning.exchange import gather_region
from smoa_jax.adapter.targets import walk
from smoa_jax.adapter.types import Params

_EDGE_BYTES = 4096


def fingerprint_entries(entries: Iterable[tuple[str, tuple[int, ...], str, bytes, bytes]]) -> str:
    """SHA-256 over (name, shape, dtype, first and last 4 KiB) of tensors, in the order given."""
    digest = hashlib.sha256()
    for name, shape, dtype, first, last in entries:
        digest.update(f"{name}\0{tuple(shape)}\0{dtype}\0".encode())
        digest.update(first[:_EDGE_BYTES])
        digest.update(last[-_EDGE_BYTES:])
    return digest.hexdigest()


def tree_fingerprint(params: Params) -> str:
    """Fingerprint of a tree in memory: over its leaves as float32, by path.

    Independent of compute dtype where casting is exact, and of sharding. Only the edges of each
    tensor leave its device.
    """

    def entries():
        for path, leaf in sorted(walk(params), key=lambda entry: entry[0]):
            first, last = (_edge(leaf, last=last).tobytes() for last in (False, True))
            yield "/".join(path), leaf.shape, "float32", first, last

    return fingerprint_entries(entries())


def _edge(leaf: Any, *, last: bool) -> np.ndarray:
    """The first or last values of an array in row-major order, as float32.

    Cut out of the axes before anything is flattened: whole rows alone leave their devices.
    """
    count = min(_EDGE_BYTES // 4, leaf.size)
    bounds, rest = [], leaf.size
    for size in leaf.shape:
        rest //= max(size, 1)  # values of one entry of this axis
        needed = min(-(-count // max(rest, 1)), size)
        bounds.append((size - needed, size) if last else (0, needed))
    values = gather_region(leaf, bounds).astype(np.float32).reshape(-1)
    return values[values.size - count :] if last else values[:count]
