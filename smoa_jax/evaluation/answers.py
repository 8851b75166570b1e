"""From generated text to an answer, and from answers to a score.

Four protocols, named because accuracies under different ones cannot be compared:

- ``exact``: the whole response, whitespace and letter case aside (the project's own tasks);
- ``number``: the last number of the response, as GSM8K is scored;
- ``equation``: the value of the first line's equation, ``X=(4.0*3.0)`` or ``4*3`` (MAWPS);
- ``choice``: the first answer label of the task's kind, as LLM-Adapters scores its commonsense
  tasks (BoolQ ``true``/``false``, PIQA ``solution1``, ARC ``answer3``, HellaSwag ``ending4``, ...).

A response without an answer scores zero and is counted apart: a model that does not follow the
format is another finding than one that is wrong.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import operator
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, DecimalException, InvalidOperation
from typing import Literal, TypeAlias

from smoa_jax.checks import require

Protocol: TypeAlias = Literal["exact", "number", "equation", "choice"]

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
    "mawps": "equation",
    **dict.fromkeys(_CHOICES, "choice"),
}
_ANY_CHOICE = r"true|false|(?:solution|answer|ending|option)[1-9]"

# Where a number may begin: not inside a word ("x2", "v2.5") or another number, so that a sign that
# joins two is none ("7-3"); but after a period that ends a word or a row of them ("No.5", "...42").
# ".5" is a fraction where no such period is meant; thousands are grouped by commas; "5." at the end
# of a sentence is 5; a chain such as "1.2.3" is a version or a date, and no number.
_NUMBER = re.compile(
    r"""
    (?> (?: (?<![\w.]) | (?<=[^\W\d]\.) | (?<=[.\u2026]\.) ) [-+\u2212]?
        (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)?
      | (?: (?<![\w.]) [-+\u2212] | (?<![\w.\u2026]) ) \.\d+
    )
    (?!\.\d)
    """,
    re.VERBOSE,
)
#: What an equation may be made of.
_OPERATORS: dict[type, Callable[[Decimal, Decimal], Decimal]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST_EQUATION = 200
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


def protocol_of(task: str) -> Protocol:
    """The protocol that ``task`` is scored by."""
    return TASK_PROTOCOLS.get(task, "exact")


def check_task(task: str, protocol: Protocol) -> None:
    """Refuse a task that is not known, or that is scored otherwise than by ``protocol``.

    Raises:
        ValueError: naming tasks of like names, or the protocol of the task.
    """
    if not task:
        return
    if task not in TASK_PROTOCOLS:
        names = {name.casefold(): name for name in TASK_PROTOCOLS}
        near = difflib.get_close_matches(task.casefold(), names, n=2)
        raise ValueError(
            f"got evaluation.task={task!r}; expected one of {', '.join(TASK_PROTOCOLS)}; "
            + (f"did you mean {' or '.join(names[name] for name in near)}? " if near else "")
            + "leave it empty for another task"
        )
    require(
        protocol_of(task) == protocol,
        f"evaluation.task={task!r} with evaluation.answer={protocol!r}",
        f"{protocol_of(task)!r}, which the task is scored by",
        "set it, or leave the task empty",
    )


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
    if protocol == "equation":
        value = _equation_value(response)
        return None if value is None else format(value, "f")
    if protocol == "choice":
        pattern = rf"\b(?:{_CHOICES.get(task, _ANY_CHOICE)})\b"
        match = re.search(pattern, response, re.IGNORECASE)
        return match.group().lower() if match else None
    raise ValueError(f"got protocol {protocol!r}; expected exact, number, equation or choice")


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
    require(
        len(responses) == len(references) > 0,
        f"{len(responses)} responses and {len(references)} references",
        "as many of both, and at least one",
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
    if protocol in ("number", "equation"):
        return abs(Decimal(answer) - Decimal(expected)) <= _NUMBER_TOLERANCE
    return answer == expected


def _equation_value(response: str) -> Decimal | None:
    """What the first line comes to, after an unknown and its sign of equality; None if nothing."""
    line = (response.strip().splitlines() or [""])[0]
    text = re.sub(r"^\s*[A-Za-z]\w*\s*=", "", line).strip()
    if len(text) > _LONGEST_EQUATION or not re.fullmatch(r"[\d\s.+\-*/()]+", text):
        return None
    try:
        # "007" is a number to people and a mistake to Python.
        tree = ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", text), mode="eval")
        return _value(tree.body)
    except (SyntaxError, RecursionError, DecimalException):
        return None


def _value(node: ast.AST) -> Decimal:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Decimal(str(node.value))
    raise SyntaxError("no equation of numbers")


def _canonical_number(text: str) -> str:
    """One spelling per value: "1,200.50" and "1200.5", "16.0" and "16" are the same."""
    try:
        value = Decimal(text.replace(",", "").replace("\u2212", "-"))
    except InvalidOperation as error:  # impossible: the pattern admits decimals alone
        raise AssertionError(text) from error
    if value == value.to_integral_value():
        return str(int(value))
    return format(value.normalize(), "f")
