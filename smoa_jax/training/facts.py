"""What a README says of the training behind an adapter, by name: data, settings, losses.

A run writes what is known when it starts into its metrics. The rest depends on the step that the
adapter is of, so an adapter of any checkpoint has its own, long after the run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from smoa_jax.data.build import Data
from smoa_jax.training.checks import describe_data
from smoa_jax.training.config import RunConfig
from smoa_jax.training.metrics import read_metrics


def facts_at_start(config: RunConfig, data: Data) -> dict[str, Any]:
    """Of all adapters of a run; plain JSON."""
    files = ", ".join(Path(name).name for name in config.data.train_files)
    source = files or config.data.hub.name or "generated"
    return {
        "data": f"{describe_data(data).removeprefix('data: ')} ({source})",
        "rows of a step": f"{config.train.batch_size} of at most {config.data.max_length} tokens",
        "learning rate": config.learning_rate,
        "seed": config.train.seed,
    }


def facts_at(directory: Path, step: int, eval_loss: float) -> dict[str, Any]:
    """Of the adapter after ``step``, from the metrics of the run in ``directory``.

    Args:
        directory: Of the run.
        step: The last one that was taken.
        eval_loss: Held-out loss after it; NaN where it was not measured.
    """
    facts: dict[str, Any] = {}
    for record in read_metrics(directory, "start"):
        if record["step"] < step:  # later ones, with other settings maybe, made nothing of it
            facts = dict(record.get("facts", {}))
    facts["steps"] = step
    if math.isfinite(eval_loss):
        facts["held-out loss"] = f"{eval_loss:.4f}"
        for record in read_metrics(directory, "before"):
            if record["eval_loss"] is not None:
                facts["held-out loss"] += f" (the base alone: {record['eval_loss']:.4f})"
            break
    return facts
