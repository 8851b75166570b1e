"""Device memory: what weights take of it, and one line for people when there is too little."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import jax


class OutOfMemoryError(ValueError):
    """The devices have less memory than a program needs, in one line that says what to lower."""


@contextlib.contextmanager
def exhaustion_explained(remedy: str) -> Iterator[None]:
    """Turns XLA's pages about an exhausted device into one line.

    >>> with exhaustion_explained("lower batch_size"):
    ...     state = step(state, batch)

    Args:
        remedy: What to do about it, with the settings' names and values.

    Raises:
        OutOfMemoryError: in place of XLA's error; any other error passes.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        asked = re.search(r"(?:allocate|allocating) ([\d.]+\s?(?:[KMGT]?i?B|bytes))", text)
        wanted = f" (asked for another {asked.group(1)})" if asked else ""
        kind = jax.devices()[0].device_kind
        raise OutOfMemoryError(
            f"got too little memory on {kind}{wanted}; expected the program to fit; {remedy}"
        ) from error


def total_bytes(tree: Any) -> int:
    """What the arrays of ``tree`` take together, abstract ones too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Any) -> int:
    """What the arrays of ``tree`` take on the device that holds the most of each."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
