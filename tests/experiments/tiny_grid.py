"""A grid that takes seconds: a tiny base, two methods that share a program, few steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.data.config import DataConfig
from smoa_jax.experiments.config import (
    ExperimentConfig,
    GridConfig,
    MethodConfig,
    ProbeConfig,
    ScoringConfig,
)
from smoa_jax.training.config import (
    GenerationEvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

ADAPTER: dict[str, Any] = {"rank": 5, "num_subspaces": 2, "target_modules": ("q_proj",)}


def grid_config(base: Path, output: Path, **changes: Any) -> ExperimentConfig:
    """``changes`` replace fields of the grid, or whole sections by their names."""
    grid = GridConfig(
        methods={
            "spectral": MethodConfig(adapter=SmoaConfig(**ADAPTER)),
            "random": MethodConfig(adapter=SmoaConfig(**ADAPTER, partition="random_blocks")),
        },
        learning_rates=(1e-2, 1e-1),
        seeds=(0,),
        refine_rates=1,
        refine_seeds=(3, 5),
        runs_at_once=2,
    )
    sections: dict[str, Any] = {
        "model": ModelConfig(
            path=str(base), dtype="float32", compute_dtype="float32", spectra_cache="off"
        ),
        "train": TrainConfig(output_dir=str(output), steps=5, batch_size=8, loss_chunk=7),
        "probe": ProbeConfig(pairs=11, characters=3),
        "data": DataConfig(template="plain", max_length=12),
        "optimizer": OptimizerConfig(warmup_steps=2, max_warmup_share=0.5),
        "evaluation": GenerationEvalConfig(max_new_tokens=5, batch_size=11),
        "scoring": ScoringConfig(text_rows=3, text_length=18),
    }
    of_grid = {f.name for f in dataclasses.fields(GridConfig)} & changes.keys()
    grid = dataclasses.replace(grid, **{name: changes.pop(name) for name in of_grid})
    return ExperimentConfig(grid=grid, **(sections | changes))
