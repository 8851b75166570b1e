"""What goes wrong with files on disk, told in one line that names the file and the remedy."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 4


class CheckpointError(ValueError):
    """A checkpoint that can't be read, doesn't fit its config or must not be overwritten."""


def listed(names: Iterable[object]) -> str:
    """The first few of ``names`` and how many more there are, for error messages."""
    everything = [str(name) for name in names]
    text = ", ".join(everything[:_SHOWN])
    more = len(everything) - _SHOWN
    return f"{text} and {more} more" if more > 0 else text
