"""No question on both sides, however it is written and in whatever shape of row."""

from __future__ import annotations

import pytest

from smoa_jax.data.rows import Conversation, Message, Row, question_of
from smoa_jax.data.splits import draw_split, drop_overlap, split_rows


def numbered(*numbers):
    return [Row(instruction=f"question {n}", output=str(n)) for n in numbers]


def test_held_out_rows_leave_training():
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


def chat(*words, system=""):
    """A conversation of user and assistant by turns."""
    roles = ["user", "assistant"] * (len(words) // 2)
    messages = [Message(role="system", content=system)] if system else []
    messages += [
        Message(role=role, content=text)  # type: ignore[arg-type]
        for role, text in zip(roles, words, strict=True)
    ]
    return Conversation(messages=tuple(messages))


def row(instruction, input="", **fields):
    return Row(instruction=instruction, input=input, output="x", **fields)


OTHER = row("something else")


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        pytest.param(row("Name a colour. "), row("Name a colour."), id="trailing_space"),
        pytest.param(row("Name\u00a0a\n\tcolour."), row("Name a colour."), id="whitespace"),
        pytest.param(row("NAME a Colour."), row("name a colour."), id="letter_case"),
        pytest.param(row("stra\u00dfe"), row("STRASSE"), id="case_folding"),
        pytest.param(row("\ufb01ve \uff17"), row("five 7"), id="compatible_characters"),
        pytest.param(row("caf\u00e9"), row("cafe\u0301"), id="composed_characters"),
        pytest.param(row("Add.", "1 2"), row("Add.\n\n1 2"), id="input_or_instruction"),
        pytest.param(row("Add.", "1 2"), row("Add. 1 2", verbatim=True), id="prompt_row"),
        pytest.param(row("Add.", "1 2"), chat("Add.\n\n1 2", "3"), id="instruction_or_chat"),
        pytest.param(chat("Add. 1 2", "3"), row("Add.", "1 2"), id="chat_or_instruction"),
        pytest.param(chat("a", "b", "c", "d"), chat("a", "b"), id="longer_than_held_out"),
        pytest.param(chat("a", "b"), chat("a", "b", "c", "d"), id="shorter_than_held_out"),
        pytest.param(chat("a", "b", "c", "d"), chat("a", "x", "y", "z"), id="other_answer"),
        pytest.param(chat("u", "v", "a", "b", "c", "d"), chat("a", "b"), id="in_the_middle"),
        pytest.param(chat("u", "v", "Add. 1 2", "3"), row("Add.", "1 2"), id="a_later_turn"),
        pytest.param(chat("a", "b", system="Be kind."), chat("a", "b"), id="system_in_training"),
        pytest.param(row("a"), chat("a", "b", system="Be kind."), id="system_held_out"),
        pytest.param(chat("a", "b", system="s"), chat("a", "b", system="t"), id="two_systems"),
    ],
)
def test_a_question_is_the_same_in_any_spelling_shape_and_place(trained, held_out):
    kept, counts = drop_overlap([OTHER, trained], [row("new"), held_out])
    assert kept == [row("new")]
    assert counts == {"eval_in_train": 1}


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        pytest.param(chat("a", "b", "Why?", "c"), chat("d", "e", "Why?", "f"), id="follow_up"),
        pytest.param(row("Why?"), chat("d", "e", "Why?", "f"), id="follow_up_of_other_words"),
        pytest.param(row("1 2"), row("12"), id="a_space_between_digits"),
        pytest.param(row("Add.", "1 2"), row("Add.", "1 3"), id="other_input"),
        pytest.param(row("a"), row("a", "b"), id="without_input"),
        pytest.param(chat("b", "a"), chat("a", "b"), id="an_answer"),
        pytest.param(chat("b", "c", system="a"), row("a"), id="a_system_message"),
        pytest.param(row("-5"), row("5"), id="a_sign"),
    ],
)
def test_other_questions_stay(trained, held_out):
    assert drop_overlap([OTHER, trained], [held_out]) == ([held_out], {"eval_in_train": 0})


def test_each_held_out_row_that_overlaps_is_counted_once():
    train = [chat("a", "b", "c", "d"), row("e")]
    held_out = [chat("A", "x", "C ", "y"), row("new"), row("E"), chat("c", "d"), row("newer")]
    kept, counts = drop_overlap(train, held_out)
    assert kept == [row("new"), row("newer")]
    assert counts["eval_in_train"] == 3


def test_the_rows_that_are_held_out_are_those_they_always_were():
    """A run that was begun before resumes with the rows it had."""
    _, held_out, _ = split_rows(numbered(*range(30)), eval_rows=5, seed=2)
    assert [question_of(row) for row in held_out] == [
        f"question {number}" for number in (1, 6, 8, 15, 23)
    ]


def test_half_a_surrogate_pair_is_a_question_too():
    assert drop_overlap([row("\ud83d")], [row("\ud83d "), row("a")])[0] == [row("a")]


def test_generated_held_out_questions_are_compared_in_any_spelling():
    def draw(index: int) -> Row:
        # Train: "Q 0" and "q  0", both trained on; held-out: three spellings of it, then others.
        texts = ["Q 0", "q  0", *"cdefgh", "q 0", "Q 0 ", "q\n0", *"ijklm"]
        return row(texts[index])

    train, held_out, counts = draw_split(draw, train_rows=2, eval_rows=2)
    assert [question_of(row) for row in train] == ["Q 0", "q  0"]
    assert [question_of(row) for row in held_out] == ["i", "j"]
    assert counts == {"duplicates_in_train": 0, "eval_in_train": 3, "duplicates_in_eval": 0}
