"""Rows become token ids with a loss mask by position, all of them at once and up front.

Lengths are needed before anything can be packed, bucketed or dropped, so every row is tokenised at
the start, and kept as two flat arrays with offsets. What does not fit is dealt with here and
counted, never silently: a prompt that leaves no room for a response token would give a loss over
nothing; a response that is cut loses its EOS. A bare text that is too long goes on in further
examples.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from smoa_jax.checks import require
from smoa_jax.data.pieces import encode_pieces
from smoa_jax.data.rows import (
    AnyRow,
    OnBadRow,
    Row,
    Text,
    bad_rows_counted,
    question_of,
    reference_of,
)
from smoa_jax.data.templates import Rendered, Template
from smoa_jax.data.tokenizer import SpecialIds, special_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Tokenised rows of different lengths.

    Attributes:
        tokens: Ids of all rows, one after the other, int32.
        trained: 1 where a token is learned as a target, uint8, as long as ``tokens``.
        offsets: Row i is ``tokens[offsets[i]:offsets[i + 1]]``.
        pad: Id that fills up rows.
        counts: What happened on the way: rows kept and dropped, responses cut, texts divided.
    """

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    pad: int
    counts: Counter[str]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and trained flags of one row."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.trained[span]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """Prompts to generate from, what identifies them, and what the answers should be."""

    prompts: tuple[np.ndarray, ...]
    questions: tuple[str, ...]
    references: tuple[str, ...]
    counts: Counter[str]

    def __len__(self) -> int:
        return len(self.prompts)


def encode_rows(
    rows: Sequence[AnyRow],
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    response_only: bool = True,
    on_bad_row: OnBadRow = "error",
) -> Examples:
    """Renders and tokenises ``rows``, each to at most ``max_length`` tokens.

    One row is one example, but for bare texts: of a longer one, every ``max_length`` tokens are.

    Args:
        rows: What a source yielded.
        template: From ``make_template``.
        tokenizer: From ``load_tokenizer``.
        max_length: Most tokens of a row, BOS, prompt, response and EOS together.
        response_only: Train on responses and their end tokens alone; else on every token.
        on_bad_row: Whether a row that the template cannot express stops the run or is counted.

    Raises:
        ValueError: No row is left.
    """
    kept, counts = tokenize_rows(
        rows,
        template,
        tokenizer,
        max_length=max_length,
        response_only=response_only,
        on_bad_row=on_bad_row,
    )
    require(
        bool(kept),
        f"no usable row out of {len(rows)} ({_summary(counts)})",
        "at least one",
        f"check the rows, or raise max_length above {max_length}",
    )
    return Examples(
        tokens=np.concatenate([tokens for tokens, _ in kept]),
        trained=np.concatenate([trained for _, trained in kept]),
        offsets=np.cumsum([0, *(len(tokens) for tokens, _ in kept)]),
        pad=special_ids(tokenizer).pad,
        counts=counts,
    )


def tokenize_rows(
    rows: Sequence[AnyRow],
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    response_only: bool = True,
    on_bad_row: OnBadRow = "error",
) -> tuple[list[tuple[np.ndarray, np.ndarray]], Counter[str]]:
    """(ids, trained flags) of each example, maybe none, and counts; arguments as above."""
    ids = special_ids(tokenizer)
    rendered, counts = _render(rows, template, on_bad_row)
    counts.update(prompt_too_long=0, responses_truncated=0, texts_divided=0)
    texts = encode_pieces(tokenizer, [[piece.text for piece in item.full] for _, item in rendered])
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for (row, item), pieces in zip(rendered, texts, strict=True):
        tokens, trained = _join(item, pieces, ids)
        starts = range(0, len(tokens), max_length) if isinstance(row, Text) else (0,)
        # The first token of an example is nobody's target.
        parts = [start for start in starts if trained[start + 1 : start + max_length].any()]
        counts["prompt_too_long"] += not parts
        if isinstance(row, Text):
            counts["texts_divided"] += len(parts) > 1
        elif parts:
            counts["responses_truncated"] += len(tokens) > max_length
        if not response_only:
            trained = np.ones_like(trained)
        for start in parts:
            span = slice(start, start + max_length)
            kept.append((tokens[span], trained[span]))
    counts["rows"] = len(kept)
    return kept, counts


def encode_questions(
    rows: Sequence[AnyRow],
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    on_bad_row: OnBadRow = "error",
) -> Questions:
    """Prompts of ``rows``, token for token those that training sees before its responses.

    A prompt of ``max_length`` tokens or more is left out and counted as ``prompt_too_long``: such
    a row is not trained on either. Bare texts ask nothing and are passed over.
    """
    ids = special_ids(tokenizer)
    asking = [row for row in rows if not isinstance(row, Text)]
    rendered, counts = _render(asking, template, on_bad_row)
    counts.update(prompt_too_long=0)
    texts = encode_pieces(
        tokenizer, [[piece.text for piece in item.prompt] for _, item in rendered]
    )
    kept: list[tuple[AnyRow, np.ndarray]] = []
    for (row, _), pieces in zip(rendered, texts, strict=True):
        prompt = _with_bos([token for piece in pieces for token in piece], ids.bos)
        if len(prompt) >= max_length:
            counts["prompt_too_long"] += 1
            continue
        kept.append((row, np.asarray(prompt, np.int32)))
    counts["rows"] = len(kept)
    return Questions(
        prompts=tuple(prompt for _, prompt in kept),
        questions=tuple(question_of(row) for row, _ in kept),
        references=tuple(reference_of(row) for row, _ in kept),
        counts=counts,
    )


def encode_prompt(
    text: str, tokenizer: PreTrainedTokenizerFast, template: Template, *, input: str = ""
) -> np.ndarray:
    """The prompt tokens for one free instruction, as training would have written them."""
    row = Row(instruction=text, output="", input=input, origin="prompt")
    return encode_open_row(row, tokenizer, template)


def encode_open_row(
    row: AnyRow, tokenizer: PreTrainedTokenizerFast, template: Template
) -> np.ndarray:
    """The prompt tokens of a row whose response is still to be written."""
    ids = special_ids(tokenizer)
    [pieces] = encode_pieces(tokenizer, [[piece.text for piece in template(row).prompt]])
    return np.asarray(_with_bos([token for piece in pieces for token in piece], ids.bos), np.int32)


def _render(
    rows: Sequence[AnyRow], template: Template, on_bad_row: OnBadRow
) -> tuple[list[tuple[AnyRow, Rendered]], Counter[str]]:
    counts: Counter[str] = Counter(bad_rows=0)
    rendered: list[tuple[AnyRow, Rendered]] = []
    for row in rows:
        with bad_rows_counted(counts, on_bad_row):
            rendered.append((row, template(row)))
    return rendered, counts


def _join(
    item: Rendered, pieces: list[list[int]], ids: SpecialIds
) -> tuple[np.ndarray, np.ndarray]:
    """One row's ids and trained flags, with BOS in front and EOS behind."""
    tokens: list[int] = []
    trained: list[int] = []
    for piece, encoded in zip(item.full, pieces, strict=True):
        tokens += encoded
        trained += [int(piece.trained)] * len(encoded)
    if item.append_eos:
        tokens.append(ids.eos[0])
        trained.append(1)
    with_bos = _with_bos(tokens, ids.bos)
    lead = len(with_bos) - len(tokens)  # 1: added; 0: was there; negative: repeats dropped
    trained = [0] * lead + trained if lead >= 0 else trained[-lead:]
    return np.asarray(with_bos, np.int32), np.asarray(trained, np.uint8)


def _with_bos(tokens: list[int], bos: int) -> list[int]:
    """``tokens`` with exactly one BOS in front, whether the text wrote none, one or several."""
    if bos < 0:
        return tokens
    start = 0
    while start < len(tokens) and tokens[start] == bos:
        start += 1
    return [bos, *tokens[start:]]


def _summary(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count) or "none"
