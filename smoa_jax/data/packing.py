"""Which examples share a row, planned up front, and the arrays of a row.

A *row* is a fixed number of positions that holds one example, or several when packing. A plan is an
index: row i holds the examples ``plan.row(i)``; order, epochs and resumption are about row numbers
alone. Examples in a row don't see each other: each is a segment of its own (1, 2, ...; 0 where
there is none), whose positions start at 0.
"""

from __future__ import annotations

import bisect
import dataclasses
import zlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from smoa_jax.checks import require
from smoa_jax.data.encode import Examples

#: Arrays of shape (rows, length): int32 ``tokens``, ``targets``, ``positions``, ``segment_ids``
#: and float32 ``loss_mask``, 1 where the target counts.
Batch: TypeAlias = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Examples of each row, and how long each row is.

    Attributes:
        members: Example numbers of all rows, one row after the other.
        offsets: Row i is ``members[offsets[i]:offsets[i + 1]]``.
        buckets: Row lengths that occur, ascending; one unless bucketed.
        bucket_of_row: Index into ``buckets`` of each row.
    """

    members: np.ndarray
    offsets: np.ndarray
    buckets: tuple[int, ...]
    bucket_of_row: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """The examples of row ``index``."""
        return self.members[self.offsets[index] : self.offsets[index + 1]]

    def fingerprint(self) -> str:
        """Changes whenever another data set, length or plan stands behind the row numbers."""
        digest = zlib.crc32(self.members.tobytes())
        for part in (self.offsets, self.bucket_of_row, np.asarray(self.buckets)):
            digest = zlib.crc32(np.ascontiguousarray(part, np.int64).tobytes(), digest)
        return f"{digest:08x}"


def plan_rows(
    examples: Examples, *, max_length: int, pack: bool = False, buckets: Sequence[int] = ()
) -> RowPlan:
    """One example per row; with ``pack``, as many as fit; with ``buckets``, rows of few lengths.

    Packing takes the longest example first and puts each where the least room stays free, which
    wastes little and depends on nothing but the lengths.

    Args:
        examples: From ``encode_rows``, none longer than ``max_length``.
        max_length: Positions of a row.
        pack: Let short examples share rows.
        buckets: Row lengths below ``max_length``; each example goes to the shortest that holds it.

    Raises:
        ValueError: ``pack`` together with ``buckets``, or a bucket outside 2..max_length.
    """
    lengths = examples.lengths
    _check_plan(int(lengths.max()), max_length, pack, tuple(buckets))
    rows = _pack(lengths, max_length) if pack else [[index] for index in range(len(lengths))]
    all_buckets = np.asarray(sorted({*buckets, max_length}))
    bucket_of_row = np.searchsorted(all_buckets, [lengths[row].sum() for row in rows])
    used, bucket_of_row = np.unique(bucket_of_row, return_inverse=True)
    return RowPlan(
        members=np.asarray([index for row in rows for index in row], np.int64),
        offsets=np.cumsum([0, *map(len, rows)]),
        # Without asking for buckets, rows keep the length that was asked for.
        buckets=tuple(int(length) for length in all_buckets[used]) if buckets else (max_length,),
        bucket_of_row=bucket_of_row,
    )


def _check_plan(longest: int, max_length: int, pack: bool, buckets: tuple[int, ...]) -> None:
    require(
        not (pack and buckets),
        f"pack=True and buckets={buckets}",
        "one of them",
        "packing fills rows of one length, so leave buckets empty",
    )
    require(
        all(2 <= length <= max_length for length in buckets),
        f"buckets={buckets}",
        f"lengths from 2 to max_length={max_length}",
        "correct them",
    )
    require(
        longest <= max_length,
        f"an example of {longest} tokens",
        f"at most max_length={max_length}",
        "encode with the same max_length",
    )


def make_batch(
    examples: Examples, plan: RowPlan, rows: Sequence[int], *, length: int, batch_size: int
) -> Batch:
    """The arrays of ``rows``; below ``batch_size`` rows, empty ones (mask 0) follow."""
    shape = (batch_size, length)
    batch: Batch = {
        "tokens": np.full(shape, examples.pad, np.int32),
        "targets": np.full(shape, examples.pad, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    for place, row in enumerate(rows):
        start = 0
        for segment, member in enumerate(plan.row(row), start=1):
            tokens, trained = examples[member]
            end = start + len(tokens)
            batch["tokens"][place, start:end] = tokens
            # The last token of a segment predicts nothing: its target stays padding, mask 0.
            batch["targets"][place, start : end - 1] = tokens[1:]
            batch["loss_mask"][place, start : end - 1] = trained[1:]
            batch["positions"][place, start:end] = np.arange(len(tokens))
            batch["segment_ids"][place, start:end] = segment
            start = end
    return batch


def _pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best fit, longest first; the rows' members ascend."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), ascending
    for index in np.argsort(-lengths, kind="stable"):
        need = int(lengths[index])
        place = bisect.bisect_left(open_rows, (need, -1))
        if place == len(open_rows):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(place)
        rows[row].append(int(index))
        if room > need:
            bisect.insort(open_rows, (room - need, row))
    return [sorted(row) for row in rows]
