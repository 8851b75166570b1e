"""Files become rows, and whatever is not a row is named."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from smoa_jax.data.rows import BadRowError, Conversation, Message, Row, question_of, reference_of
from smoa_jax.data.sources import drop_overlap, parse_row, read_rows, split_rows

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


def numbered(*numbers):
    return [Row(instruction=f"question {n}", output=str(n)) for n in numbers]


def test_held_out_rows_leave_training(tmp_path):
    rows = numbered(*range(50))
    train, held_out, counts = split_rows(rows, eval_rows=10, seed=3)
    assert (len(train), len(held_out)) == (40, 10)
    assert {question_of(row) for row in train}.isdisjoint(question_of(row) for row in held_out)
    assert counts["eval_in_train"] == 0
    assert split_rows(rows, eval_rows=10, seed=3) == (train, held_out, counts)
    assert split_rows(rows, eval_rows=10, seed=4)[1] != held_out


def test_held_out_questions_that_occur_in_training_are_dropped_and_counted():
    kept, counts = drop_overlap(numbered(1, 2, 3), numbered(3, 4, 4, 5))
    assert kept == numbered(4, 4, 5)
    assert counts["eval_in_train"] == 1
    train, held_out, counts = split_rows(numbered(*range(20)) * 2, eval_rows=8, seed=0)
    assert {question_of(row) for row in train}.isdisjoint(question_of(row) for row in held_out)
    assert counts["eval_in_train"] == 8 - len(held_out)
    assert counts["eval_in_train"] > 0


def test_a_split_that_leaves_nothing_is_an_error():
    with pytest.raises(ValueError, match="got 3 held-out rows of 3"):
        split_rows(numbered(1, 2, 3), eval_rows=3, seed=0)
    with pytest.raises(ValueError, match="all of which occur in training"):
        drop_overlap(numbered(1, 2), numbered(2))


def test_parse_row_reads_a_non_text_answer_as_json():
    row = parse_row({"prompt": "a", "completion": "b", "answer": 16.0}, origin="x")
    assert reference_of(row) == "16.0"


def said(*turns, system=""):
    """A conversation of user and assistant by turns."""
    roles = ("user", "assistant") * (len(turns) // 2)
    messages = [Message(role=role, content=text) for role, text in zip(roles, turns, strict=True)]
    if system:
        messages.insert(0, Message(role="system", content=system))
    return Conversation(messages=tuple(messages))


@pytest.mark.parametrize(
    "trained",
    [
        Row(instruction="What is 2 + 2?", output="4"),
        Row(instruction=" what  is\n2 + 2? ", output="four"),
        Row(instruction="What is", input="2 + 2?", output="4"),
        Row(instruction="What is \uff12 + 2?", output="4", verbatim=True),  # a full-width 2
        said("What is 2 + 2?", "4"),
        said("What is 2 + 2?", "4", "And 3 + 3?", "6"),  # it contains the held-out one
        said("What is 2 + 2?", "4", system="You are a calculator."),
    ],
)
@pytest.mark.parametrize(
    "held_out",
    [
        Row(instruction="What is 2 + 2?", output="4"),
        said("WHAT IS 2 + 2?", "4"),
        said("What is 2 + 2?", "4", "And 5 + 5?", "10"),  # its first turn is trained
    ],
)
def test_a_question_is_the_same_in_any_spelling_and_any_shape_of_row(trained, held_out):
    other = Row(instruction="What is 9 + 2?", output="11")
    kept, counts = drop_overlap([*numbered(1), trained], [held_out, other])
    assert (kept, counts) == ([other], {"eval_in_train": 1})


@pytest.mark.parametrize(
    "held_out",
    [
        Row(instruction="What is 2 + 3?", output="5"),
        Row(instruction="And 3 + 3?", output="6"),  # asked by itself, it is another question
        said("What is 1 + 1?", "2", "And 3 + 3?", "6"),
        said("What is 2 + 2?\nWhat is 3 + 3?", "4 and 6"),
    ],
)
def test_another_question_or_another_context_is_kept(held_out):
    trained = [said("What is 2 + 2?", "4", "And 3 + 3?", "6")]
    assert drop_overlap(trained, [held_out]) == ([held_out], {"eval_in_train": 0})
