"""Output directories that hold everything or nothing, whenever the process is killed.

In a bucket nothing can be renamed: there a directory is filled file by file, and is one of its kind
from the moment on that its marker, which goes up last, is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smoa_jax.checkpoint.errors import require
from smoa_jax.storage import (
    check_writable,
    explained,
    filesystem,
    is_remote,
    located,
    upload,
)

#: Of Linux's renameat2: paths as they are, and both at once.
_HERE, _RENAME_EXCHANGE = -100, 2


def check_target(
    target: Path,
    *,
    marker: str,
    what: str,
    overwrite: bool,
    inputs: Iterable[str | Path] = (),
) -> bool:
    """Refuse an output directory before any work is done for it; True if it will be replaced.

    Args:
        target: The directory to be made.
        marker: The file that tells such a directory from any other; without it an occupied
            directory is never replaced.
        what: What the directory holds, for messages: "an adapter".
        overwrite: Whether to replace one.
        inputs: What the work reads: never replaced, whatever ``overwrite`` says.

    Raises:
        CheckpointError: if the directory is occupied.
    """
    target = _absolute(target)
    put_back(target)
    with explained(target):
        occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if not occupied:
        if is_remote(target):  # what can't be written there shall not show after hours
            check_writable(target)
        return False
    check_apart(target, inputs)
    require(
        overwrite,
        "a directory that already exists and isn't empty",
        "a new one",
        f"choose another, or say overwrite (--overwrite) to replace {what} in it",
        where=target,
    )
    require(
        (target / marker).is_file(),
        f"a directory without {marker}, so it isn't {what}",
        "one to overwrite",
        "choose another directory or empty this one yourself",
        where=target,
    )
    return True


def put_back(target: Path) -> None:
    """Undo a replacement that a kill cut short between its two renames.

    Only where directories cannot be exchanged at once are there two. What stood at ``target`` then
    lies beside it, whole, under a hidden name. Readers and writers call this before they look;
    where nothing was cut short, or it can't be told what stood there, it does nothing.
    """
    if is_remote(target):
        return
    target = target.expanduser().absolute()
    if target.exists():
        return
    aside = _set_aside(target)
    if len(aside) == 1:
        with contextlib.suppress(OSError):  # another process was faster, or may do it alone
            aside[0].rename(target)


def _absolute(target: str | Path) -> Path:
    path = located(target)
    return path if is_remote(path) else path.absolute()


def _set_aside(target: Path) -> list[Path]:
    """What replacements of ``target`` that were cut short have left beside it."""
    return list(target.parent.glob(f".{glob.escape(target.name)}.old-*"))


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two directories at once; False where the system or the file system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_HERE, os.fsencode(left), _HERE, os.fsencode(right), _RENAME_EXCHANGE) == 0


def check_apart(target: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse a directory to be replaced that is, or holds, something that is still read.

    Raises:
        CheckpointError: naming both.
    """
    for source in inputs:
        if is_remote(source) or is_remote(target):
            apart = not f"{source}/".startswith(f"{str(target).rstrip('/')}/")
        else:
            read, written = Path(source).expanduser(), target.expanduser()
            apart = not read.resolve().is_relative_to(written.resolve())
        require(
            apart,
            f"{target} as the directory to write, and to read {source}, which it would replace",
            "them apart: choose another directory",
        )


def _let_read(directory: Path) -> None:
    """Give files the rights that the process gives to new ones; some libraries give none away."""
    rights = directory.stat().st_mode & 0o666  # of a directory just made: what umask lets through
    for file in directory.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | rights)


@contextmanager
def replaced_directory(target: Path, *, marker: str, what: str, overwrite: bool) -> Iterator[Path]:
    """A draft directory beside ``target`` that takes its place if all goes well.

    Killed at any moment, the old directory or the new one can be had: at ``target``, or, between
    the two renames of a replacement, by ``put_back``. For a bucket the draft is made on this
    machine and goes up at the end; while one there is replaced, it has no marker.

    Args:
        target: Made, with its parents; refused if it holds anything, unless ``overwrite``.
        marker: As for ``check_target``.
        what: Likewise.
        overwrite: Likewise.

    Raises:
        CheckpointError: if the directory is occupied.
    """
    target = _absolute(target)
    occupied = check_target(target, marker=marker, what=what, overwrite=overwrite)
    if is_remote(target):
        with tempfile.TemporaryDirectory(prefix="smoa-upload-") as folder:
            yield Path(folder)
            _replace_in_bucket(Path(folder), target, marker)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    draft = target.with_name(f".{target.name}.draft-{mark}")
    old = target.with_name(f".{target.name}.old-{mark}")
    for leftover in _set_aside(target) if occupied else ():
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        _let_read(draft)
        if occupied and _exchange(draft, target):
            old = draft  # which now holds what is replaced
        else:
            if occupied:
                target.rename(old)
            draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replace_in_bucket(draft: Path, target: Path, marker: str) -> None:
    """Put ``draft`` in the place of what ``target`` holds, marker last."""
    with explained(target):
        (target / marker).unlink(missing_ok=True)
        files = filesystem(target)
        root = files._strip_protocol(str(target))
        for name in files.find(root):
            if not (draft / name[len(root) :].lstrip("/")).is_file():
                files.rm_file(name)
        upload(draft, target, last=marker)
