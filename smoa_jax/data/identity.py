"""What the data of a run was, small enough to be saved with every position in it.

A position is a number of rows, and rows of other data have numbers too: a run would go on in
silence on data it never began with. So the data's *identity* is saved with it, as plain JSON::

    {
        "train": digest, "eval": digest,                # of the encoded rows; "" for none
        "train_files": [[name, sha256], ...], "eval_files": ...,
        "settings": {"template": "alpaca", "max_length": 256, ...},
    }

The two digests alone decide whether it is the same data: whatever leads to the same tokens, in the
same order, trained at the same places, is (a file that was moved, a limit that cuts nothing). Files
and settings are there to say *why* a digest is another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from smoa_jax.checks import require
from smoa_jax.data.encode import Examples
from smoa_jax.storage import local_copy

#: JSON-serialisable; see above.
Identity: TypeAlias = dict[str, Any]

_SPLITS = {"train": "rows to train on", "eval": "held-out rows"}
_REMEDY = "or start a new run in another train.output_dir"


def data_identity(
    train: Examples,
    held_out: Examples | None = None,
    *,
    references: Sequence[str] = (),
    train_files: Sequence[str] = (),
    eval_files: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    digests: Mapping[str, str] | None = None,
) -> Identity:
    """The identity of encoded rows.

    Args:
        train: What is trained on.
        held_out: What losses are measured on.
        references: What generated answers are compared with; they belong to the held-out rows.
        train_files: What the rows were read from.
        eval_files: What the held-out rows were read from, where they have files of their own.
        settings: What else decides about the rows, by its name in the configuration.
        digests: SHA-256 of files that have been read already, by name.
    """
    known = digests or {}
    plain = json.loads(json.dumps(dict(settings or {}), default=str))
    return {
        "train": _digest(train),
        "eval": "" if held_out is None else _digest(held_out, references),
        "train_files": [[name, known.get(name) or _file_digest(name)] for name in train_files],
        "eval_files": [[name, known.get(name) or _file_digest(name)] for name in eval_files],
        "settings": plain,
    }


def streamed_digest(first: Identity, records: Any) -> str:
    """What stands for the digest of rows that are never known whole.

    Args:
        first: The identity with the first rows alone; their tokens tell of tokenizer and template.
        records: On disk; a data set of the hub has a fingerprint of its own.
    """
    parts = [
        first["train"],
        [digest for _, digest in first["train_files"]],
        getattr(records, "fingerprint", ""),
        len(records),
        {name: first["settings"].get(name) for name in ("train_limit", "on_bad_row", "eval_limit")},
        first["eval"],  # training rows whose question is held out are left out
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_identity(saved: Identity, now: Identity) -> None:
    """Refuses data that are others than those of ``saved``, naming what has changed.

    Raises:
        ValueError: Rows to train on or held-out rows differ; the message says which file changed
            or, where none did, which setting.
    """
    other = [words for split, words in _SPLITS.items() if saved.get(split) != now[split]]
    if not other:
        return
    rows = " and ".join(other)
    require(
        not (files := "; ".join(_changed_files(saved, now))),
        f"other {rows} than when the run began",
        "the same",
        f"put the files back as they were, {_REMEDY}",
        where=files,
    )
    source = "the same files" if now["train_files"] else "the same generator"
    require(
        not (settings := changed_settings(saved, now)),
        f"other {rows} than when the run began, from {source} by other settings: {settings}",
        "the run's settings",
        f"set them back, {_REMEDY}",
    )
    raise ValueError(
        f"got other {rows} than when the run began, from {source} by the same settings; expected "
        f"the same tokens; use the tokenizer and chat template of the run, {_REMEDY}"
    )


def changed_settings(saved: Identity, now: Identity) -> str:
    """The settings that differ, such as ``"data.max_length is 64 and was 256"``."""
    before, after = saved.get("settings", {}), now["settings"]
    return ", ".join(
        f"data.{name} is {after.get(name, 'unset')} and was {before.get(name, 'unset')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    )


def _changed_files(saved: Identity, now: Identity) -> Iterator[str]:
    """What happened to each file whose content is not what it was; a new name alone is nothing."""
    for split in ("train_files", "eval_files"):
        before, after = saved.get(split, []), now[split]
        contents = [[digest for _, digest in files] for files in (before, after)]
        if contents[0] == contents[1]:
            continue
        digests = dict(before)
        changes = []
        for name, digest in after:
            if digest in contents[0]:
                continue
            if name in digests:
                was = f"SHA-256 {digest[:12]}, was {digests[name][:12]}"
                changes.append(f"{name} changed since the run began ({was})")
            else:
                changes.append(f"{name} was not among data.{split} (SHA-256 {digest[:12]})")
        names = {name for name, _ in after}
        for name, digest in before:
            if digest not in contents[1] and name not in names:
                changes.append(f"{name} is gone from data.{split} (SHA-256 was {digest[:12]})")
        yield from changes or [f"{', '.join(name for name, _ in after)} in another order or number"]


def _digest(examples: Examples, texts: Sequence[str] = ()) -> str:
    """SHA-256 of tokens, trained flags and offsets, and of ``texts``."""
    digest = hashlib.sha256()
    parts = (
        np.ascontiguousarray(examples.tokens, "<i4"),
        np.ascontiguousarray(examples.trained, "u1"),
        np.ascontiguousarray(examples.offsets, "<i8"),
        np.frombuffer(json.dumps(list(texts)).encode(), "u1"),
    )
    for part in parts:
        digest.update(f"{part.size};".encode())
        digest.update(part.data)
    return digest.hexdigest()


def _file_digest(name: str) -> str:
    with local_copy(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
