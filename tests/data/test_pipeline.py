"""The order is a function of (seed, epoch, row), and a stream resumes anywhere, bit for bit."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from smoa_jax.data.packing import plan_rows
from smoa_jax.data.pipeline import (
    ExamplesIndex,
    TrainStream,
    epoch_order,
    eval_batches,
    num_eval_batches,
)

LAYOUTS = [{}, {"pack": True}, {"buckets": (4, 6)}]


@pytest.fixture
def make_index(make_examples):
    def make(rows: int = 10, **layout) -> ExamplesIndex:
        lengths = [2 + index % 7 for index in range(rows)]
        examples = make_examples(lengths)
        return ExamplesIndex(examples=examples, plan=plan_rows(examples, max_length=8, **layout))

    return make


def members(batch) -> list[int]:
    """The examples in a batch: tokens name them."""
    return batch["tokens"][:, 0].tolist()


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_equal_batches(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_every_epoch_holds_every_row_once_across_uneven_batches(make_index):
    stream = TrainStream(make_index(10), batch_size=4, seed=0)
    order = [member for batch, _ in take(stream, 15) for member in members(batch)]
    epochs = [order[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert stream.epoch == 6.0


def test_the_order_is_pinned():
    """Another NumPy must not change what a resumed run sees."""
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(0, 1, 8).tolist() == [7, 4, 2, 6, 5, 0, 1, 3]
    assert epoch_order(1, 0, 8, bucket=2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]


def test_seeds_give_other_orders_and_the_same_seed_the_same(make_index):
    index = make_index(30)
    orders = [members(next(TrainStream(index, 30, seed))[0]) for seed in (0, 1, 0)]
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_resumed_stream_equals_the_uninterrupted_one(make_index, layout, stop):
    whole = take(TrainStream(make_index(23, **layout), 4, 5), 20)
    stream = TrainStream(make_index(23, **layout), 4, 5)
    state = stream.state if stop == 0 else take(stream, stop)[-1][1]
    resumed = TrainStream(make_index(23, **layout), 4, 5).restore(json.loads(json.dumps(state)))
    for (batch, after), (expected, expected_after) in zip(
        take(resumed, 20 - stop), whole[stop:], strict=True
    ):
        assert_equal_batches(batch, expected)
        assert after == expected_after


def test_the_state_belongs_to_its_batch_however_far_the_threads_have_read(make_index):
    index = make_index(23)
    eager = take(TrainStream(index, 4, 0, prefetch=8), 12)
    lazy = take(TrainStream(index, 4, 0, prefetch=0), 12)
    assert [state for _, state in eager] == [state for _, state in lazy]
    assert [state["positions"] for _, state in eager] == [[4 * k] for k in range(1, 13)]
    for (first, _), (second, _) in zip(eager, lazy, strict=True):
        assert_equal_batches(first, second)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_resumes_on_another_number_of_processes(make_index, layout):
    whole = take(TrainStream(make_index(23, **layout), 4, 0), 9)
    state = whole[2][1]
    parts = [
        TrainStream(make_index(23, **layout), 4, 0, process_index=rank, process_count=2)
        for rank in (0, 1)
    ]
    streams = [take(part.restore(state), 6) for part in parts]
    for (expected, after), *slices in zip(whole[3:], *streams, strict=True):
        joined = {name: np.concatenate([batch[name] for batch, _ in slices]) for name in expected}
        assert_equal_batches(joined, expected)
        assert all(slice_after == after for _, slice_after in slices)


def test_a_run_resumes_with_another_batch_size_without_skipping(make_index):
    rows = [m for batch, _ in take(TrainStream(make_index(), 4, 0), 6) for m in members(batch)]
    _, state = take(TrainStream(make_index(), 4, 0), 3)[-1]
    rest = take(TrainStream(make_index(), 6, 0).restore(state), 2)
    assert [m for batch, _ in rest for m in members(batch)] == rows[12:]


def test_buckets_advance_through_their_epochs_together(make_index):
    index = make_index(60, buckets=(4, 6))
    sizes = np.bincount(index.plan.bucket_of_row)
    stream = TrainStream(index, 4, 0)
    seen: dict[int, list[int]] = {4: [], 6: [], 8: []}
    for batch, state in take(stream, 60):
        length = batch["tokens"].shape[1]
        seen[length] += members(batch)
        progress = np.asarray(state["positions"]) / sizes
        assert progress.max() - progress.min() <= 4 / sizes.min()
    for bucket, length in enumerate((4, 6, 8)):
        in_bucket = np.flatnonzero(index.plan.bucket_of_row == bucket).tolist()
        for start in range(0, len(seen[length]) - len(in_bucket) + 1, len(in_bucket)):
            assert sorted(seen[length][start : start + len(in_bucket)]) == in_bucket


def test_a_stream_can_be_moved_while_its_threads_run(make_index):
    stream = TrainStream(make_index(), 4, 0)
    first, second = take(stream, 2)
    again, _ = next(stream.restore(first[1]))
    assert_equal_batches(again, second[0])
    assert stream.state == second[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "got a data position with seed 1; expected 0"),
        ({"rows": 9}, "got a data position with rows 9; expected 10"),
        ({"plan": "x"}, "got a data position with plan 'x'"),
    ],
)
def test_a_position_in_other_data_is_refused(make_index, change, message):
    stream = TrainStream(make_index(), 4, 0)
    with pytest.raises(ValueError, match=message):
        stream.restore({**stream.state, **change})


def test_slices_that_do_not_divide_are_refused(make_index):
    index = make_index()
    with pytest.raises(ValueError, match="got a batch of 4 rows and 3 processes"):
        TrainStream(index, 4, 0, process_count=3)
    with pytest.raises(ValueError, match="got process 2 of 2"):
        TrainStream(index, 4, 0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="got a batch of 0 rows"):
        next(eval_batches(index, 0))
    with pytest.raises(ValueError, match="got data seed -1"):
        TrainStream(index, 4, -1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_sees_every_row_once_and_fills_up_with_nothing(make_index, layout):
    index = make_index(10, **layout)
    batches = list(eval_batches(index, 4))
    tokens, segments = zip(
        *(
            (row, ids)
            for b in batches
            for row, ids in zip(b["tokens"], b["segment_ids"], strict=True)
        ),
        strict=True,
    )
    seen = [
        m for row, ids in zip(tokens, segments, strict=True) for m in set(row[ids > 0].tolist())
    ]
    assert sorted(seen) == list(range(10))
    lengths = index.examples.lengths
    assert sum(batch["loss_mask"].sum() for batch in batches) == (lengths - 1).sum()
    assert {len(batch["tokens"]) for batch in batches} == {4}
    assert num_eval_batches(index, 4) == len(batches)


def test_evaluation_slices_join_to_the_global_batches(make_index):
    index = make_index(10)
    halves = [eval_batches(index, 4, process_index=rank, process_count=2) for rank in (0, 1)]
    for whole, first, second in zip(eval_batches(index, 4), *halves, strict=True):
        joined = {name: np.concatenate([first[name], second[name]]) for name in whole}
        assert_equal_batches(joined, whole)
