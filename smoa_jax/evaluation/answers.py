"""From generated text to an answer, and from answers to a score.

Three protocols, named because accuracies under different ones cannot be compared:

- ``exact``: the whole response, whitespace and letter case aside (the project's own tasks);
- ``number``: the last number of the response, as GSM8K is scored;
- ``choice``: the first answer label of the task's kind, as LLM-Adapters scores its commonsense
  tasks (BoolQ ``true``/``false``, PIQA ``solution1``, ARC ``answer3``, HellaSwag ``ending4``, ...).

A response without an answer scores zero and is counted apart: a model that does not follow the
format is another finding than one that is wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Literal, TypeAlias

Protocol: TypeAlias = Literal["exact", "number", "choice"]

#: Label patterns of the commonsense tasks.
_CHOICES: dict[str, str] = {
    "boolq": r"true|false",
    "piqa": r"solution[12]",
    "social_i_qa": r"answer[1-3]",
    "ARC-Challenge": r"answer[1-5]",
    "ARC-Easy": r"answer[1-5]",
    "openbookqa": r"answer[1-4]",
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option[12]",
}
#: Task name -> protocol; a task that is not named here is scored by ``exact``.
TASK_PROTOCOLS: dict[str, Protocol] = {
    "gsm8k": "number",
    **dict.fromkeys(_CHOICES, "choice"),
}
_ANY_CHOICE = r"true|false|(?:solution|answer|ending|option)[1-9]"

# A number begins where neither a word nor the digits before a point go on ("v2", "1.2.3"). A sign
# counts only where it does not join two numbers, as in "7-3"; thousands are grouped by commas; "5."
# at the end of a sentence is 5, and ".5" is a half, but for a point that ends a word or follows
# another: "No.5" is 5, "...42" is 42.
_NUMBER = re.compile(
    r"(?<!\w)(?<!\d\.)[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    r"|(?<![\w.])[-+\u2212]?\.\d+"
)
#: LLM-Adapters' tolerance, for references that are written with fewer decimals.
_NUMBER_TOLERANCE = Decimal("0.001")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How many responses were right.

    Attributes:
        correct: Right answers.
        unanswered: Responses that hold no answer of the expected form; they count as wrong.
        total: All responses.
        right: Whether each response was right.
    """

    correct: int
    unanswered: int
    total: int
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """The share of right answers, from 0 to 1."""
        return self.correct / self.total


def check_task(task: str, protocol: Protocol) -> None:
    """Refuse a task that nobody knows, or one that is scored by another protocol.

    Raises:
        ValueError: naming what there is.
    """
    if not task:
        return
    if task not in TASK_PROTOCOLS:
        near = difflib.get_close_matches(task, TASK_PROTOCOLS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; or leave it out"
        raise ValueError(
            f"got evaluation.task={task!r}; expected one of {', '.join(TASK_PROTOCOLS)}{hint}"
        )
    if protocol != protocol_of(task):
        raise ValueError(
            f"got evaluation.task={task!r} with evaluation.answer={protocol!r}; expected "
            f"{protocol_of(task)!r}, by which it is scored; change one of the two"
        )


def protocol_of(task: str) -> Protocol:
    """The protocol that ``task`` is scored by."""
    return TASK_PROTOCOLS.get(task, "exact")


def extract_answer(response: str, task: str = "", protocol: Protocol | None = None) -> str | None:
    """The normalised answer in ``response``, or ``None`` if it holds none.

    Args:
        response: Generated text, without the prompt.
        task: A key of ``TASK_PROTOCOLS``, or any other name.
        protocol: In place of the task's own.
    """
    protocol = protocol or protocol_of(task)
    if protocol == "exact":
        return " ".join(response.split()).casefold() or None
    if protocol == "number":
        numbers = _NUMBER.findall(response)
        return _canonical_number(numbers[-1]) if numbers else None
    if protocol == "choice":
        pattern = rf"\b(?:{_CHOICES.get(task, _ANY_CHOICE)})\b"
        match = re.search(pattern, response, re.IGNORECASE)
        return match.group().lower() if match else None
    raise ValueError(f"got protocol {protocol!r}; expected exact, number or choice")


def expected_answer(reference: str, task: str = "", protocol: Protocol | None = None) -> str:
    """The normalised answer in ``reference``; arguments as for ``extract_answer``.

    Raises:
        ValueError: The reference holds no answer.
    """
    answer = extract_answer(reference, task, protocol)
    if answer is None:
        of_task = f" of task {task!r}" if task else ""
        raise ValueError(
            f"got reference {reference!r}{of_task}; expected one that holds an answer "
            f"under protocol {protocol or protocol_of(task)}; choose another protocol"
        )
    return answer


def score_responses(
    responses: Sequence[str],
    references: Sequence[str],
    task: str = "",
    protocol: Protocol | None = None,
) -> Score:
    """Scores each response against its reference, both read by the same protocol.

    Raises:
        ValueError: Nothing to score, unequal numbers of both, or a reference without an answer.
    """
    if len(responses) != len(references) or not references:
        raise ValueError(
            f"got {len(responses)} responses and {len(references)} references; expected as many "
            "of both, and at least one"
        )
    right: list[bool] = []
    unanswered = 0
    for response, reference in zip(responses, references, strict=True):
        expected = expected_answer(reference, task, protocol)
        answer = extract_answer(response, task, protocol)
        unanswered += answer is None
        right.append(_same(answer, expected, protocol or protocol_of(task)))
    return Score(
        correct=sum(right), unanswered=unanswered, total=len(references), right=tuple(right)
    )


def _same(answer: str | None, expected: str, protocol: Protocol) -> bool:
    if answer is None:
        return False
    if protocol == "number":
        return abs(Decimal(answer) - Decimal(expected)) <= _NUMBER_TOLERANCE
    return answer == expected


def _canonical_number(text: str) -> str:
    """One spelling per value: "1,200.50" and "1200.5", "16.0" and "16" are the same."""
    try:
        value = Decimal(text.replace(",", "").replace("\u2212", "-"))
    except InvalidOperation as error:  # impossible: the pattern admits decimals alone
        raise AssertionError(text) from error
    if value == value.to_integral_value():
        return str(int(value))
    return format(value.normalize(), "f")
