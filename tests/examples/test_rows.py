"""The rows that are shipped are what their script writes."""

from __future__ import annotations

import runpy

from tests.processes import ROOT

ROWS = ROOT / "examples" / "appointments"


def test_shipped_rows_are_those_of_the_script_and_held_out_ones_are_others(tmp_path):
    runpy.run_path(str(ROWS / "make_rows.py"))["make"](tmp_path)
    lines = {}
    for name, count in (("train", 200), ("eval", 50)):
        text = (ROWS / f"{name}.jsonl").read_text(encoding="utf-8")
        assert (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8") == text
        lines[name] = set(text.splitlines())
        assert len(lines[name]) == count
    assert not lines["train"] & lines["eval"]
