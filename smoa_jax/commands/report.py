"""Show what ledgers say, as Markdown and as one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from smoa_jax.experiments.report import write_report


def report(ledgers: Sequence[str], output: str = "") -> int:
    """Write a report; ``output`` is ``report/`` beside the first ledger unless given."""
    for page in write_report(ledgers, output or Path(ledgers[0]).parent / "report"):
        print(page)
    return 0
