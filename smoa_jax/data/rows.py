"""What every source yields: rows with a question and its answer, conversations, or bare texts.

``Row``, ``Conversation`` and ``Text`` are what templates read; nothing downstream knows which file
format or generator they come from. ``origin`` says where a row was read, for error messages.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A text that is learned from its first word to its last; it asks nothing."""

    text: str
    origin: str = ""


AnyRow: TypeAlias = Row | Conversation | Text


class BadRowError(ValueError):
    """A row that cannot be used; its message names the row."""

    #: For who runs a command.
    remedy = "mend the row, or set data.on_bad_row=skip to leave such rows out and count them"


@contextlib.contextmanager
def bad_rows_counted(counts: Counter[str], on_bad_row: OnBadRow) -> Iterator[None]:
    """Within it a bad row stops the run, or is counted and left out where such are to be skipped.

    Raises:
        BadRowError: As it was, unless such rows are to be skipped.
    """
    try:
        yield
    except BadRowError:
        if on_bad_row == "error":
            raise
        counts["bad_rows"] += 1


def question_of(row: AnyRow) -> str:
    """The text that identifies a row's question: two rows with the same one are duplicates."""
    if isinstance(row, Row):
        return f"{row.instruction}\n{row.input}" if row.input else row.instruction
    if isinstance(row, Text):
        return row.text
    return "\n".join(f"{message.role}: {message.content}" for message in row.messages[:-1])


def reference_of(row: AnyRow) -> str:
    """The text that a generated answer is compared with; empty for a bare text."""
    if isinstance(row, Text):
        return ""
    if row.answer:
        return row.answer
    return row.output if isinstance(row, Row) else row.messages[-1].content
