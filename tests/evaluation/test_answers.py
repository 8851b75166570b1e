"""Answers are found in responses as each task's protocol finds them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from smoa_jax.evaluation.answers import (
    check_task,
    extract_answer,
    protocol_of,
    score_responses,
)

PAPER_DATA = Path(
    os.environ.get("SMOA_PAPER_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("X=(4.0*3.0)", "12.00"),
        ("x = 22 - (14/4)", "18.5"),
        ("3*6", "18"),
        ("X=-3+007", "4"),
        ("X=2*3\nX=99", "6"),
        ("X=1.5", "1.5"),
        ("X=0.5*.5", "0.25"),
        ("X=1/0", None),
        ("X=9**9**9", None),
        ("X=7//2", None),
        ("X=2+y", None),
        ("X-2=6", None),
        ("the answer is 4", None),
        ("X=", None),
        ("", None),
        ("X=" + "(" * 300 + "1", None),
    ],
)
def test_an_equation_is_worth_what_its_first_line_comes_to(response, value):
    assert extract_answer(response, "mawps") == value


def test_equations_are_compared_by_value():
    score = score_responses(["X=10/3", "x=7-3", "no"], ["3.333", "4.0", "1"], "mawps")
    assert (score.right, score.unanswered) == ((True, True, False), 1)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 16 hours.", "16"),
        ("16.0", "16"),
        ("first 3, then 4", "4"),
        ("$1,234.50 in total", "1234.5"),
        ("10-3=7", "7"),
        ("7-3", "3"),
        ("it falls to -4.", "-4"),
        ("\u22125", "-5"),
        ("x = .5", "0.5"),
        ("0", "0"),
        ("100", "100"),
        ("...42", "42"),
        ("hm..42", "42"),
        ("\u202642", "42"),
        ("\u2026.42", "42"),
        ("so ...-42", "-42"),
        ("... .42", "0.42"),
        ("3...42", "42"),
        ("42...", "42"),
        ("No.5", "5"),
        ("No.5.2", "5.2"),
        ("approx.1,200", "1200"),
        ("$.50", "0.5"),
        ("-.5", "-0.5"),
        ("\u2212.5", "-0.5"),
        ("x=.5", "0.5"),
        ("(.5)", "0.5"),
        ("7-.5", "0.5"),
        ("3.14.", "3.14"),
        ("3.14.\n", "3.14"),
        ("it is 5.So", "5"),
        ("1.2.3", None),
        ("12.3.4", None),
        ("12.05.2024", None),
        ("1,234.5.6", None),
        (".5.6", None),
        ("7 under 1.2.3", "7"),
        ("v2.5", None),
        ("x5", None),
        ("7 in v2.5", "7"),
        ("1,234,5678", "5678"),
        ("12.5%", "12.5"),
        ("5km", "5"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number_is_the_answer(response, answer):
    assert extract_answer(response, "gsm8k") == answer


@pytest.mark.parametrize(
    ("task", "response", "answer"),
    [
        ("boolq", "the correct answer is True", "true"),
        ("boolq", "untrue", None),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "answer1", None),
        ("social_i_qa", "answer3", "answer3"),
        ("social_i_qa", "answer4", None),
        ("ARC-Easy", "Answer4: a leg, not answer1", "answer4"),
        ("ARC-Challenge", "answer5", "answer5"),
        ("openbookqa", "the correct answer is answer5", None),
        ("openbookqa", "answer12", None),
        ("hellaswag", "the correct answer is ending4", "ending4"),
        ("winogrande", "option2", "option2"),
        ("winogrande", "option3", None),
    ],
)
def test_the_first_label_of_the_task_is_the_answer(task, response, answer):
    assert protocol_of(task) == "choice"
    assert extract_answer(response, task) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (" odd  even\n", "odd even"),
        ("ODD even", "odd even"),
        ("odd, even", "odd, even"),
        (" ", None),
    ],
)
def test_other_tasks_compare_the_whole_response(response, answer):
    assert extract_answer(response, "parity") == answer


def test_scores_count_right_wrong_and_unanswered():
    score = score_responses(["it is 3", "4.0", "nothing", "5"], ["3", "4", "5", "6"], "gsm8k")
    assert score.right == (True, True, False, False)
    assert (score.correct, score.unanswered, score.total) == (2, 1, 4)
    assert score.accuracy == 0.5


def test_numbers_are_compared_to_a_thousandth():
    references = ["16.667", "16.667"]
    assert score_responses(["16.6666", "16.67"], references, "gsm8k").right == (True, False)


def test_a_protocol_may_be_named():
    assert score_responses(["so 12"], ["12"], "sum").accuracy == 0
    assert score_responses(["so 12"], ["12"], "sum", protocol="number").accuracy == 1
    assert extract_answer("I say ending2", "some new task", protocol="choice") == "ending2"


@pytest.mark.parametrize(
    ("task", "protocol", "message"),
    [
        ("arc-easy", "choice", r"got evaluation.task='arc-easy'; .* did you mean ARC-Easy"),
        ("bolq", "choice", r"did you mean boolq\? leave it empty for another task"),
        ("zzz", "choice", r"expected one of gsm8k, mawps, boolq, .*winogrande; leave it empty"),
        ("gsm8k", "exact", r"task='gsm8k' with evaluation.answer='exact'; expected 'number'"),
        ("boolq", "number", r"expected 'choice', which the task is scored by"),
    ],
)
def test_a_task_that_is_unknown_or_scored_otherwise_is_refused(task, protocol, message):
    with pytest.raises(ValueError, match=message):
        check_task(task, protocol)


def test_known_tasks_and_none_are_accepted():
    check_task("", "exact")
    check_task("boolq", "choice")
    check_task("gsm8k", "number")


def test_scoring_nothing_or_unequal_lists_is_refused():
    with pytest.raises(ValueError, match="got 0 responses and 0 references"):
        score_responses([], [])
    with pytest.raises(ValueError, match="got 1 responses and 2 references"):
        score_responses(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="got reference 'no' of task 'gsm8k'"):
        score_responses(["1"], ["no"], "gsm8k")
    with pytest.raises(ValueError, match="got protocol 'likelihood'"):
        extract_answer("a", protocol="likelihood")  # type: ignore[arg-type]


@pytest.mark.paper_data
@pytest.mark.parametrize(
    "task",
    ["boolq", "piqa", "social_i_qa", "ARC-Challenge", "ARC-Easy", "openbookqa", "winogrande"],
)
def test_the_papers_outputs_hold_the_papers_answers(task):
    files = sorted((PAPER_DATA / task).glob("*.json"))
    if not files:
        pytest.skip(f"the papers' task data is not at {PAPER_DATA}; set SMOA_PAPER_DATA")
    for file in files:
        rows = json.loads(file.read_text())
        outputs, answers = [row["output"] for row in rows], [row["answer"] for row in rows]
        assert score_responses(outputs, answers, task).accuracy == 1
        assert score_responses(answers, answers, task).accuracy == 1
        rotated = answers[1:] + answers[:1]
        assert score_responses(rotated, answers, task).accuracy < 0.8
