"""A generator of small arithmetic tasks: what the demo trains on, and a source without any files.

Two kinds of tasks. Some a model may already know in part (``sum``, ``difference``). The others use
an operator or a way of answering that is made up here, so a pretrained model cannot know the rule,
while the rule itself is simple: what fine-tuning teaches stands out clearly from what was there.

Row ``index`` of seed ``seed`` is a pure function of (task, seed, index); it is drawn with Python's
own generator seeded with a string, whose stream is the same on every platform and version.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable

from smoa_jax.checks import require
from smoa_jax.data.rows import AnyRow, Row
from smoa_jax.data.splits import draw_split


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticTask:
    """Which task, and how hard.

    Attributes:
        name: A key of ``ARITHMETIC_TASKS``.
        digits: Numbers have 1 to this many digits (exactly this many where the rule needs it).
        terms: How many numbers a question holds, for the tasks that take more than a pair.
    """

    name: str = "parity"
    digits: int = 2
    terms: int = 4

    def __post_init__(self) -> None:
        known = ", ".join(ARITHMETIC_TASKS)
        require(
            self.name in ARITHMETIC_TASKS,
            f"arithmetic task {self.name!r}",
            f"one of {known}",
            "correct data.task.name",
        )
        for name, least in (("digits", 1), ("terms", 2)):
            value = getattr(self, name)
            require(least <= value <= 12, f"{name}={value}", f"{least} to 12", "correct it")


def arithmetic_row(task: ArithmeticTask, *, seed: int, index: int) -> Row:
    """The ``index``-th row of ``task`` under ``seed``."""
    rng = random.Random(f"{task.name}/{task.digits}/{task.terms}/{seed}/{index}")
    question, answer = ARITHMETIC_TASKS[task.name](rng, task.digits, task.terms)
    return Row(
        instruction=question, output=answer, answer=answer, origin=f"{task.name} row {index}"
    )


def arithmetic_rows(
    task: ArithmeticTask, *, train_rows: int, eval_rows: int, seed: int
) -> tuple[list[AnyRow], list[AnyRow], Counter[str]]:
    """Distinct training and held-out rows without a common question, and counts of what fell out.

    Raises:
        ValueError: The task at this difficulty has too few different questions.
    """
    return draw_split(
        lambda index: arithmetic_row(task, seed=seed, index=index),
        train_rows=train_rows,
        eval_rows=eval_rows,
    )


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10**digits)


def _wide_number(rng: random.Random, digits: int) -> int:
    """A number of exactly ``digits`` digits."""
    return rng.randrange(10 ** (digits - 1), 10**digits) if digits > 1 else rng.randrange(10)


def _sum(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    numbers = [_number(rng, digits) for _ in range(terms)]
    return " + ".join(map(str, numbers)) + " =", str(sum(numbers))


def _difference(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    first, second = _number(rng, digits), _number(rng, digits)
    return f"{first} - {second} =", str(first - second)


def _parity(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """Even or odd for each number: "7 12 30" gives "odd even even"."""
    numbers = [_number(rng, digits) for _ in range(terms)]
    answer = " ".join("odd" if number % 2 else "even" for number in numbers)
    return f"parity of {' '.join(map(str, numbers))} =", answer


def _size(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """Low or high for each number, cut at the middle of the range: "7 62" gives "low high"."""
    numbers = [_number(rng, digits) for _ in range(terms)]
    middle = 10**digits // 2
    answer = " ".join("high" if number >= middle else "low" for number in numbers)
    return f"size of {' '.join(map(str, numbers))} =", answer


def _compare(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """How each number stands to the next: "3 8 8 5" gives "< = >"."""
    numbers = [_number(rng, digits) for _ in range(terms)]
    signs = ["<" if a < b else ">" if a > b else "=" for a, b in itertools.pairwise(numbers)]
    return f"order of {' '.join(map(str, numbers))} =", " ".join(signs)


def _reverse(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """``~`` writes the digits backwards; leading zeros stay: "~ 120" gives "021"."""
    number = str(_wide_number(rng, digits))
    return f"~ {number} =", number[::-1]


def _weave(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """``@`` takes digits of the two numbers by turns: "12 @ 57" gives "1527"."""
    first, second = str(_wide_number(rng, digits)), str(_wide_number(rng, digits))
    return f"{first} @ {second} =", "".join(a + b for a, b in zip(first, second, strict=True))


def _swap(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """``@`` puts the second number before the first: "12 @ 57" gives "5712"."""
    first, second = _wide_number(rng, digits), _wide_number(rng, digits)
    return f"{first} @ {second} =", f"{second}{first}"


def _ends(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """``@`` joins the first digit of each number, then the last of each: "12 @ 57" gives "1527"."""
    numbers = [str(_wide_number(rng, digits)) for _ in range(terms)]
    answer = "".join(n[0] for n in numbers) + "".join(n[-1] for n in numbers)
    return f"{' @ '.join(numbers)} =", answer


def _larger(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """``@`` is the larger of two numbers, plus one: "12 @ 57" gives "58"."""
    first, second = _number(rng, digits), _number(rng, digits)
    return f"{first} @ {second} =", str(max(first, second) + 1)


def _columns(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """``#`` adds digit by digit and forgets the carry: "19 # 25" gives "34"."""
    first, second = str(_wide_number(rng, digits)), str(_wide_number(rng, digits))
    pairs = zip(first, second, strict=True)
    return f"{first} # {second} =", "".join(str((int(a) + int(b)) % 10) for a, b in pairs)


def _successor(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """``^`` raises every digit by one, 9 to 0: "^ 1904" gives "2015"."""
    number = str(_wide_number(rng, digits))
    return f"^ {number} =", "".join(str((int(digit) + 1) % 10) for digit in number)


#: Task name -> function of (random generator, digits, terms) to (question, answer).
ARITHMETIC_TASKS: dict[str, Callable[[random.Random, int, int], tuple[str, str]]] = {
    "sum": _sum,
    "difference": _difference,
    "parity": _parity,
    "size": _size,
    "compare": _compare,
    "reverse": _reverse,
    "weave": _weave,
    "swap": _swap,
    "ends": _ends,
    "larger": _larger,
    "columns": _columns,
    "successor": _successor,
}
