"""What goes wrong with files on disk, told in one line that names the file and the remedy."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

from smoa_jax import checks

_SHOWN = 4


class CheckpointError(ValueError):
    """A checkpoint that can't be read, doesn't fit its config or must not be overwritten."""


#: ``checks.refuse`` and ``checks.require`` of this room.
refuse = functools.partial(checks.refuse, error=CheckpointError)
require = functools.partial(checks.require, error=CheckpointError)


@contextlib.contextmanager
def as_checkpoint_error(where: object = "") -> Iterator[None]:
    """Give what is refused within this room's type, and say which file it is about."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}" if where else str(error)) from error


def listed(names: Iterable[object]) -> str:
    """The first few of ``names`` and how many more there are, for error messages."""
    everything = [str(name) for name in names]
    text = ", ".join(everything[:_SHOWN])
    more = len(everything) - _SHOWN
    return f"{text} and {more} more" if more > 0 else text
