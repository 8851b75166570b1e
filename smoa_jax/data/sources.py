"""Rows from local JSON, JSON Lines and Parquet files.

Three shapes of row are understood, by the fields they have:

- ``instruction``, ``output`` and maybe ``input`` (Alpaca, LLM-Adapters);
- ``prompt`` and ``completion``;
- ``messages``: a list of ``{"role", "content"}``.

An ``answer`` field, where there is one, is what evaluations compare with. A row of another shape
stops the run, naming file, row and the fields found; or is skipped and counted, when told so.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smoa_jax.data.rows import (
    AnyRow,
    BadRowError,
    Conversation,
    Message,
    OnBadRow,
    Row,
    question_keys,
)

_SHAPES = "instruction/output[/input], prompt/completion, or messages"
_SUFFIXES = (".json", ".jsonl", ".parquet")


def read_rows(
    paths: Sequence[str | Path], *, on_bad_row: OnBadRow = "error", limit: int = 0
) -> tuple[list[AnyRow], Counter[str]]:
    """Reads all rows of ``paths``, in order.

    Args:
        paths: Files ending in .json (a list of rows), .jsonl or .parquet.
        on_bad_row: Whether a row without the expected fields stops the run or is counted.
        limit: Keep at most this many rows; 0 keeps all.

    Returns:
        The rows, and a count of the bad ones.

    Raises:
        ValueError: A file that is missing, unreadable or of another kind; a bad row; no rows.
    """
    if not paths:
        raise ValueError("got no data files; expected at least one; name them in the data config")
    counts: Counter[str] = Counter(bad_rows=0)
    rows: list[AnyRow] = []
    for path in map(Path, paths):
        for number, record in _records(path, on_bad_row, counts):
            if limit and len(rows) == limit:
                break
            try:
                rows.append(parse_row(record, origin=f"{path} row {number}"))
            except BadRowError:
                if on_bad_row == "error":
                    raise
                counts["bad_rows"] += 1
    if not rows:
        raise ValueError(
            f"got an empty data set from {', '.join(map(str, paths))} "
            f"({counts['bad_rows']} bad rows); expected rows with {_SHAPES}"
        )
    return rows, counts


def parse_row(record: object, *, origin: str) -> AnyRow:
    """The row that ``record`` holds.

    Raises:
        BadRowError: It has none of the expected shapes.
    """
    if not isinstance(record, Mapping):
        raise BadRowError(
            f"{origin}: got {type(record).__name__}; expected an object with {_SHAPES}"
        )
    # Parquet and merged data sets fill fields that a row does not have with nulls.
    fields = {key: value for key, value in record.items() if value is not None}
    answer = _as_text(fields.get("answer", ""))
    if "messages" in fields:
        messages = _parse_messages(fields["messages"], origin)
        return Conversation(messages=messages, answer=answer, origin=origin)
    if {"instruction", "output"} <= fields.keys():
        names, verbatim = ("instruction", "output"), False
    elif {"prompt", "completion"} <= fields.keys():
        names, verbatim = ("prompt", "completion"), True
    else:
        found = ", ".join(map(str, fields)) or "no field"
        raise BadRowError(f"{origin}: got fields {found}; expected {_SHAPES}")
    texts = {name: _text_field(fields, name, origin) for name in names}
    return Row(
        instruction=texts[names[0]],
        output=texts[names[1]],
        input="" if verbatim or "input" not in fields else _text_field(fields, "input", origin),
        answer=answer,
        verbatim=verbatim,
        origin=origin,
    )


def split_rows(
    rows: Sequence[AnyRow], *, eval_rows: int, seed: int
) -> tuple[list[AnyRow], list[AnyRow], Counter[str]]:
    """Takes ``eval_rows`` rows out, drawn by ``seed``; both parts keep the order of the file.

    A held-out row whose question also occurs in training is dropped and counted.

    Raises:
        ValueError: Nothing would be left to train on, or all held-out rows occur in training.
    """
    if not 0 <= eval_rows < len(rows):
        raise ValueError(
            f"got {eval_rows} held-out rows of {len(rows)}; expected fewer than all; "
            "lower eval_rows or eval_fraction, or name eval_files"
        )
    # Drawn by Python's generator: the same choice under every version.
    chosen = set(random.Random(f"held-out/{seed}").sample(range(len(rows)), eval_rows))
    train = [row for index, row in enumerate(rows) if index not in chosen]
    held_out, counts = drop_overlap(train, [rows[index] for index in sorted(chosen)])
    return train, held_out, counts


def drop_overlap(
    train: Sequence[AnyRow], held_out: Sequence[AnyRow]
) -> tuple[list[AnyRow], Counter[str]]:
    """``held_out`` without rows of which a question occurs in ``train``, and how many those were.

    Every trained turn counts, with what was said before it (``question_keys``).

    Raises:
        ValueError: No row of a held-out set is left.
    """
    seen = {key for row in train for key in question_keys(row)}
    kept = [row for row in held_out if seen.isdisjoint(question_keys(row))]
    if held_out and not kept:
        raise ValueError(
            f"got {len(held_out)} held-out rows, all of which occur in training; expected others; "
            "name other eval_files"
        )
    return kept, Counter(eval_in_train=len(held_out) - len(kept))


def _records(
    path: Path, on_bad_row: OnBadRow, counts: Counter[str]
) -> Iterator[tuple[int, object]]:
    """(row number from 1, record) of one file."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"got data file {path}; expected one ending in {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"got data file {path}, which does not exist; expected a readable file")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_records(path), start=1)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read data file {path} as UTF-8 text: {error}") from error
    if path.suffix == ".json":
        yield from enumerate(_json_records(path, text), start=1)
        return
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            if on_bad_row == "error":
                raise BadRowError(
                    f"{path} row {number}: got a line that is not JSON ({error}); "
                    "expected one object per line"
                ) from error
            counts["bad_rows"] += 1


def _json_records(path: Path, text: str) -> list[object]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"cannot read data file {path}: {error}; expected a JSON list of rows "
            "(one object per line belongs in a .jsonl file)"
        ) from error
    if not isinstance(records, list):
        raise ValueError(
            f"got {path} with a JSON {type(records).__name__}; expected a list of rows"
        )
    return records


def _parquet_records(path: Path) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read data file {path} as Parquet: {reason}") from error


def _parse_messages(value: object, origin: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRowError(f"{origin}: got messages of {type(value).__name__}; expected a list")
    messages: list[Message] = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
            raise BadRowError(f"{origin}: got message {number} without role and content")
        role = item["role"]
        if role not in ("system", "user", "assistant"):
            raise BadRowError(
                f"{origin}: got role {role!r} in message {number}; expected system, user or "
                "assistant"
            )
        content = _text_field(item, "content", f"{origin} message {number}")
        messages.append(Message(role=role, content=content))
    _check_turns([message.role for message in messages], origin)
    return tuple(messages)


def _check_turns(roles: list[str], origin: str) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    wanted = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != wanted:
        raise BadRowError(
            f"{origin}: got messages by {', '.join(roles) or 'nobody'}; expected user and "
            "assistant by turns, after a system message if any, ending with assistant"
        )


def _text_field(fields: Mapping[str, Any], name: str, origin: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise BadRowError(f"{origin}: got {name} of {type(value).__name__}; expected text")
    return value


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
