"""What every source yields: rows with a question and its answer, or conversations.

``Row`` and ``Conversation`` are what templates read; nothing downstream knows which file format or
generator they come from. ``origin`` says where a row was read, for error messages.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant"]
#: What a source or an encoder does with a row it cannot use.
OnBadRow: TypeAlias = Literal["error", "skip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One instruction and its response.

    Attributes:
        instruction: The task; for ``prompt/completion`` rows the prompt.
        output: The text to learn.
        input: What the task applies to; often empty.
        answer: What an evaluation compares with; empty: ``output``.
        verbatim: The plain template joins instruction and output as they stand, without a newline.
        origin: Where the row comes from, such as ``"train.jsonl row 3"``.
    """

    instruction: str
    output: str
    input: str = ""
    answer: str = ""
    verbatim: bool = False
    origin: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """System message (optional), then user and assistant by turns; the last turn an assistant's."""

    messages: tuple[Message, ...]
    answer: str = ""
    origin: str = ""


AnyRow: TypeAlias = Row | Conversation


class BadRowError(ValueError):
    """A row that cannot be used; its message names the row."""


def question_of(row: AnyRow) -> str:
    """The text of a row's question, for people."""
    if isinstance(row, Row):
        return f"{row.instruction}\n{row.input}" if row.input else row.instruction
    return "\n".join(f"{message.role}: {message.content}" for message in row.messages[:-1])


def question_keys(row: AnyRow) -> tuple[str, ...]:
    """What each trained turn of a row is asked: what was said before it, and the question.

    Two turns with the same key are the same question, whatever the shapes of their rows, and
    Unicode's compatible forms, letter case and whitespace aside. A system message doesn't count:
    under another one a question is still the same.
    """
    if isinstance(row, Row):
        return (_normalised(question_of(row)),)
    spoken = [message for message in row.messages if message.role != "system"]
    texts = [_normalised(message.content) for message in spoken]
    turns = (place for place, message in enumerate(spoken) if message.role == "assistant")
    return tuple("\0".join(texts[:turn]) for turn in turns)


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def reference_of(row: AnyRow) -> str:
    """The text that a generated answer is compared with."""
    if row.answer:
        return row.answer
    return row.output if isinstance(row, Row) else row.messages[-1].content


def draw_split(
    draw: Callable[[int], AnyRow], *, train_rows: int, eval_rows: int, tries: int = 4
) -> tuple[list[AnyRow], list[AnyRow], Counter[str]]:
    """Draws distinct training rows and distinct held-out rows that share no question with them.

    ``draw(index)`` is a pure function of the index. Training rows come from the indices
    ``[0, tries * train_rows)``, held-out rows from the ``tries * eval_rows`` after those: the two
    ranges never meet. A question drawn before is dropped and counted, and the next index taken.

    Returns:
        Training rows, held-out rows, and counts of what was dropped.

    Raises:
        ValueError: Either range ends before enough distinct questions were found.
    """
    counts: Counter[str] = Counter(duplicates_in_train=0, duplicates_in_eval=0, eval_in_train=0)
    first_eval = tries * train_rows
    train = _distinct(draw, range(first_eval), train_rows, {}, counts, "train")
    seen = {key: "eval_in_train" for row in train for key in question_keys(row)}
    held_out = range(first_eval, first_eval + tries * eval_rows)
    return train, _distinct(draw, held_out, eval_rows, seen, counts, "eval"), counts


def _distinct(
    draw: Callable[[int], AnyRow],
    indices: range,
    wanted: int,
    seen: dict[str, str],
    counts: Counter[str],
    split: str,
) -> list[AnyRow]:
    rows: list[AnyRow] = []
    for index in indices:
        if len(rows) == wanted:
            break
        row = draw(index)
        keys = question_keys(row)
        known = [seen[key] for key in keys if key in seen]
        if known:
            counts[known[0]] += 1
            continue
        seen.update(dict.fromkeys(keys, f"duplicates_in_{split}"))
        rows.append(row)
    if len(rows) < wanted:
        raise ValueError(
            f"got {len(rows)} distinct {split} questions out of {len(indices)} drawn; expected "
            f"{wanted}; ask for fewer rows or a task with more different questions"
        )
    return rows
