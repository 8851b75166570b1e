"""Rows from local JSON, JSON Lines and Parquet files, or from any other list of records.

Five shapes of row are understood, by the fields they have:

- ``messages``: a list of ``{"role", "content"}``;
- ``conversations``: the same, or a list of ``{"from": "human" | "gpt", "value"}`` (ShareGPT);
- ``instruction``, ``output`` and maybe ``input`` (Alpaca, LLM-Adapters);
- ``prompt`` and ``completion``;
- ``text``: learned from its first word to its last.

Fields of other names are renamed by ``columns``. An ``answer`` field, where there is one, is what
evaluations compare with. A row of another shape stops the run, naming file, row and the fields
found; or is skipped and counted, when told so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from smoa_jax.checks import require
from smoa_jax.data.rows import (
    AnyRow,
    BadRowError,
    Conversation,
    Message,
    OnBadRow,
    Role,
    Row,
    Text,
    bad_rows_counted,
)
from smoa_jax.storage import local_copy

#: Fields that make a row, to which ``columns`` may map.
ROW_FIELDS = (
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "text",
    "answer",
)
#: A record and where it was read, such as ``"train.jsonl row 3"``.
Record: TypeAlias = tuple[str, Any]

_SHAPES = "instruction/output[/input], prompt/completion, messages, conversations, or text"
_SUFFIXES = (".json", ".jsonl", ".parquet")
#: What a message's author and words are called, and who writes them under which names.
_AUTHORS, _WORDS = ("role", "from"), ("content", "value")
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def read_rows(
    paths: Sequence[str | Path],
    *,
    on_bad_row: OnBadRow = "error",
    limit: int = 0,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[AnyRow], Counter[str]]:
    """Reads all rows of ``paths``, in order.

    Args:
        paths: Files ending in .json (a list of rows), .jsonl or .parquet.
        on_bad_row: Whether a row without the expected fields stops the run or is counted.
        limit: Keep at most this many rows; 0 keeps all.
        columns: As of ``parse_row``.

    Returns:
        The rows, and a count of the bad ones.

    Raises:
        ValueError: A file that is missing, unreadable or of another kind; a bad row; no rows.
    """
    require(bool(paths), "no data files", "at least one", "name them in the data config")
    counts: Counter[str] = Counter(bad_rows=0)
    records = (
        (f"{path} row {number}", record)
        for path in map(local_copy, paths)
        for number, record in _records(path, on_bad_row, counts)
    )
    rows = collect_rows(records, counts, on_bad_row=on_bad_row, limit=limit, columns=columns)
    require(
        bool(rows),
        f"an empty data set ({counts['bad_rows']} bad rows)",
        f"rows with {_SHAPES}",
        "name files that hold some",
        where=", ".join(map(str, paths)),
    )
    return rows, counts


def collect_rows(
    records: Iterable[Record],
    counts: Counter[str],
    *,
    on_bad_row: OnBadRow,
    limit: int = 0,
    columns: Mapping[str, str] | None = None,
) -> list[AnyRow]:
    """The rows that ``records`` hold, at most ``limit`` unless it is 0; bad ones are counted.

    Raises:
        BadRowError: A record of no known shape, unless such are to be skipped.
    """
    rows: list[AnyRow] = []
    for origin, record in records:
        with bad_rows_counted(counts, on_bad_row):
            rows.append(parse_row(record, origin=origin, columns=columns))
        if limit and len(rows) == limit:
            break
    return rows


def parse_row(record: Any, *, origin: str, columns: Mapping[str, str] | None = None) -> AnyRow:
    """The row that ``record`` holds.

    Args:
        record: An object of one of the shapes above.
        origin: Where it was read, for error messages.
        columns: By which names the record calls fields of ``ROW_FIELDS``, as in
            ``{"instruction": "question", "output": "answer"}``; others are called as they are.

    Raises:
        BadRowError: It has none of the expected shapes, or lacks a column.
    """
    kind = type(record).__name__
    _need(isinstance(record, Mapping), origin, kind, f"an object with {_SHAPES}")
    # Parquet and merged data sets fill fields that a row does not have with nulls.
    fields = {key: value for key, value in record.items() if value is not None}
    fields = _renamed(fields, columns or {}, origin)
    answer = _as_text(fields.get("answer", ""))
    for name in ("messages", "conversations"):
        if name in fields:
            messages = _parse_messages(fields[name], name, origin)
            return Conversation(messages=messages, answer=answer, origin=origin)
    verbatim = not {"instruction", "output"} <= fields.keys()
    # Some sets hold each row a second time, rendered, under text.
    if "text" in fields and verbatim and not {"prompt", "completion"} <= fields.keys():
        return Text(text=_text_field(fields, "text", origin), origin=origin)
    names = ("prompt", "completion") if verbatim else ("instruction", "output")
    found = ", ".join(map(str, fields)) or "no field"
    _need(set(names) <= fields.keys(), origin, f"fields {found}", _SHAPES)
    texts = {name: _text_field(fields, name, origin) for name in names}
    return Row(
        instruction=texts[names[0]],
        output=texts[names[1]],
        input="" if verbatim or "input" not in fields else _text_field(fields, "input", origin),
        answer=answer,
        verbatim=verbatim,
        origin=origin,
    )


def _renamed(fields: dict[str, Any], columns: Mapping[str, str], origin: str) -> dict[str, Any]:
    """``fields`` by our names; a column that was renamed goes by its old name no more."""
    if not columns:
        return fields
    found = ", ".join(map(str, fields)) or "no field"
    # Fields that a row may do without, its column may lack as well.
    optional = {columns[name] for name in ("input", "answer") if name in columns}
    lacking = [name for name in columns.values() if name not in fields and name not in optional]
    _need(not lacking, origin, f"fields {found}", f"data.columns' {', '.join(lacking)}")
    kept = {
        name: value
        for name, value in fields.items()
        if name not in columns.values() and name not in columns
    }
    named = {name: fields[column] for name, column in columns.items() if column in fields}
    return kept | named


def _records(
    path: Path, on_bad_row: OnBadRow, counts: Counter[str]
) -> Iterator[tuple[int, object]]:
    """(row number from 1, record) of one file."""
    known = path.suffix in _SUFFIXES
    require(known, f"data file {path}", f"one ending in {', '.join(_SUFFIXES)}", "convert it")
    missing = f"data file {path}, which does not exist"
    require(path.is_file(), missing, "a readable file", "correct the name")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_records(path), start=1)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: got a data file that cannot be read as UTF-8 text ({error}); expected one "
            "that can; write it as UTF-8"
        ) from error
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
                    f"{path} row {number}: got a line that is not JSON ({error}); expected one "
                    "object per line"
                ) from error
            counts["bad_rows"] += 1


def _json_records(path: Path, text: str) -> list[object]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: got a data file that cannot be read ({error}); expected a JSON list of rows; "
            "name a file of one object per line .jsonl"
        ) from error
    found = f"{path} with a JSON {type(records).__name__}"
    require(isinstance(records, list), found, "a list of rows", "put the rows into a list")
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
        raise ValueError(
            f"{path}: got a data file that cannot be read as Parquet ({reason}); expected a whole "
            "one; write it again"
        ) from error


def _parse_messages(value: Any, field: str, origin: str) -> tuple[Message, ...]:
    _need(_is_list(value), origin, f"{field} of {type(value).__name__}", "a list")
    messages: list[Message] = []
    for number, item in enumerate(value, start=1):
        keys = item.keys() if isinstance(item, Mapping) else ()
        by, says = (next((key for key in names if key in keys), "") for names in (_AUTHORS, _WORDS))
        got = f"message {number} without role and content"
        _need(bool(by and says), origin, got, "both, or from and value")
        author = str(item[by])
        got = f"{by} {author!r} in message {number}"
        _need(author in _ROLES, origin, got, f"one of {', '.join(_ROLES)}")
        content = _text_field(item, says, f"{origin} message {number}")
        messages.append(Message(role=_ROLES[author], content=content))
    roles: list[str] = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    _need(
        bool(turns) and turns == ["user", "assistant"] * (len(turns) // 2),
        origin,
        f"{field} by {', '.join(roles) or 'nobody'}",
        "user and assistant by turns, after a system message if any, ending with assistant",
    )
    return tuple(messages)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _text_field(fields: Mapping[str, Any], name: str, origin: str) -> str:
    value = fields[name]
    _need(isinstance(value, str), origin, f"{name} of {type(value).__name__}", "text")
    return value


def _need(ok: bool, origin: str, got: str, expected: str) -> None:
    """Names a row that is none; what to do about it the command line says, once for all."""
    require(ok, got, expected, where=origin, error=BadRowError)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
