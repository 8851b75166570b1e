"""Rows of batches: every example once, segments apart, nothing trained across their seams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoa_jax.data.packing import make_batch, plan_rows

LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=40)


def all_rows(examples, plan, bucket=0):
    rows = np.flatnonzero(plan.bucket_of_row == bucket).tolist()
    return make_batch(
        examples, plan, rows, length=plan.buckets[bucket], batch_size=max(1, len(rows))
    )


def test_a_packed_row_written_out(make_examples):
    examples = make_examples([3, 2], pad=9)
    plan = plan_rows(examples, max_length=7, pack=True)
    batch = make_batch(examples, plan, [0], length=7, batch_size=2)
    empty = [0] * 7
    np.testing.assert_array_equal(batch["tokens"], [[0, 0, 0, 1, 1, 9, 9], [9] * 7])
    np.testing.assert_array_equal(batch["targets"], [[0, 0, 9, 1, 9, 9, 9], [9] * 7])
    np.testing.assert_array_equal(batch["loss_mask"], [[1, 1, 0, 1, 0, 0, 0], empty])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0, 1, 0, 0], empty])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 2, 2, 0, 0], empty])
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "loss_mask": "float32",
        "positions": "int32",
        "segment_ids": "int32",
    }


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS)
def test_packing_loses_and_repeats_nothing(make_examples, lengths):
    examples = make_examples(lengths)
    plan = plan_rows(examples, max_length=12, pack=True)
    assert sorted(plan.members.tolist()) == list(range(len(lengths)))
    assert all(examples.lengths[plan.row(row)].sum() <= 12 for row in range(len(plan)))
    batch = all_rows(examples, plan)
    alone = all_rows(examples, plan_rows(examples, max_length=12))
    assert batch["loss_mask"].sum() == alone["loss_mask"].sum() == sum(lengths) - len(lengths)
    # Tokens name their example here: a counted target is of the same example as its token.
    counted = batch["loss_mask"] == 1
    np.testing.assert_array_equal(batch["targets"][counted], batch["tokens"][counted])
    # Positions restart exactly where a segment does.
    starts = np.diff(batch["segment_ids"], axis=1, prepend=0) > 0
    np.testing.assert_array_equal((batch["positions"] == 0) & (batch["segment_ids"] > 0), starts)
    assert starts.sum() == len(lengths)


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS)
def test_packing_never_leaves_two_rows_that_fit_in_one(make_examples, lengths):
    examples = make_examples(lengths)
    plan = plan_rows(examples, max_length=12, pack=True)
    used = sorted(int(examples.lengths[plan.row(row)].sum()) for row in range(len(plan)))
    assert len(used) < 2 or used[0] + used[1] > 12


def test_each_example_goes_to_the_shortest_bucket_that_holds_it(make_examples):
    examples = make_examples([2, 4, 5, 8, 9, 3])
    plan = plan_rows(examples, max_length=16, buckets=(4, 8))
    lengths = [plan.buckets[bucket] for bucket in plan.bucket_of_row]
    assert lengths == [4, 4, 8, 8, 16, 4]
    assert plan_rows(make_examples([5, 6]), max_length=16, buckets=(4, 8)).buckets == (8,)


def test_without_buckets_rows_have_the_length_asked_for(make_examples):
    assert plan_rows(make_examples([2, 3]), max_length=16).buckets == (16,)


def test_plans_of_other_data_have_other_fingerprints(make_examples):
    plans = [
        plan_rows(make_examples([3, 4, 5]), max_length=8),
        plan_rows(make_examples([3, 4, 5, 5]), max_length=8),
        plan_rows(make_examples([3, 4, 5]), max_length=9),
        plan_rows(make_examples([3, 4, 5]), max_length=8, pack=True),
        plan_rows(make_examples([3, 4, 5]), max_length=8, buckets=(4,)),
    ]
    assert len({plan.fingerprint() for plan in plans}) == len(plans)
    again = plan_rows(make_examples([3, 4, 5]), max_length=8)
    assert again.fingerprint() == plans[0].fingerprint()


def test_plans_that_cannot_be_are_refused(make_examples):
    examples = make_examples([3, 4])
    with pytest.raises(ValueError, match="got pack=True and buckets="):
        plan_rows(examples, max_length=8, pack=True, buckets=(4,))
    with pytest.raises(ValueError, match="got buckets=\\(9,\\)"):
        plan_rows(examples, max_length=8, buckets=(9,))
    with pytest.raises(ValueError, match="got an example of 4 tokens"):
        plan_rows(examples, max_length=3)
