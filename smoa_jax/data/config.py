"""The data's configuration, and the way from it to batches and questions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from smoa_jax.data.arithmetic import ArithmeticTask, arithmetic_rows
from smoa_jax.data.encode import Questions, encode_questions, encode_rows
from smoa_jax.data.identity import data_identity
from smoa_jax.data.packing import plan_rows
from smoa_jax.data.pipeline import ExamplesIndex, TrainStream
from smoa_jax.data.reasoning import reasoning_rows
from smoa_jax.data.rows import AnyRow
from smoa_jax.data.sources import drop_overlap, read_rows, split_rows
from smoa_jax.data.templates import make_template


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
    template: Literal["alpaca", "chat", "plain"] = "alpaca"
    max_length: int = 256
    response_only: bool = True
    pack: bool = False
    buckets: tuple[int, ...] = ()
    seed: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        _one_of("source", self.source, ("files", "arithmetic", "reasoning_gym"))
        _one_of("on_bad_row", self.on_bad_row, ("error", "skip"))
        _one_of("template", self.template, ("alpaca", "chat", "plain"))
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
            _arithmetic_task(self.task)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What training and evaluation read.

    Attributes:
        train: Training rows; ``train_stream`` makes batches of them.
        eval: Held-out rows for the loss, for ``eval_batches``; ``None`` without held-out rows.
        questions: Held-out prompts and reference answers, for generation; maybe none.
        counts: Per split, what was read, dropped and cut.
        identity: Digests of the rows and of their files (``data_identity``).
    """

    config: DataConfig
    train: ExamplesIndex
    eval: ExamplesIndex | None
    questions: Questions
    counts: dict[str, dict[str, int]]
    identity: dict[str, Any]

    def train_stream(
        self, batch_size: int, *, process_index: int = 0, process_count: int = 1
    ) -> TrainStream:
        """An endless stream of training batches from the start; ``restore`` moves it."""
        return TrainStream(
            self.train,
            batch_size,
            self.config.seed,
            process_index=process_index,
            process_count=process_count,
            prefetch=self.config.prefetch,
        )


def build_data(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Data:
    """Reads or generates the rows of ``config``, tokenises them and plans their batches.

    Raises:
        ValueError: Bad files, rows or settings; the message says which.
    """
    template = make_template(config.template, tokenizer)
    train_rows, eval_rows, read_counts = load_rows(config)

    def encode(rows: list[AnyRow]) -> ExamplesIndex:
        examples = encode_rows(
            rows,
            template,
            tokenizer,
            max_length=config.max_length,
            response_only=config.response_only,
            on_bad_row=config.on_bad_row,
        )
        plan = plan_rows(
            examples, max_length=config.max_length, pack=config.pack, buckets=config.buckets
        )
        return ExamplesIndex(examples=examples, plan=plan)

    train = encode(train_rows)
    held_out = encode(eval_rows) if eval_rows else None
    questions = encode_questions(
        eval_rows,
        template,
        tokenizer,
        max_length=config.max_length,
        on_bad_row=config.on_bad_row,
    )
    counts = {"read": dict(read_counts), "train": dict(train.examples.counts)}
    counts["train"]["batch_rows"] = len(train)
    counts["train"]["response_tokens"] = int(train.examples.trained.sum())
    if held_out is not None:
        counts["eval"] = dict(held_out.examples.counts)
    identity = data_identity(
        train.examples,
        None if held_out is None else held_out.examples,
        [*config.train_files, *config.eval_files],
    )
    return Data(
        config=config,
        train=train,
        eval=held_out,
        questions=questions,
        counts=counts,
        identity=identity,
    )


def load_rows(config: DataConfig) -> tuple[list[AnyRow], list[AnyRow], Counter[str]]:
    """Training and held-out rows without a common question, and counts of what was dropped."""
    task = config.task
    if config.source == "arithmetic":
        return arithmetic_rows(
            _arithmetic_task(task),
            train_rows=task.train_rows,
            eval_rows=task.eval_rows,
            seed=task.seed,
        )
    if config.source == "reasoning_gym":
        return reasoning_rows(
            task.name,
            task.options,
            train_rows=task.train_rows,
            eval_rows=task.eval_rows,
            seed=task.seed,
        )
    rows, counts = read_rows(
        config.train_files, on_bad_row=config.on_bad_row, limit=config.train_limit
    )
    if config.eval_files:
        held_out, eval_counts = read_rows(
            config.eval_files, on_bad_row=config.on_bad_row, limit=config.eval_limit
        )
        held_out, overlap = drop_overlap(rows, held_out)
        counts["bad_rows_in_eval"] = eval_counts["bad_rows"]
        counts.update(overlap)
        return rows, held_out, counts
    wanted = config.eval_rows or round(config.eval_fraction * len(rows))
    if config.eval_fraction and not wanted:
        raise ValueError(
            f"got data.eval_fraction={config.eval_fraction} of {len(rows)} rows, which is none; "
            "expected at least one row; raise it or set eval_rows"
        )
    train, held_out, overlap = split_rows(rows, eval_rows=wanted, seed=config.seed)
    counts.update(overlap)
    return train, held_out, counts


def _arithmetic_task(task: TaskConfig) -> ArithmeticTask:
    return ArithmeticTask(name=task.name, digits=task.digits, terms=task.terms)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"got data.{name}={value!r}; expected one of {', '.join(known)}")
