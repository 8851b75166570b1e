"""What several commands show alike."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from smoa_jax.training.run import Summary

#: Where commands print.
console = Console(highlight=False)


def summary_table(summary: Summary) -> Table:
    """Trainable share, loss and accuracy before and after."""
    table = Table(title=f"{summary.steps} steps in {summary.seconds:.0f} s")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    share = summary.trainable / summary.total
    table.add_row("trained parameters", "", f"{summary.trainable:,} ({share:.2%} of the base)")
    table.add_row("held-out loss", shown(summary.loss_before), shown(summary.loss_after))
    if summary.scored_rows:
        table.add_row(
            f"accuracy on {summary.scored_rows} held-out rows, free generation",
            shown(summary.accuracy_before, "{:.1%}"),
            shown(summary.accuracy_after, "{:.1%}"),
        )
    if summary.skipped:
        table.add_row("steps skipped (not finite)", "", str(summary.skipped))
    return table


def shown(value: float, form: str = "{:.4f}") -> str:
    return form.format(value) if math.isfinite(value) else "-"
