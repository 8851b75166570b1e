"""Data sets through ``datasets``: a directory in the hub's layout stands for the hub."""

from __future__ import annotations

import json

import pytest

from smoa_jax.data.build import build_data
from smoa_jax.data.config import DataConfig, HubConfig
from smoa_jax.data.hub import read_hub
from smoa_jax.data.rows import BadRowError, Row

pytest.importorskip("datasets")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two splits of uneven length, whose columns go by other names."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "made-up"
    directory.mkdir()
    for split, numbers in (("train", range(11)), ("test", range(8, 15))):
        rows = [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in numbers]
        lines = "\n".join(map(json.dumps, rows))
        (directory / f"{split}.jsonl").write_text(lines)
    return str(directory)


COLUMNS = {"instruction": "question", "output": "answer"}


def test_splits_are_rows_and_held_out_ones_that_occur_in_training_are_dropped(smollm2, repository):
    hub = HubConfig(name=repository, eval_split="test")
    data = build_data(DataConfig(hub=hub, columns=COLUMNS), smollm2)
    assert data.config.source == "hub"
    assert data.counts["train"]["rows"] == 11
    assert data.questions.questions == tuple(f"{n} + 1 =" for n in range(11, 15))
    assert data.counts["read"]["eval_in_train"] == 3
    assert data.identity["settings"]["hub.name"] == repository


def test_part_of_a_split_and_rows_taken_out_of_it(smollm2, repository):
    hub = HubConfig(name=repository, train_split="train[:7]")
    data = build_data(DataConfig(hub=hub, columns=COLUMNS, eval_rows=2), smollm2)
    assert (data.counts["train"]["rows"], len(data.questions)) == (5, 2)


def test_rows_say_where_they_are(repository):
    hub = HubConfig(name=repository)
    rows, counts = read_hub(hub, "train", columns=COLUMNS, limit=2)
    assert [row.origin for row in rows] == [f"{repository} train row {n}" for n in (1, 2)]
    assert isinstance(rows[1], Row)
    assert (rows[1].output, counts["bad_rows"]) == ("2", 0)
    with pytest.raises(BadRowError, match="train row 1: got fields question, answer; expected"):
        read_hub(hub, "train")
    with pytest.raises(ValueError, match=r"got an empty split train \(11 bad rows\)"):
        read_hub(hub, "train", on_bad_row="skip")


@pytest.mark.parametrize(
    "changes", [{"name": "no-such/data-set"}, {"train_split": "validation"}, {"subset": "german"}]
)
def test_what_cannot_be_had_is_one_line(smollm2, repository, changes):
    hub = HubConfig(**{"name": repository, **changes})
    with pytest.raises(ValueError, match=r"which cannot be had .*; check name") as error:
        build_data(DataConfig(hub=hub, columns=COLUMNS), smollm2)
    assert "\n" not in str(error.value)


def test_a_missing_library_names_its_extra(smollm2, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[data\]'"):
        build_data(DataConfig(hub=HubConfig(name="a/b")), smollm2)
