"""Training rows and held-out rows that ask nothing in common.

A held-out row measures something only if training has not asked its question. Which rows ask the
same is decided here once, for files and for generated tasks, whatever shape a row has:

- a *question* is what a user says before an assistant's turn: instruction and input of a row, or
  one user message of a conversation, or a whole bare text. Spaces, letter case and Unicode
  spelling do not tell two apart, nor does the kind of row;
- a held-out row overlaps if its first question is asked *anywhere* in training, at whichever turn.
  That covers every later turn too: a question counts with the turns before it, so one that training
  asks after the same turns has its first question in training. The same words as a follow-up to
  other turns ("Why?") are another question;
- system messages are not compared: most are a manner of speaking, and a set that repeats questions
  under several of them would otherwise be held out from itself. Answers are not compared either.

It is the held-out row that is dropped, and counted; training rows are never touched.
"""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set

from smoa_jax.checks import require
from smoa_jax.data.rows import AnyRow, Row, Text, question_of


def question_keys(row: AnyRow) -> tuple[bytes, ...]:
    """What each question of ``row`` is recognised by, in the order they are asked; at least one."""
    if isinstance(row, Row):
        return (_key(f"{row.instruction} {row.input}"),)
    if isinstance(row, Text):
        return (_key(row.text),)
    return tuple(_key(message.content) for message in row.messages if message.role == "user")


def split_rows(
    rows: Sequence[AnyRow], *, eval_rows: int, seed: int
) -> tuple[list[AnyRow], list[AnyRow], Counter[str]]:
    """Takes ``eval_rows`` rows out, drawn by ``seed``; both parts keep the order of the file.

    A held-out row whose question also occurs in training is dropped and counted.

    Raises:
        ValueError: Nothing would be left to train on, or all held-out rows occur in training.
    """
    require(
        0 <= eval_rows < len(rows),
        f"{eval_rows} held-out rows of {len(rows)}",
        "fewer than all",
        "lower eval_rows or eval_fraction, or name eval_files",
    )
    # Drawn by Python's generator: the same choice under every version.
    chosen = set(random.Random(f"held-out/{seed}").sample(range(len(rows)), eval_rows))
    train = [row for index, row in enumerate(rows) if index not in chosen]
    held_out, counts = drop_overlap(train, [rows[index] for index in sorted(chosen)])
    return train, held_out, counts


def drop_overlap(
    train: Iterable[AnyRow], held_out: Sequence[AnyRow]
) -> tuple[list[AnyRow], Counter[str]]:
    """``held_out`` without rows whose question occurs in ``train``, and how many those were.

    Raises:
        ValueError: No row of a held-out set is left.
    """
    asked = _asked(train) if held_out else set()
    kept = [row for row in held_out if question_keys(row)[0] not in asked]
    require(
        bool(kept) or not held_out,
        f"{len(held_out)} held-out rows, all of which occur in training",
        "others",
        "name other eval_files",
    )
    return kept, Counter(eval_in_train=len(held_out) - len(kept))


def draw_split(
    draw: Callable[[int], AnyRow], *, train_rows: int, eval_rows: int, tries: int = 4
) -> tuple[list[AnyRow], list[AnyRow], Counter[str]]:
    """Draws distinct training rows and distinct held-out rows that share no question with them.

    ``draw(index)`` is a pure function of the index. Training rows come from the indices
    ``[0, tries * train_rows)``, held-out rows from the ``tries * eval_rows`` after those: the two
    ranges never meet. A question drawn before is dropped and counted, and the next index taken;
    within a split only the very same text is one, so that rows that differ in a space or a letter's
    case, where a puzzle is about those, may both be trained on.

    Returns:
        Training rows, held-out rows, and counts of what was dropped.

    Raises:
        ValueError: Either range ends before enough distinct questions were found.
    """
    counts: Counter[str] = Counter(duplicates_in_train=0, duplicates_in_eval=0, eval_in_train=0)
    first_eval = tries * train_rows
    train = _distinct(draw, range(first_eval), train_rows, set(), counts, "train")
    held_out = range(first_eval, first_eval + tries * eval_rows)
    return train, _distinct(draw, held_out, eval_rows, _asked(train), counts, "eval"), counts


def _distinct(
    draw: Callable[[int], AnyRow],
    indices: range,
    wanted: int,
    asked: Set[bytes],
    counts: Counter[str],
    split: str,
) -> list[AnyRow]:
    """``wanted`` rows of different questions, none of them ``asked`` in training."""
    rows: list[AnyRow] = []
    seen: set[str] = set()
    for index in indices:
        if len(rows) == wanted:
            break
        row = draw(index)
        if question_keys(row)[0] in asked:
            counts["eval_in_train"] += 1
        elif question_of(row) in seen:
            counts[f"duplicates_in_{split}"] += 1
        else:
            seen.add(question_of(row))
            rows.append(row)
    require(
        len(rows) >= wanted,
        f"{len(rows)} distinct {split} questions out of {len(indices)} drawn",
        f"{wanted}",
        "ask for fewer rows or a task with more different questions",
    )
    return rows


def _asked(rows: Iterable[AnyRow]) -> set[bytes]:
    return {key for row in rows for key in question_keys(row)}


def _key(text: str) -> bytes:
    """A digest, since a large data set's questions need not be held twice in memory."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # JSON may hold half a surrogate pair.
    words = " ".join(plain.split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(words, digest_size=16).digest()
