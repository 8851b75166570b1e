"""The data's configuration; ``build.py`` makes batches and questions of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

from smoa_jax.checks import require, require_one_of
from smoa_jax.data.arithmetic import ArithmeticTask
from smoa_jax.data.rows import OnBadRow
from smoa_jax.data.templates import TemplateName

Source: TypeAlias = Literal["auto", "files", "arithmetic", "reasoning_gym"]
#: ``auto`` is settled once the rows are known.
TemplateChoice: TypeAlias = Literal["auto", TemplateName]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A generated task, for the sources ``arithmetic`` and ``reasoning_gym``.

    Attributes:
        name: Of the task.
        digits: Arithmetic: digits of the numbers.
        terms: Arithmetic: how many numbers a question holds.
        options: reasoning_gym: the task's own settings.
        train_rows: Training rows to generate.
        eval_rows: Held-out rows to generate; their questions do not occur in training.
        seed: Of the questions.
    """

    name: str = "parity"
    digits: int = 2
    terms: int = 4
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_rows: int = 4000
    eval_rows: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.train_rows >= 1, f"train_rows={self.train_rows}", "at least 1", "raise it")
        for name in ("eval_rows", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"data.task.{name}={value}", "0 or more", "correct it")

    def arithmetic(self) -> ArithmeticTask:
        """What the source ``arithmetic`` generates."""
        return ArithmeticTask(name=self.name, digits=self.digits, terms=self.terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become batches.

    Attributes:
        source: ``files``, or a generator: ``arithmetic`` or ``reasoning_gym``; ``auto``: files
            where files are named, and never a generated task.
        train_files: JSON, JSON Lines or Parquet files.
        eval_files: Held-out files; empty: rows of ``train_files``.
        train_limit: Use at most this many rows of ``train_files``; 0: all.
        eval_limit: Use at most this many rows of ``eval_files``; 0: all.
        eval_rows: Rows of ``train_files`` to hold out instead.
        eval_fraction: The same as a share of the rows; set one of the two.
        on_bad_row: ``error`` stops at a row without the expected fields; ``skip`` counts it.
        task: What to generate.
        template: ``alpaca``, ``chat`` or ``plain``; ``auto``: the tokenizer's chat template for
            conversations, plain for prompts with completions, alpaca for instructions.
        max_length: Tokens of a row: BOS, prompt, response and EOS together.
        response_only: Train on responses alone.
        pack: Let short examples share rows, without seeing each other.
        buckets: Row lengths below ``max_length`` for shorter examples; each compiles once.
        seed: Of the batch order and of the held-out choice.
        prefetch: Batches to make ahead in the background.
    """

    source: Source = "auto"
    train_files: tuple[str, ...] = ()
    eval_files: tuple[str, ...] = ()
    train_limit: int = 0
    eval_limit: int = 0
    eval_rows: int = 0
    eval_fraction: float = 0.0
    on_bad_row: OnBadRow = "error"
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    template: TemplateChoice = "auto"
    max_length: int = 256
    response_only: bool = True
    pack: bool = False
    buckets: tuple[int, ...] = ()
    seed: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        _check(self)

    @property
    def reads_files(self) -> bool:
        """Whether rows come from files; a task is generated only where one is named."""
        return self.source in ("auto", "files")

    def row_settings(self) -> dict[str, Any]:
        """What decides, beside the files' content, about the rows and their layout; by name."""
        settings = dataclasses.asdict(self)
        task = settings.pop("task")
        for name in ("train_files", "eval_files", "prefetch"):
            del settings[name]
        if self.reads_files:
            return settings
        return settings | {f"task.{name}": value for name, value in task.items()}


def _check(config: DataConfig) -> None:
    """Refuses settings that are out of range or contradict each other."""
    for name, words in (
        ("source", Source),
        ("on_bad_row", OnBadRow),
        ("template", TemplateChoice),
    ):
        require_one_of(words, getattr(config, name), f"data.{name}=")
    for name, least in (
        *((name, 0) for name in ("train_limit", "eval_limit", "eval_rows", "seed", "prefetch")),
        ("max_length", 2),
    ):
        value = getattr(config, name)
        require(value >= least, f"data.{name}={value}", f"{least} or more", "raise it")
    fraction = config.eval_fraction
    require(0 <= fraction < 1, f"data.eval_fraction={fraction}", "0 to below 1", "correct it")
    require(
        not (config.eval_rows and fraction),
        "data.eval_rows and data.eval_fraction",
        "one of them",
        "set the other to 0",
    )
    require(
        not (config.eval_files and (config.eval_rows or fraction)),
        "data.eval_files with data.eval_rows or data.eval_fraction",
        "either files or a share of train_files",
        "use eval_limit to shorten eval_files",
    )
    files = bool(config.train_files or config.eval_files)
    require(
        config.reads_files or not files,
        f"data files with data.source={config.source}",
        "files or a generated task",
        "leave data.source or the files out",
    )
    if config.source == "arithmetic":
        config.task.arithmetic()
