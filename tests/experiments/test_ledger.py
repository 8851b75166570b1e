"""A ledger holds whole rows, whatever becomes of the process that writes them."""

from __future__ import annotations

import json
import math

import pytest

from smoa_jax.experiments.ledger import append_row, identity_of, read_ledger


def test_rows_come_back_in_order_and_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "deep" / "ledger.jsonl"
    append_row(path, {"run": "a", "metrics": {"loss": math.nan, "losses": [1.5, math.inf]}})
    append_row(path, {"run": "b"})
    assert read_ledger(path) == [
        {"run": "a", "metrics": {"loss": None, "losses": [1.5, None]}},
        {"run": "b"},
    ]


def test_half_a_line_is_passed_over_and_swallows_no_row_after_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append_row(path, {"run": "a", "value": 1})
    with open(path, "a") as file:
        file.write('{"run": "b", "val')
    assert [row["run"] for row in read_ledger(path)] == ["a"]
    append_row(path, {"run": "b", "value": 2})
    assert [row["run"] for row in read_ledger(path)] == ["a", "b"]


def test_a_run_that_is_there_twice_counts_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for value in (1, 2):
        append_row(path, {"run": "a", "value": value})
    assert read_ledger(path) == [{"run": "a", "value": 2}]


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({"event": "step", "step": n}) for n in range(3)))
    with pytest.raises(ValueError, match=r"3 lines without a run; expected a ledger"):
        read_ledger(path)
    assert read_ledger(tmp_path / "none.jsonl") == []


def test_an_identity_depends_on_values_and_not_on_their_order():
    assert identity_of({"a": 1, "b": (2, 3)}) == identity_of({"b": [2, 3], "a": 1})
    assert identity_of({"a": 1}) != identity_of({"a": 2})
