"""Spectra that are kept between runs: one file per layer, found by the content of its weights.

An entry says which weights it belongs to, so that neither a damaged file nor one that was put in
the place of another is ever believed: it is computed again, with a warning. Processes may share a
directory, since an entry appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smoa_jax.storage import StorageError, cache_dir, explained, is_remote, located

_VERSION = 2
_WEIGHTS = "weights"


def default_cache_dir() -> Path | None:
    """The user's own cache directory for spectra, or None where it is switched off.

    ``SMOA_JAX_CACHE`` names another, or says ``off``; else it is ``smoa_jax/`` in
    ``XDG_CACHE_HOME`` or in the system's usual place.
    """
    named = os.environ.get("SMOA_JAX_CACHE", "")
    return located(named) if is_remote(named) else cache_dir()


class CacheEntry:
    """The place in a cache of what is planned for one (I, O) weight.

    Args:
        directory: Of the cache.
        matrix: The weight.
        kind: What is planned for it, as its ``repr`` tells it apart.
        like: The arrays of a result.
        name: Of the layer, for warnings.
    """

    def __init__(
        self,
        directory: Path,
        matrix: np.ndarray,
        kind: tuple[Any, ...],
        like: Mapping[str, jax.ShapeDtypeStruct],
        name: str,
    ):
        digest = hashlib.sha256(repr((_VERSION, *kind, str(matrix.dtype), matrix.shape)).encode())
        digest.update(np.ascontiguousarray(matrix).view(np.uint8).data)
        self._digest = digest.hexdigest()
        self._path = directory / f"{self._digest[:40]}.npz"
        self._like, self._name = like, name

    def read(self) -> dict[str, np.ndarray] | None:
        """The result, or None if there is none that can be used."""
        try:
            if not self._path.exists():
                return None
            with np.load(self._readable(), allow_pickle=False) as stored:
                if str(stored[_WEIGHTS]) != self._digest:
                    raise ValueError("it belongs to another base")
                found = {key: stored[key].view(struct.dtype) for key, struct in self._like.items()}
            if any(found[key].shape != struct.shape for key, struct in self._like.items()):
                raise ValueError(f"shapes {[value.shape for value in found.values()]}")
            return found
        except Exception as error:  # zip, zlib, key and value errors alike mean: not usable
            warnings.warn(
                f"the cached spectrum of {self._name} in {self._path} cannot be used ({error}); "
                "it is computed again",
                stacklevel=2,
            )
            return None

    def write(self, result: Mapping[str, np.ndarray]) -> None:
        """Keep ``result``, in the place of whatever was there; a warning where that can't be."""
        named: Any = {_WEIGHTS: np.str_(self._digest), **result}
        if is_remote(self._path):
            self._upload(named)
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.{id(result)}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, **named)
            os.replace(temporary, self._path)
        except OSError as error:  # a full disk or a home that is read-only stops no run
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._warn(error)

    def _readable(self) -> Any:
        """What NumPy can read at any place; an object of a bucket, which is small, as a whole."""
        return io.BytesIO(self._path.read_bytes()) if is_remote(self._path) else self._path

    def _upload(self, named: Mapping[str, Any]) -> None:
        """Into a bucket, where an object appears whole or not at all."""
        content: Any = io.BytesIO()
        np.savez(content, **named)
        try:
            with explained(self._path):
                self._path.write_bytes(content.getvalue())
        except StorageError as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        warnings.warn(
            f"the spectrum of {self._name} cannot be kept in {self._path.parent} ({error}); it "
            "is used all the same; SMOA_JAX_CACHE names another directory, or says off",
            stacklevel=3,
        )
