"""Generated tasks: right answers, pure rows, and no question on both sides."""

from __future__ import annotations

import itertools
import re

import pytest

from smoa_jax.data.arithmetic import (
    ARITHMETIC_TASKS,
    ArithmeticTask,
    arithmetic_row,
    arithmetic_rows,
)
from smoa_jax.data.reasoning import ReasoningTask, reasoning_rows
from smoa_jax.data.rows import Row, question_of
from smoa_jax.data.splits import draw_split


def solve(name: str, question: str, digits: int) -> str:
    """The rules once more, written from their descriptions and on strings."""
    words = re.findall(r"\d+", question)
    numbers = [int(word) for word in words]
    if name == "sum":
        return str(sum(numbers))
    if name == "difference":
        return str(numbers[0] - numbers[1])
    if name == "parity":
        return " ".join("even" if word[-1] in "02468" else "odd" for word in words)
    if name == "size":
        return " ".join("low" if word.zfill(digits)[0] in "01234" else "high" for word in words)
    if name == "compare":
        signs = {-1: "<", 0: "=", 1: ">"}
        gaps = [a - b for a, b in itertools.pairwise(numbers)]
        return " ".join(signs[(gap > 0) - (gap < 0)] for gap in gaps)
    if name == "reverse":
        return "".join(reversed(words[0]))
    if name == "weave":
        return "".join(words[index % 2][index // 2] for index in range(2 * len(words[0])))
    if name == "swap":
        return words[1] + words[0]
    if name == "ends":
        return "".join([word[0] for word in words] + [word[-1] for word in words])
    if name == "larger":
        return str(1 + sorted(numbers)[-1])
    if name == "columns":
        return "".join(str(int(a) + int(b))[-1] for a, b in zip(*words, strict=True))
    assert name == "successor"
    return words[0].translate(str.maketrans("0123456789", "1234567890"))


@pytest.mark.parametrize("name", ARITHMETIC_TASKS)
def test_answers_follow_the_rule(name):
    for digits in (1, 2, 4):
        task = ArithmeticTask(name=name, digits=digits, terms=3)
        for index in range(100):
            row = arithmetic_row(task, seed=1, index=index)
            assert row.output == solve(name, row.instruction, digits), row


@pytest.mark.parametrize("name", ARITHMETIC_TASKS)
def test_training_and_held_out_questions_never_overlap(name):
    # Few different questions, so that draws collide.
    task = ArithmeticTask(name=name, digits=3, terms=2)
    train, held_out, counts = arithmetic_rows(task, train_rows=400, eval_rows=60, seed=0)
    questions = [question_of(row) for row in train]
    held_out_questions = [question_of(row) for row in held_out]
    assert (len(set(questions)), len(set(held_out_questions))) == (400, 60)
    assert set(questions).isdisjoint(held_out_questions)
    if name in ("reverse", "successor"):
        assert counts["eval_in_train"] > 0
        assert counts["duplicates_in_train"] > 0


@pytest.mark.parametrize("name", ARITHMETIC_TASKS)
def test_there_are_thousands_of_questions(name):
    task = ArithmeticTask(name=name, digits=4, terms=3)
    train, held_out, _ = arithmetic_rows(task, train_rows=5000, eval_rows=200, seed=0)
    assert (len(train), len(held_out)) == (5000, 200)


def test_a_row_is_a_pure_function_of_task_seed_and_index():
    task = ArithmeticTask(name="sum", digits=2, terms=3)
    rows = [arithmetic_row(task, seed=7, index=index) for index in range(5)]
    assert arithmetic_row(task, seed=7, index=3) == rows[3]
    assert len({row.instruction for row in rows}) == 5
    assert arithmetic_row(task, seed=8, index=3).instruction != rows[3].instruction
    assert arithmetic_row(task, seed=8, index=3).instruction != rows[4].instruction
    # Written out once, so that another version of Python or of this file cannot change the rows.
    assert [row.instruction for row in rows[:2]] == ["49 + 97 + 27 =", "34 + 94 + 70 ="]


def test_too_few_questions_are_an_error():
    task = ArithmeticTask(name="reverse", digits=1)
    with pytest.raises(ValueError, match="got 10 distinct train questions out of 400 drawn"):
        arithmetic_rows(task, train_rows=100, eval_rows=0, seed=0)
    with pytest.raises(ValueError, match="got 0 distinct eval questions"):
        arithmetic_rows(task, train_rows=10, eval_rows=1, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "add"}, "got arithmetic task 'add'; expected one of sum"),
        ({"digits": 0}, "got digits=0"),
        ({"terms": 1}, "got terms=1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticTask(**settings)


def test_drawing_replaces_and_counts_repeated_questions():
    def draw(index: int) -> Row:
        # Train range 0..15: questions 0,0,1,1,...; held-out range from 16: 0, 0, 4, 4, ...
        number = index // 2 if index < 16 else [0, 0, 4, 4, 5, 5, 6, 6][index - 16]
        return Row(instruction=str(number), output="x")

    train, held_out, counts = draw_split(draw, train_rows=4, eval_rows=2)
    assert [question_of(row) for row in train] == ["0", "1", "2", "3"]
    assert [question_of(row) for row in held_out] == ["4", "5"]
    assert counts == {"duplicates_in_train": 3, "eval_in_train": 2, "duplicates_in_eval": 1}


def test_reasoning_gym_rows_are_disjoint_and_reproducible():
    pytest.importorskip("reasoning_gym")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    train, held_out, counts = reasoning_rows(
        "chain_sum", options, train_rows=300, eval_rows=80, seed=5
    )
    questions = {question_of(row) for row in train}
    assert len(questions) == 300
    assert questions.isdisjoint(question_of(row) for row in held_out)
    assert counts["eval_in_train"] > 0
    again = reasoning_rows("chain_sum", options, train_rows=300, eval_rows=80, seed=5)
    assert again == (train, held_out, counts)


def test_reasoning_gym_scores_its_own_answers():
    pytest.importorskip("reasoning_gym")
    task = ReasoningTask("chain_sum", {}, seed=5, size=10)
    assert task.score(task.row(3).answer, 3) == 1.0
    assert task.score("none", 3) == 0.0


def test_reasoning_gym_refuses_unknown_tasks_and_settings():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="got reasoning_gym task 'nope'"):
        ReasoningTask("nope", {}, seed=0, size=1)
    with pytest.raises(ValueError, match=r"task 'chain_sum' with \{'depth': 3\}"):
        ReasoningTask("chain_sum", {"depth": 3}, seed=0, size=1)


def test_without_the_extra_reasoning_gym_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[reasoning\]'"):
        reasoning_rows("chain_sum", {}, train_rows=1, eval_rows=0, seed=0)
