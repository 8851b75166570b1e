"""The ledger of an experiment: one JSON object a line, one line a run that is done.

Beside the run (method, rate, seed and the whole configuration) a line has what it trained, its
seconds, the losses of its steps, its scores on test and validation rows (``right`` has a digit for
each test question, for paired comparisons), the loss of unrelated text, and the environment.
``seconds_per_step`` is of ``runs_at_once`` runs side by side, ``step_memory_bytes`` likewise.

A line is written by a single append, so that a run is in the ledger whole or not at all. What a
killed process left of one is passed over when the ledger is read, and ended before the next.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoa_jax.checks import require

LEDGER_FILE = "ledger.jsonl"


def identity_of(settings: Mapping[str, Any]) -> str:
    """What tells a run from every other: a digest of all that decides its numbers."""
    text = json.dumps(settings, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ledger in their order, each run's last; [] if there is no file.

    Raises:
        ValueError: for a file that holds lines and no row of a ledger.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "run" in row:
            rows[row["run"]] = row
    require(
        bool(rows) or len(lines) <= 1,
        f"{len(lines)} lines without a run",
        "a ledger of smoa experiment",
        where=path,
    )
    return list(rows.values())


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add a row, whole or not at all, and see that it is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(_finite(row), allow_nan=False) + "\n").encode()
    with open(path, "ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # of a process that was killed while it wrote
                line = b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """NaN is not JSON: null stands for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
