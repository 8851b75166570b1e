"""Training rows that memory does not hold: read, tokenised and packed when they come up.

The rows stay on disk, where any of them is at hand: JSON Lines files by the offsets of their lines,
data sets of the hub by their own index. Grain draws them in a random order without end, and its
packing for streams lays them out. The state is Grain's, plain JSON of a few numbers; it comes with
the batch it belongs to, and says nothing of processes, since each of them goes through all rows and
takes its slice of every batch.

Held-out rows are known whole, training rows never: so a training row is left out whose question a
held-out row asks, where otherwise the held-out row would be.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import grain.experimental
import numpy as np

from smoa_jax.checks import require
from smoa_jax.data.identity import Identity, check_identity
from smoa_jax.data.packing import Batch
from smoa_jax.data.pipeline import StreamState, slice_of
from smoa_jax.data.rows import AnyRow, BadRowError, OnBadRow
from smoa_jax.data.sources import Record
from smoa_jax.data.splits import question_keys
from smoa_jax.storage import local_copy

#: Rows of a batch, at the least, that Grain fills at a time: more waste less.
_OPEN_ROWS = 32

#: (ids, trained flags) of one example.
Example = tuple[np.ndarray, np.ndarray]


class Records(Protocol):
    """Records on disk, any of them at hand; safe to read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class JsonLines:
    """The records of JSON Lines files, found by the offsets of their lines (8 bytes a row).

    Raises:
        ValueError: A file that is missing or of another kind.
        BadRowError: On reading a line that is not JSON.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self._paths = [local_copy(path) for path in paths]
        for path in self._paths:
            require(
                path.suffix == ".jsonl" and path.is_file(),
                f"data file {path} to stream",
                "a readable file of one object a line, ending in .jsonl",
                "convert it, or read it whole with data.stream=false",
            )
        found = [_line_offsets(path) for path in self._paths]
        self._offsets = [offsets for offsets, _ in found]
        #: SHA-256 of each file, whose lines have all gone by.
        self.digests = [digest for _, digest in found]
        self._ends = np.cumsum([len(offsets) for offsets in self._offsets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        which = int(np.searchsorted(self._ends, index, side="right"))
        line = index - (int(self._ends[which - 1]) if which else 0)
        path = self._paths[which]
        with path.open("rb") as file:
            file.seek(self._offsets[which][line])
            text = file.readline()
        origin = f"{path} line at byte {self._offsets[which][line]}"
        try:
            return origin, json.loads(text)
        except ValueError as error:
            raise BadRowError(
                f"{origin}: got a line that is not JSON ({error}); expected one object per line"
            ) from error


class HubRecords:
    """The records of a ``datasets.Dataset``."""

    def __init__(self, name: str, dataset: Any):
        self._name, self._dataset = name, dataset
        #: Of its rows, by the library itself.
        self.fingerprint = str(dataset._fingerprint)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        return f"{self._name} row {index + 1}", self._dataset[index]


class StreamedRows:
    """Records on their way to examples.

    Attributes:
        counts: Rows dropped so far: ``bad_rows``, ``prompt_too_long``, ``train_in_eval``.

    Args:
        records: On disk.
        parse: A record's row.
        encode: A row's examples (none: its prompt leaves no room) of at most ``max_length`` tokens.
        max_length: Positions of a packed row.
        pad: Id that fills up rows.
        held_out: What questions of held-out rows are recognised by.
        on_bad_row: Whether a row without the expected fields stops the run or is counted.
        limit: Use the first so many records alone; 0: all.
    """

    def __init__(
        self,
        records: Records,
        parse: Callable[[Record], AnyRow],
        encode: Callable[[AnyRow], list[Example]],
        *,
        max_length: int,
        pad: int,
        held_out: Collection[bytes] = (),
        on_bad_row: OnBadRow = "error",
        limit: int = 0,
    ):
        self.counts: Counter[str] = Counter()
        self.records, self.max_length, self.pad = records, max_length, pad
        self._size = min(limit or len(records), len(records))
        self._parse, self._encode = parse, encode
        self._held_out, self._on_bad_row = frozenset(held_out), on_bad_row
        self._lock = threading.Lock()  # Grain asks from several threads
        self._below = 0

    def require_ids_below(self, vocab_size: int) -> None:
        """From now on, refuse token ids that a model of so many embeddings has none for.

        Rows in memory are looked at before a run; these, when they come up.
        """
        self._below = vocab_size

    def __len__(self) -> int:
        return self._size

    def examples(self, index: int) -> list[dict[str, np.ndarray]]:
        """What record ``index`` gives to learn; dropped rows give nothing and are counted."""
        try:
            row = self._parse(self.records[index])
            if self._held_out.intersection(question_keys(row)):
                return self._dropped("train_in_eval")
            examples = self._encode(row)
        except BadRowError:
            if self._on_bad_row == "error":
                raise
            return self._dropped("bad_rows")
        if not examples:
            return self._dropped("prompt_too_long")
        largest = max(int(tokens.max()) for tokens, _ in examples)
        require(
            not self._below or largest < self._below,
            f"token id {largest} in record {index + 1} for a model with {self._below} embeddings",
            "smaller ids",
            "use the tokenizer of this model",
        )
        return [{"tokens": tokens, "trained": trained} for tokens, trained in examples]

    def _dropped(self, why: str) -> list[dict[str, np.ndarray]]:
        with self._lock:
            self.counts[why] += 1
        return []


class _Unfold(grain.experimental.FlatMapTransform):
    """A record's examples become elements of their own."""

    max_fan_out = 1 << 30

    def flat_map(self, element: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        return element


class PackedStream:
    """An endless iterator over (batch, state), as ``TrainStream`` is, of streamed rows.

    Every batch is packed: examples share rows without seeing each other.

    Args:
        rows: On their way.
        batch_size: Rows of a *global* batch.
        seed: Of the order.
        identity: Of the data, saved with every position.
        process_index: Which slice of each global batch this process gets.
        process_count: How many slices there are.
        prefetch: Batches to make ahead in the background.
    """

    def __init__(
        self,
        rows: StreamedRows,
        batch_size: int,
        seed: int,
        *,
        identity: Identity,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ):
        self._rows, self._batch_size, self._prefetch = rows, batch_size, prefetch
        self._slice = slice_of(batch_size, process_index, process_count)
        # Grain's own packing depends on them.
        self._belongs = {"seed": seed, "batch_size": batch_size, "data": identity}
        self._seed = seed
        self._batches: Any = None

    def __iter__(self) -> Iterator[tuple[Batch, StreamState]]:
        return self

    def __next__(self) -> tuple[Batch, StreamState]:
        if self._batches is None:
            self._batches = iter(self._dataset())
        packed = next(self._batches)
        state = {"grain": self._batches.get_state(), **self._belongs}
        return _as_batch(packed, self._slice, self._rows.pad), state

    def restore(self, state: StreamState) -> PackedStream:
        """Continues after the batch that ``state`` came with; returns the stream itself.

        Raises:
            ValueError: The state belongs to another seed, batch size or other data.
        """
        check_identity(state["data"], self._belongs["data"])
        for name in ("seed", "batch_size"):
            require(
                state.get(name) == self._belongs[name],
                f"a position in streamed data of {name} {state.get(name)}",
                f"{self._belongs[name]}",
                f"set {name} as it was, or start a new run in another train.output_dir",
            )
        self.close()
        self._batches = iter(self._dataset())
        self._batches.set_state(state["grain"])
        return self

    def close(self) -> None:
        """Stops the background threads; the stream may be read on afterwards, from its start."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()

    def _dataset(self) -> Any:
        rows, length = self._rows, self._rows.max_length
        threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4 * self._batch_size)
        order = grain.MapDataset.source(range(len(rows))).seed(self._seed).shuffle()
        examples = order.repeat().map(rows.examples).to_iter_dataset(threads)
        examples = grain.experimental.FlatMapIterDataset(examples, _Unfold())
        packed = grain.experimental.FirstFitPackIterDataset(
            examples,
            length_struct={"tokens": length, "trained": length},
            padding_struct={"tokens": rows.pad, "trained": 0},
            num_packing_bins=max(self._batch_size, _OPEN_ROWS),
            seed=self._seed,
        )
        batches = packed.batch(self._batch_size, drop_remainder=True)
        if not self._prefetch:
            return batches
        return grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=self._prefetch
        )


def _as_batch(packed: dict[str, np.ndarray], rows: slice, pad: int) -> Batch:
    """Grain's packed rows as the arrays that a step takes, as ``make_batch`` lays them out."""
    tokens, trained = packed["tokens"][rows], packed["trained"][rows]
    segments = packed["tokens_segment_ids"][rows]
    # The last token of a segment predicts nothing: its target is padding, mask 0.
    within = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = np.full_like(tokens, pad)
    targets[:, :-1] = np.where(within, tokens[:, 1:], pad)
    mask = np.zeros(tokens.shape, np.float32)
    mask[:, :-1] = within & (trained[:, 1:] > 0)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": targets.astype(np.int32),
        "loss_mask": mask,
        "positions": packed["tokens_positions"][rows].astype(np.int32),
        "segment_ids": segments.astype(np.int32),
    }


def _line_offsets(path: Path) -> tuple[np.ndarray, str]:
    """Where each line that is not blank begins, and the SHA-256 of all of them."""
    offsets, start, digest = [], 0, hashlib.sha256()
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                offsets.append(start)
            start += len(line)
    return np.asarray(offsets, np.int64), digest.hexdigest()
