"""Files become rows, and whatever is not a row is named."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from smoa_jax.data.rows import (
    BadRowError,
    Conversation,
    Message,
    Row,
    Text,
    question_of,
    reference_of,
)
from smoa_jax.data.sources import parse_row, read_rows

RECORDS = [
    {"instruction": "Add.", "input": "1 2", "output": "the sum is 3", "answer": "3"},
    {"prompt": "1 + 1 =", "completion": " 2"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
]


def parsed(origin):
    return [
        Row(
            instruction="Add.", input="1 2", output="the sum is 3", answer="3", origin=origin + "1"
        ),
        Row(instruction="1 + 1 =", output=" 2", verbatim=True, origin=origin + "2"),
        Conversation(
            messages=(Message(role="user", content="hi"), Message(role="assistant", content="ho")),
            origin=origin + "3",
        ),
    ]


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_every_format_and_shape_reads_the_same(tmp_path, suffix):
    # Parquet rows share one schema: absent fields come back as nulls.
    names = {name for record in RECORDS for name in record}
    records = [{name: record.get(name) for name in names} for record in RECORDS]
    path = write(tmp_path / f"data.{suffix}", records if suffix == "parquet" else RECORDS)
    rows, counts = read_rows([path])
    assert rows == parsed(f"{path} row ")
    assert counts["bad_rows"] == 0


def test_references_and_questions_are_what_evaluation_compares():
    rows = parsed("")
    assert [reference_of(row) for row in rows] == ["3", " 2", "ho"]
    assert [question_of(row) for row in rows] == ["Add.\n1 2", "1 + 1 =", "user: hi"]


def test_rows_of_several_files_follow_each_other_up_to_a_limit(tmp_path):
    first = write(tmp_path / "a.jsonl", RECORDS[:2])
    second = write(tmp_path / "b.json", RECORDS[2:] * 2)
    assert [len(read_rows([first, second], limit=n)[0]) for n in (0, 1, 2, 3)] == [4, 1, 2, 3]


def test_unusual_but_valid_text_files_are_read(tmp_path):
    path = tmp_path / "odd.jsonl"
    record = {"prompt": "line\u2028separator", "completion": "naïve"}
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(record, ensure_ascii=False).encode() + b"\r\n \r\n"
    )
    [row], _ = read_rows([path])
    assert isinstance(row, Row)
    assert row.instruction == "line\u2028separator"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "output": "b"}, "got fields question, output; expected instruction"),
        ({}, "got fields no field"),
        ("text", "got str; expected an object"),
        ({"instruction": "a", "output": 3}, "got output of int; expected text"),
        ({"instruction": "a", "output": None}, "got fields instruction; expected"),
        ({"messages": "hi"}, "got messages of str; expected a list"),
        ({"messages": []}, "got messages by nobody"),
        ({"messages": [{"role": "user"}]}, "got message 1 without role and content"),
        ({"messages": [{"role": "tool", "content": ""}]}, "got role 'tool' in message 1"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "got conversations by assistant;"),
        ({"text": ["a"]}, "got text of list; expected text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "got messages by user; expected user"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: got content of NoneType"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, record, message):
    path = write(tmp_path / "data.json", [RECORDS[0], record])
    with pytest.raises(BadRowError, match=r"data\.json row 2") as error:
        read_rows([path])
    assert message in str(error.value)
    rows, counts = read_rows([path], on_bad_row="skip")
    assert len(rows) == 1
    assert counts["bad_rows"] == 1


def test_a_broken_line_is_a_bad_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + '\n{"prompt": \n')
    with pytest.raises(BadRowError, match=r"data\.jsonl row 2: got a line that is not JSON"):
        read_rows([path])
    rows, counts = read_rows([path], on_bad_row="skip")
    assert len(rows) == 1
    assert counts["bad_rows"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", b"a,b", "expected one ending in .json, .jsonl, .parquet"),
        ("data.json", b"[{", "expected a JSON list of rows"),
        ("data.json", b'{"prompt": "a"}', "with a JSON dict; expected a list"),
        ("data.json", b"[]", "got an empty data set"),
        ("data.jsonl", b"\n", "got an empty data set"),
        ("data.jsonl", b"\xff\xfe\x00", "as UTF-8 text"),
        ("data.parquet", b"PAR1 but not really", "as Parquet"),
    ],
)
def test_unreadable_and_empty_files_are_errors(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="data") as error:
        read_rows([path], on_bad_row="skip")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="which does not exist"):
        read_rows([tmp_path / "none.json"])
    with pytest.raises(ValueError, match="got no data files"):
        read_rows([])


def test_parse_row_reads_a_non_text_answer_as_json():
    row = parse_row({"prompt": "a", "completion": "b", "answer": 16.0}, origin="x")
    assert reference_of(row) == "16.0"


def test_sharegpt_conversations_are_messages():
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    record = {"conversations": [{"from": by, "value": said} for by, said in turns], "id": "7"}
    row = parse_row(record, origin="x")
    assert isinstance(row, Conversation)
    assert [(m.role, m.content) for m in row.messages] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]


def test_a_text_beside_a_question_is_the_same_row_rendered():
    assert parse_row({"text": "words"}, origin="x") == Text(text="words", origin="x")
    for question in ({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}):
        assert isinstance(parse_row({"text": "a b", **question}, origin="x"), Row)


def test_columns_of_other_names_are_renamed():
    columns = {"instruction": "question", "output": "answer", "input": "context"}
    record = {"question": "How many?", "answer": "It is 4. #### 4", "output": "unused", "id": 3}
    row = parse_row(record, origin="x", columns=columns)
    # The column answer was the output's: it is not what evaluations compare with as well.
    assert row == Row(instruction="How many?", output="It is 4. #### 4", origin="x")
    row = parse_row(record | {"context": "c"}, origin="x", columns=columns)
    assert isinstance(row, Row)
    assert row.input == "c"
    with pytest.raises(BadRowError, match=r"x: got fields id; expected data\.columns' question, "):
        parse_row({"id": 3}, origin="x", columns=columns)
