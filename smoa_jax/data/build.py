"""From a data configuration to batches and questions: read or generate, split, encode, plan."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from smoa_jax.checks import require
from smoa_jax.data.arithmetic import arithmetic_rows
from smoa_jax.data.config import DataConfig
from smoa_jax.data.encode import Questions, encode_questions, encode_rows, tokenize_rows
from smoa_jax.data.hub import open_split, read_hub
from smoa_jax.data.identity import Identity, data_identity, streamed_digest
from smoa_jax.data.packing import plan_rows
from smoa_jax.data.pipeline import ExamplesIndex, TrainStream
from smoa_jax.data.reasoning import reasoning_rows
from smoa_jax.data.rows import AnyRow, Conversation, bad_rows_counted
from smoa_jax.data.sources import parse_row, read_rows
from smoa_jax.data.splits import drop_overlap, question_keys, split_rows
from smoa_jax.data.streaming import HubRecords, JsonLines, PackedStream, Records, StreamedRows
from smoa_jax.data.templates import make_template
from smoa_jax.data.tokenizer import special_ids

#: Of rows to stream, how many are looked at beforehand.
_FIRST = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What training and evaluation read.

    Attributes:
        config: With its source and template settled, where it said ``auto``.
        train: Training rows; ``train_stream`` makes batches of them. None where only held-out rows
            were asked for.
        eval: Held-out rows for the loss, for ``eval_batches``; ``None`` without held-out rows.
        questions: Held-out prompts and reference answers, for generation; maybe none.
        counts: Per split, what was read, dropped and cut.
        identity: Plain JSON that other data have otherwise; saved with every position.
        streamed: Where training rows are read when they come up; ``train`` then holds the first of
            them alone, for looking at.
    """

    config: DataConfig
    train: ExamplesIndex | None
    eval: ExamplesIndex | None
    questions: Questions
    counts: dict[str, dict[str, int]]
    identity: Identity
    streamed: StreamedRows | None = None

    def train_stream(
        self, batch_size: int, *, process_index: int = 0, process_count: int = 1
    ) -> TrainStream | PackedStream:
        """An endless stream of training batches from the start; ``restore`` moves it."""
        options: Any = {
            "identity": self.identity,
            "process_index": process_index,
            "process_count": process_count,
            "prefetch": self.config.prefetch,
        }
        if self.streamed is not None:
            return PackedStream(self.streamed, batch_size, self.config.seed, **options)
        assert self.train is not None
        return TrainStream(self.train, batch_size, self.config.seed, **options)


def build_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, held_out_only: bool = False
) -> Data:
    """Reads or generates the rows of ``config``, tokenises them and plans their batches.

    Args:
        config: Of the data.
        tokenizer: From ``load_tokenizer``.
        held_out_only: For evaluation: ``eval_files`` need no ``train_files`` beside them.

    Raises:
        ValueError: Bad files, rows or settings; the message says which.
    """
    require(
        bool(config.train_files)
        or config.origin != "files"
        or (held_out_only and bool(config.eval_files)),
        "no data" if config.source == "auto" else "data.source=files without data.train_files",
        "rows to train on" if not held_out_only else "held-out rows",
        "name data.train_files or data.hub.name" + (", or data.eval_files" * held_out_only),
    )
    records = _records_on_disk(config) if config.stream and not held_out_only else None
    if config.stream:
        train_rows, eval_rows, read_counts = _first_rows(config, records)
    else:
        train_rows, eval_rows, read_counts = load_rows(config)
    config = _settled(config, train_rows or eval_rows)
    template = make_template(config.template, tokenizer)

    train, held_out = (
        index_rows(rows, config, template, tokenizer) if rows else None
        for rows in (train_rows, eval_rows)
    )
    questions = encode_questions(
        eval_rows,
        template,
        tokenizer,
        max_length=config.max_length,
        on_bad_row=config.on_bad_row,
    )
    counts = {"read": dict(read_counts)}
    identity: Identity = {}
    streamed = None
    if train is not None:
        counts["train"] = dict(train.examples.counts)
        counts["train"]["batch_rows"] = len(train)
        counts["train"]["response_tokens"] = int(train.examples.trained.sum())
        identity = data_identity(
            train.examples,
            None if held_out is None else held_out.examples,
            references=questions.references,
            train_files=config.train_files,
            eval_files=config.eval_files,
            settings=config.row_settings(),
            digests=dict(zip(config.train_files, getattr(records, "digests", ()), strict=False)),
        )
    if held_out is not None:
        counts["eval"] = dict(held_out.examples.counts)
    if records is not None:
        counts["train"] = {"streamed_rows": len(records)}
        identity["train"] = streamed_digest(identity, records)
        streamed = StreamedRows(
            records,
            lambda record: parse_row(record[1], origin=record[0], columns=config.columns),
            lambda row: tokenize_rows(
                [row],
                template,
                tokenizer,
                max_length=config.max_length,
                response_only=config.response_only,
            )[0],
            max_length=config.max_length,
            pad=special_ids(tokenizer).pad,
            held_out={question_keys(row)[0] for row in eval_rows},
            on_bad_row=config.on_bad_row,
            limit=config.train_limit,
        )
    return Data(
        config=config,
        train=train,
        eval=held_out,
        questions=questions,
        counts=counts,
        identity=identity,
        streamed=streamed,
    )


def _records_on_disk(config: DataConfig) -> Records:
    if config.origin == "hub":
        return HubRecords(config.hub.name, open_split(config.hub, config.hub.train_split))
    return JsonLines(config.train_files)


def _first_rows(
    config: DataConfig, records: Records | None
) -> tuple[list[AnyRow], list[AnyRow], Counter[str]]:
    """The first of the training rows to stream, if any; all held-out ones; and counts."""
    held_out, eval_counts = _read(config, "eval") if config.holds_out else ([], Counter())
    counts = Counter(bad_rows_in_eval=eval_counts["bad_rows"])
    rows: list[AnyRow] = []
    if records is None:
        return rows, held_out, counts
    for index in range(min(_FIRST, len(records))):
        with bad_rows_counted(Counter(), config.on_bad_row):  # again, when they come up
            origin, record = records[index]
            rows.append(parse_row(record, origin=origin, columns=config.columns))
    require(
        bool(rows),
        f"no row among the first {_FIRST} of {len(records)} to stream",
        "some that can be read",
        "look at the files, or map their fields by data.columns",
    )
    return rows, held_out, counts


def _settled(config: DataConfig, rows: list[AnyRow]) -> DataConfig:
    """The configuration with what ``auto`` means for these rows."""
    template = config.template
    if template == "auto":
        if any(isinstance(row, Conversation) for row in rows):
            template = "chat"
        else:
            verbatim = all(getattr(row, "verbatim", True) for row in rows)
            template = "plain" if verbatim else "alpaca"
    return dataclasses.replace(config, source=config.origin, template=template)


def index_rows(
    rows: list[AnyRow], config: DataConfig, template: Any, tokenizer: Any
) -> ExamplesIndex:
    """Rows as tokens, and in which rows of a batch they come to stand."""
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


def load_rows(config: DataConfig) -> tuple[list[AnyRow], list[AnyRow], Counter[str]]:
    """Training and held-out rows without a common question, and counts of what was dropped."""
    task = config.task
    if config.source == "arithmetic":
        return arithmetic_rows(
            task.arithmetic(),
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
    rows, counts = [], Counter()
    if config.train_files or config.origin == "hub":
        rows, counts = _read(config, "train")
    if config.holds_out:
        held_out, eval_counts = _read(config, "eval")
        held_out, overlap = drop_overlap(rows, held_out)
        counts["bad_rows_in_eval"] = eval_counts["bad_rows"]
        counts.update(overlap)
        return rows, held_out, counts
    wanted = config.eval_rows or round(config.eval_fraction * len(rows))
    require(
        bool(wanted) or not config.eval_fraction,
        f"data.eval_fraction={config.eval_fraction} of {len(rows)} rows, which is none",
        "at least one row",
        "raise it or set eval_rows",
    )
    train, held_out, overlap = split_rows(rows, eval_rows=wanted, seed=config.seed)
    counts.update(overlap)
    return train, held_out, counts


def _read(config: DataConfig, part: Literal["train", "eval"]) -> tuple[list[AnyRow], Counter[str]]:
    is_train = part == "train"
    limit = config.train_limit if is_train else config.eval_limit
    options: Any = {"on_bad_row": config.on_bad_row, "limit": limit, "columns": config.columns}
    if config.origin == "hub":
        split = config.hub.train_split if is_train else config.hub.eval_split
        return read_hub(config.hub, split, **options)
    return read_rows(config.train_files if is_train else config.eval_files, **options)
