"""Batches in an order that is a function of (seed, epoch, global row), resumable anywhere.

The training stream is one endless sequence of rows: a permutation of all rows, then another, and so
on. A batch is the next ``batch_size`` rows of it, so a batch may span two epochs, and within an
epoch no row is skipped or repeated. Every process takes its slice of each global batch.

The state is a small JSON of the *global* position. It comes with the batch it belongs to, because
Grain's threads read ahead, and says nothing of processes, so a run resumes on another number of
them; nor of the batch size, so that may change as well.

With length buckets each bucket is such a sequence, and a batch is taken from the one that is
furthest behind: all buckets advance through their epochs together. One bucket is the plain case.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import grain
import numpy as np

from smoa_jax.checks import require
from smoa_jax.data.encode import Examples
from smoa_jax.data.identity import Identity, changed_settings, check_identity, data_identity
from smoa_jax.data.packing import Batch, RowPlan, make_batch

#: JSON-serialisable position in the data; see ``TrainStream``.
StreamState: TypeAlias = dict[str, Any]


def epoch_order(seed: int, epoch: int, rows: int, bucket: int = 0) -> np.ndarray:
    """The permutation of ``range(rows)`` of one epoch.

    Sorting raw bits of a counter-based generator, which NumPy promises to keep, while the streams
    of ``Generator.permutation`` may change from one NumPy release to the next.
    """
    bits = np.random.Philox(key=[seed, bucket], counter=[0, 0, 0, epoch])
    return np.argsort(bits.random_raw(rows), kind="stable")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplesIndex:
    """Examples and the rows they are laid out in: what batches are made from."""

    examples: Examples
    plan: RowPlan

    def __len__(self) -> int:
        return len(self.plan)


class TrainStream:
    """An endless iterator over (batch, state).

    ``state`` is the position *after* its batch: restoring it yields the batch that would have come
    next. It is ``{"positions": [rows taken from each bucket], "seed", "rows", "plan", "data"}``:
    where, in which order, of how many rows, how they are laid out, and of which data.

    Example:
        stream = TrainStream(index, batch_size=32, seed=0)
        batch, state = next(stream)
        ...
        TrainStream(index, batch_size=32, seed=0).restore(state)

    Args:
        index: Examples and their rows.
        batch_size: Rows of a *global* batch.
        seed: Of the order.
        process_index: Which slice of each global batch this process gets.
        process_count: How many slices there are.
        prefetch: Batches to make ahead in the background; 0 makes each when asked for.
        identity: Of the data, to be saved and compared; that of ``index`` alone unless given.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``process_count``.
    """

    def __init__(
        self,
        index: ExamplesIndex,
        batch_size: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
        identity: Identity | None = None,
    ) -> None:
        require(seed >= 0, f"data seed {seed}", "0 or more", "correct data.seed")
        self._index = index
        self._batch_size = batch_size
        self._seed = seed
        self._belongs = {
            "seed": seed,
            "rows": len(index),
            "plan": index.plan.fingerprint(),
            "data": identity or data_identity(index.examples),
        }
        self._slice = slice_of(batch_size, process_index, process_count)
        self._prefetch = prefetch
        self._positions = (0,) * len(index.plan.buckets)
        self._batches: Iterator[tuple[Batch, StreamState]] | None = None

    def __iter__(self) -> Iterator[tuple[Batch, StreamState]]:
        return self

    def __next__(self) -> tuple[Batch, StreamState]:
        if self._batches is None:
            self._batches = self._start()
        batch, state = next(self._batches)
        self._positions = tuple(state["positions"])
        return batch, state

    @property
    def state(self) -> StreamState:
        """The position after the last batch that was handed out."""
        return {"positions": list(self._positions), **self._belongs}

    @property
    def epoch(self) -> float:
        """Epochs handed out so far."""
        return sum(self._positions) / len(self._index)

    def restore(self, state: StreamState) -> TrainStream:
        """Continues after the batch that ``state`` came with; returns the stream itself.

        A state of an earlier version, without ``data``, is taken by what it has; ``unchecked`` says
        what that leaves open.

        Raises:
            ValueError: The state belongs to another seed or to other data.
        """
        _check_state(state, self._belongs)
        self.close()
        self._positions = tuple(int(position) for position in state["positions"])
        return self

    def close(self) -> None:
        """Stops the background threads; the stream may be read on afterwards."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()  # type: ignore[attr-defined]

    def _start(self) -> Iterator[tuple[Batch, StreamState]]:
        source = _BatchSource(
            self._index, self._batch_size, self._belongs, self._slice, self._positions
        )
        options = grain.ReadOptions(
            num_threads=min(self._prefetch, 2), prefetch_buffer_size=self._prefetch
        )
        return iter(grain.MapDataset.source(source).to_iter_dataset(options))


class _BatchSource:
    """Grain's random-access view of the stream: item k is the k-th batch after ``start``."""

    def __init__(
        self,
        index: ExamplesIndex,
        batch_size: int,
        belongs: StreamState,
        rows: slice,
        start: tuple[int, ...],
    ) -> None:
        self._index = index
        self._batch_size = batch_size
        self._belongs = belongs
        self._rows = rows
        plan = index.plan
        self._members = [np.flatnonzero(plan.bucket_of_row == b) for b in range(len(plan.buckets))]
        self._schedule = _Schedule(tuple(map(len, self._members)), batch_size, start)
        self._order = functools.lru_cache(maxsize=4 * len(plan.buckets))(self._epoch)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[Batch, StreamState]:
        bucket, before, after = self._schedule[index]
        first = before[bucket]
        rows = [self._row(bucket, first + offset) for offset in range(self._batch_size)[self._rows]]
        plan = self._index.plan
        batch = make_batch(
            self._index.examples,
            plan,
            rows,
            length=plan.buckets[bucket],
            batch_size=len(rows),
        )
        return batch, {"positions": list(after), **self._belongs}

    def _row(self, bucket: int, position: int) -> int:
        epoch, place = divmod(position, len(self._members[bucket]))
        return int(self._order(bucket, epoch)[place])

    def _epoch(self, bucket: int, epoch: int) -> np.ndarray:
        members = self._members[bucket]
        return members[epoch_order(self._belongs["seed"], epoch, len(members), bucket)]


class _Schedule:
    """Which bucket each batch comes from: the one whose epochs are furthest behind.

    With one bucket every item is a closed formula; with several the sequence is followed from its
    start and remembered.
    """

    def __init__(self, sizes: tuple[int, ...], batch_size: int, start: tuple[int, ...]) -> None:
        self._sizes = sizes
        self._batch_size = batch_size
        self._known: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        self._start = start
        self._lock = threading.Lock()  # Grain asks from several threads

    def __getitem__(self, item: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Bucket, positions before and positions after batch ``item``."""
        if len(self._sizes) == 1:
            first = self._start[0] + item * self._batch_size
            return 0, (first,), (first + self._batch_size,)
        with self._lock:
            while len(self._known) <= item:
                before = self._known[-1][2] if self._known else self._start
                progress = [done / size for done, size in zip(before, self._sizes, strict=True)]
                bucket = progress.index(min(progress))
                after = list(before)
                after[bucket] += self._batch_size
                self._known.append((bucket, before, tuple(after)))
            return self._known[item]


def eval_batches(
    index: ExamplesIndex, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every row exactly once, in order, the last batch filled up with rows of mask 0.

    With buckets, one bucket after the other.
    """
    part = slice_of(batch_size, process_index, process_count)
    plan = index.plan
    for bucket, length in enumerate(plan.buckets):
        rows = np.flatnonzero(plan.bucket_of_row == bucket)
        for start in range(0, len(rows), batch_size):
            mine: Sequence[int] = rows[start : start + batch_size][part].tolist()
            yield make_batch(
                index.examples, plan, mine, length=length, batch_size=part.stop - part.start
            )


def num_eval_batches(index: ExamplesIndex, batch_size: int) -> int:
    """How many ``eval_batches`` there are."""
    return int((-(-np.bincount(index.plan.bucket_of_row) // batch_size)).sum())


def unchecked(state: StreamState) -> str:
    """What ``restore`` cannot compare for want of it in ``state``, in one line; else empty."""
    if "data" in state:
        return ""
    return (
        "the position to resume from was saved by an earlier version: the number of rows and their "
        "layout are as they were, whether the rows themselves are cannot be checked"
    )


def slice_of(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that one of several processes gets.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``process_count``.
    """
    _check_slice(batch_size, process_index, process_count)
    per_process = batch_size // process_count
    return slice(process_index * per_process, (process_index + 1) * per_process)


def _check_slice(batch_size: int, process_index: int, process_count: int) -> None:
    require(
        batch_size >= 1 and batch_size % process_count == 0,
        f"a batch of {batch_size} rows and {process_count} processes",
        "a multiple of the processes",
        "change batch_size",
    )
    require(
        0 <= process_index < process_count,
        f"process {process_index} of {process_count}",
        f"0 to {process_count - 1}",
        "correct process_index",
    )


def _check_state(state: StreamState, belongs: StreamState) -> None:
    """Refuses a position in other data, by the cause that says most: seed, files, settings."""
    data = state.get("data")
    for key in ("seed", "data", "rows", "plan"):
        if key == "data":
            if data is not None:
                check_identity(data, belongs["data"])
            continue
        settings = "" if data is None else changed_settings(data, belongs["data"])
        require(
            state.get(key) == belongs[key],
            f"a data position with {key} {state.get(key)!r}",
            f"{belongs[key]!r}" + (f" ({settings})" if settings else ""),
            "resume with the data settings of the run, or start a new run",
        )
