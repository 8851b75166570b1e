"""Run a grid of methods, rates and seeds into a ledger."""

from __future__ import annotations

from smoa_jax.experiments.config import ExperimentConfig
from smoa_jax.experiments.runner import run_experiment


def experiment(config: ExperimentConfig) -> int:
    """Run what the ledger lacks; a killed experiment goes on by the same command."""
    ledger = run_experiment(config, lambda text: print(text, flush=True))
    print(f"ledger: {ledger}")
    print(f"next:   smoa report {ledger}")
    return 0
