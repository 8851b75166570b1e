"""The data's configuration; ``build.py`` makes batches and questions of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias, get_args

from smoa_jax.data.arithmetic import ArithmeticTask

#: What a prompt may be put into; ``templates.py`` makes each.
TemplateName: TypeAlias = Literal["alpaca", "chat", "plain"]


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
        if self.train_rows < 1 or self.eval_rows < 0:
            raise ValueError(
                f"got train_rows={self.train_rows}, eval_rows={self.eval_rows}; expected at least "
                "1 and 0"
            )
        if self.seed < 0:
            raise ValueError(f"got data task seed {self.seed}; expected 0 or more")

    def arithmetic(self) -> ArithmeticTask:
        """What the source ``arithmetic`` generates."""
        return ArithmeticTask(name=self.name, digits=self.digits, terms=self.terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become batches.

    Attributes:
        source: ``files``, or a generator: ``arithmetic`` or ``reasoning_gym``.
        train_files: JSON, JSON Lines or Parquet files.
        eval_files: Held-out files; empty: rows are taken out of ``train_files``.
        train_limit: Use at most this many rows of ``train_files``; 0: all.
        eval_limit: Use at most this many rows of ``eval_files``; 0: all.
        eval_rows: Rows to take out of ``train_files`` when there are no ``eval_files``.
        eval_fraction: The same as a share of the rows; set one of the two.
        on_bad_row: ``error`` stops at a row without the expected fields; ``skip`` counts it.
        task: What to generate.
        template: ``alpaca``, ``chat`` or ``plain``.
        max_length: Tokens of a row: BOS, prompt, response and EOS together.
        response_only: Train on responses alone.
        pack: Let short examples share rows, without seeing each other.
        buckets: Row lengths below ``max_length`` for shorter examples; each compiles once.
        seed: Of the batch order and of the held-out choice.
        prefetch: Batches to make ahead in the background.
    """

    source: Literal["files", "arithmetic", "reasoning_gym"] = "arithmetic"
    train_files: tuple[str, ...] = ()
    eval_files: tuple[str, ...] = ()
    train_limit: int = 0
    eval_limit: int = 0
    eval_rows: int = 0
    eval_fraction: float = 0.0
    on_bad_row: Literal["error", "skip"] = "error"
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    template: TemplateName = "alpaca"
    max_length: int = 256
    response_only: bool = True
    pack: bool = False
    buckets: tuple[int, ...] = ()
    seed: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        _one_of("source", self.source, ("files", "arithmetic", "reasoning_gym"))
        _one_of("on_bad_row", self.on_bad_row, ("error", "skip"))
        _one_of("template", self.template, get_args(TemplateName))
        for name in ("train_limit", "eval_limit", "eval_rows", "seed", "prefetch"):
            if getattr(self, name) < 0:
                raise ValueError(f"got data.{name}={getattr(self, name)}; expected 0 or more")
        if self.max_length < 2:
            raise ValueError(f"got data.max_length={self.max_length}; expected at least 2")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"got data.eval_fraction={self.eval_fraction}; expected 0 to below 1")
        if self.eval_rows and self.eval_fraction:
            raise ValueError("got data.eval_rows and data.eval_fraction; expected one of them")
        if self.eval_files and (self.eval_rows or self.eval_fraction):
            raise ValueError(
                "got data.eval_files with data.eval_rows or data.eval_fraction; expected either "
                "files or a share of train_files; use eval_limit to shorten eval_files"
            )
        if self.source == "files" and not self.train_files:
            raise ValueError("got data.source=files without data.train_files; name at least one")
        if self.source != "files" and (self.train_files or self.eval_files):
            raise ValueError(
                f"got data files with data.source={self.source}; expected source files; set it"
            )
        if self.source == "arithmetic":
            self.task.arithmetic()


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"got data.{name}={value!r}; expected one of {', '.join(known)}")
