"""A short identity of base weights, so that an adapter is never put on another base in silence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import jax
import numpy as np

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
        for path, leaf in sorted(walk(params)):
            flat = jax.numpy.ravel(leaf)
            count = _EDGE_BYTES // 4
            first, last = (np.asarray(part, np.float32) for part in (flat[:count], flat[-count:]))
            yield "/".join(path), leaf.shape, "float32", first.tobytes(), last.tobytes()

    return fingerprint_entries(entries())
