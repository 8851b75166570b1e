"""Train, then show what came of it."""

from __future__ import annotations

from smoa_jax.commands.tables import console, summary_table
from smoa_jax.sharding.processes import is_first
from smoa_jax.training.config import RunConfig
from smoa_jax.training.run import run


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> int:
    """Train, then show what came of it."""
    summary = run(config, resume=resume, overwrite=overwrite)
    if summary.finished and is_first():
        console.print(summary_table(summary))
        console.print(f"adapter: {summary.adapter_dir}", soft_wrap=True, markup=False)
        console.print(
            f"next:    smoa export --model {config.model.path} --adapter {summary.adapter_dir} "
            f"--output {config.train.output_dir}/merged",
            soft_wrap=True,
            markup=False,
        )
    return 0
