"""A grid of runs, described whole: methods x learning rates x seeds over one base and one task.

Everything but adapter, rate and seed is shared by all runs of a grid, so that what differs between
two rows of its ledger is what they are compared for.
"""

from __future__ import annotations

import dataclasses
import math

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.checks import require
from smoa_jax.data.config import DataConfig
from smoa_jax.training.config import (
    GenerationEvalConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One of the methods that a grid compares: its ``adapter``, a section as a run's, and these.

    Args:
        adapter: What it trains, as the section ``adapter`` of a run has it.
        full: Train every weight of the base instead, without any adapter.
        learning_rates: To try; empty: the grid's.
    """

    adapter: SmoaConfig = dataclasses.field(default_factory=SmoaConfig)
    full: bool = False
    learning_rates: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Which runs there are.

    Args:
        methods: Name -> method; they run in this order.
        learning_rates: Peaks to try with each method.
        seeds: Of the runs that choose a rate: data order, initial draw, and the probe's pairs.
        refine_rates: How many of each method's best rates are run again; 0: none.
        refine_seeds: Seeds of those.
        runs_at_once: Runs of one method that train side by side in one program; fewer are filled
            up, so that a method compiles once.
        compile_at_once: Programs to compile side by side.
        commit: Of the code, where it isn't a checkout of git.
    """

    methods: dict[str, MethodConfig] = dataclasses.field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    seeds: tuple[int, ...] = (0,)
    refine_rates: int = 0
    refine_seeds: tuple[int, ...] = ()
    runs_at_once: int = 1
    compile_at_once: int = 1
    commit: str = ""

    def __post_init__(self) -> None:
        require(bool(self.methods), "a grid without methods", "some under grid.methods", "add them")
        rates = [*self.learning_rates]
        for name, method in self.methods.items():
            rates += method.learning_rates
            require(
                bool(self.learning_rates or method.learning_rates),
                f"method {name} without a learning rate",
                "some under grid.learning_rates",
            )
        require(
            all(math.isfinite(rate) and rate > 0 for rate in rates),
            f"learning rates {rates}",
            "positive numbers",
        )
        for name in ("runs_at_once", "compile_at_once"):
            require(getattr(self, name) >= 1, f"grid.{name}={getattr(self, name)}", "at least 1")
        require(bool(self.seeds), "grid.seeds=[]", "at least one seed")
        require(self.refine_rates >= 0, f"grid.refine_rates={self.refine_rates}", "0 or more")
        seeds = [*self.seeds, *self.refine_seeds]
        require(
            len(set(seeds)) == len(seeds) and min(seeds) >= 0,
            f"grid.seeds={list(self.seeds)} and refine_seeds={list(self.refine_seeds)}",
            "distinct seeds from 0",
            "a rate is not judged by the seeds that chose it",
        )

    def rates_of(self, name: str) -> tuple[float, ...]:
        """The rates to try with a method."""
        return self.methods[name].learning_rates or self.learning_rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The capacity probe: random pairs of a key and a value, to be memorised.

    Args:
        pairs: How many; 0: no probe, the rows are those of ``data``.
        characters: Hexadecimal digits of each key and each value.
    """

    pairs: int = 0
    characters: int = 8

    def __post_init__(self) -> None:
        require(self.pairs >= 0, f"probe.pairs={self.pairs}", "0 or more")
        require(1 <= self.characters <= 32, f"probe.characters={self.characters}", "1 to 32")
        require(
            self.pairs <= 16**self.characters // 2,
            f"probe.pairs={self.pairs} of {self.characters} characters",
            f"at most {16**self.characters // 2}, so that keys differ",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What every run is scored on, beside the validation rows that ``data`` holds out.

    Args:
        test_files: Test rows; those that occur in training or validation are dropped and counted.
        test_rows: The last so many of the held-out rows instead; the others are for validation.
        text_rows: Rows of plain text that has nothing to do with the task, whose loss before and
            after tells what was forgotten; 0: none.
        text_length: Tokens of each.
    """

    test_files: tuple[str, ...] = ()
    test_rows: int = 0
    text_rows: int = 16
    text_length: int = 128

    def __post_init__(self) -> None:
        for name in ("test_rows", "text_rows"):
            require(getattr(self, name) >= 0, f"scoring.{name}={getattr(self, name)}", "0 or more")
        require(self.text_length >= 2, f"scoring.text_length={self.text_length}", "2 or more")
        require(
            not (self.test_files and self.test_rows),
            "scoring.test_files and scoring.test_rows",
            "one of them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """A whole experiment; its ledger lies in ``train.output_dir``."""

    model: ModelConfig
    train: TrainConfig
    grid: GridConfig
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    evaluation: GenerationEvalConfig = dataclasses.field(default_factory=GenerationEvalConfig)
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)

    def __post_init__(self) -> None:
        require(
            self.train.steps > 0,
            "an experiment without train.steps",
            "a number, the same for every run",
            "set it",
        )
        require(
            self.data.template != "auto",
            "data.template=auto in an experiment",
            "plain, alpaca or chat",
            "name one",
        )
        require(
            not (self.data.pack or self.data.buckets or self.data.stream),
            "data.pack, data.buckets or data.stream in an experiment",
            "one row an example, all of one length",
            "leave them out",
        )
        require(
            self.model.attention in ("auto", "xla"),
            f"model.attention={self.model.attention} in an experiment",
            "xla, whatever the device",
            "leave it out",
        )
        require(
            bool(self.probe.pairs) or bool(self.scoring.test_files or self.scoring.test_rows),
            "an experiment without test rows",
            "scoring.test_files or scoring.test_rows, since validation rows choose the rate",
            "set one of them",
        )

    def run_of(self, method: str, rate: float, seed: int) -> RunConfig:
        """The same run as ``smoa train`` would have it."""
        return RunConfig(
            model=self.model,
            train=dataclasses.replace(self.train, seed=seed),
            adapter=self.grid.methods[method].adapter,
            data=dataclasses.replace(self.data, seed=seed),
            optimizer=dataclasses.replace(self.optimizer, learning_rate=rate),
            evaluation=self.evaluation,
        )
