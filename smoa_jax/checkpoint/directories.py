"""Output directories that hold everything or nothing, whenever the process is killed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smoa_jax.checkpoint.errors import CheckpointError


@contextmanager
def replaced_directory(target: Path, *, marker: str, what: str, overwrite: bool) -> Iterator[Path]:
    """A draft directory beside ``target`` that takes its place if all goes well.

    Args:
        target: Made, with its parents; refused if it holds anything, unless ``overwrite``.
        marker: The file that tells such a directory from any other; without it an occupied
            directory is never replaced.
        what: What the directory holds, for messages: "an adapter".
        overwrite: Whether to replace one.

    Raises:
        CheckpointError: if the directory is occupied.
    """
    target = target.expanduser().absolute()
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise CheckpointError(
            f"{target} already exists and isn't empty; expected a new directory: choose another, "
            f"or say overwrite to replace {what} in it"
        )
    if occupied and not (target / marker).is_file():
        raise CheckpointError(
            f"{target} holds no {marker}, so it isn't {what}; expected one to overwrite: choose "
            "another directory or empty this one yourself"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    draft = target.with_name(f".{target.name}.draft-{mark}")
    old = target.with_name(f".{target.name}.old-{mark}")
    draft.mkdir()
    try:
        yield draft
        if occupied:
            target.rename(old)
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
