"""Which data a run reads, so that it is never resumed on other data in silence.

What is compared is what is trained on and scored: tokens, masks and their order. The files are
hashed besides, so that a difference can be told by its cause; a file that was moved, or that
changed beyond the rows that are used, makes none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smoa_jax.data.encode import Examples

#: Begins a digest, so that another layout of the same bytes would never pass for this one.
_LAYOUT = b"smoa_jax examples 1"


def data_identity(
    train: Examples, held_out: Examples | None, files: Iterable[str | Path]
) -> dict[str, Any]:
    """Digests of the examples and of the files that they come from, as plain JSON."""
    return {
        "train": examples_digest(train),
        "held_out": "" if held_out is None else examples_digest(held_out),
        "files": [[str(path), _file_digest(Path(path))] for path in files],
    }


def examples_digest(examples: Examples) -> str:
    """SHA-256 of tokens, trained flags and row boundaries, in order."""
    digest = hashlib.sha256(_LAYOUT)
    for array, dtype in (
        (examples.offsets, "<i8"),
        (examples.tokens, "<i4"),
        (examples.trained, "u1"),
    ):
        digest.update(np.ascontiguousarray(array, dtype).data)
    return digest.hexdigest()


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other rows than a run began with.

    Args:
        before: ``data_identity`` as the run saved it.
        now: Of the data that it is about to read.

    Raises:
        ValueError: saying which rows differ and, where a file is the cause, which.
    """
    names = {"train": "training rows", "held_out": "held-out rows"}
    different = [words for name, words in names.items() if before[name] != now[name]]
    if not different:
        return
    known = {digest for _, digest in before["files"]}
    changed = [path for path, digest in now["files"] if digest not in known]
    gone = len(before["files"]) - len(now["files"])
    if changed:
        cause = f"{', '.join(changed)} changed since"
    elif gone:
        cause = f"it read {len(before['files'])} files then, and {len(now['files'])} now"
    elif now["files"]:
        cause = "the files are the same, so the tokenizer or a setting in data changed"
    else:
        cause = "the tokenizer or a setting in data changed"
    raise ValueError(
        f"got other {' and '.join(different)} than the run began with ({cause}); expected the same "
        "ones; resume with the data that it was started with, or start a new run"
    )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
