"""Data is told from other data by what is trained on and scored, and the cause is named."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from smoa_jax.data.build import build_data
from smoa_jax.data.config import DataConfig
from smoa_jax.data.encode import Examples
from smoa_jax.data.identity import check_identity, data_identity, examples_digest
from smoa_jax.data.packing import plan_rows
from tests.training.tiny_run import TASK, make_tokenizer


def examples(*rows):
    """Rows of (token, trained) pairs."""
    flat = [pair for row in rows for pair in row]
    return Examples(
        tokens=np.asarray([token for token, _ in flat], np.int32),
        trained=np.asarray([trained for _, trained in flat], np.uint8),
        offsets=np.cumsum([0, *map(len, rows)]),
        pad=0,
        counts={},  # type: ignore[arg-type]
    )


FIRST, SECOND, THIRD = [(5, 0), (6, 1), (7, 1)], [(8, 0), (9, 1)], [(1, 0), (2, 0), (3, 1), (4, 1)]


def test_every_change_of_what_is_trained_changes_the_digest():
    variants = [
        examples(FIRST, SECOND, THIRD),
        examples(SECOND, FIRST, THIRD),
        examples(FIRST, SECOND),
        examples(FIRST + SECOND, THIRD),  # the same tokens in other rows
        examples([(5, 0), (6, 1), (8, 1)], SECOND, THIRD),  # one token
        examples([(5, 0), (6, 0), (7, 1)], SECOND, THIRD),  # one mask
    ]
    assert len({examples_digest(variant) for variant in variants}) == len(variants)
    again = dataclasses.replace(variants[0], offsets=variants[0].offsets.astype(np.int32))
    assert examples_digest(again) == examples_digest(variants[0])


def test_the_plan_alone_cannot_tell_two_data_sets_of_one_size_apart():
    left, right = examples(FIRST, SECOND), examples(SECOND, FIRST)
    plans = [plan_rows(data, max_length=8).fingerprint() for data in (left, right)]
    assert plans[0] == plans[1]
    assert examples_digest(left) != examples_digest(right)


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, first in (("train", 0), ("eval", 100)):
        rows = [{"prompt": f"q {first + n}", "completion": f" a {n}"} for n in range(7)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    return paths


def identity(files, **changes):
    train, held_out = files
    config = DataConfig(
        source="files",
        train_files=(str(train),),
        eval_files=(str(held_out),),
        template="plain",
        max_length=20,
        **changes,
    )
    found = build_data(config, make_tokenizer()).identity
    return json.loads(json.dumps(found))  # as a checkpoint keeps it


@pytest.mark.parametrize("changes", [{}, {"pack": True}, {"buckets": (10,)}])
@pytest.mark.parametrize(
    ("which", "words"),
    [(0, "other training rows than .*train.jsonl changed"), (1, "other held-out rows than .*eval")],
)
def test_the_file_that_changed_is_named(files, changes, which, words):
    before = identity(files, **changes)
    check_identity(before, identity(files, **changes))
    path = files[which]
    path.write_text(path.read_text().replace(" a 3", " a 4"))
    with pytest.raises(ValueError, match=words) as caught:
        check_identity(before, identity(files, **changes))
    assert files[1 - which].name not in str(caught.value)


def test_a_file_that_moved_or_changed_beyond_its_use_is_no_change(files):
    before = identity(files, train_limit=5)
    files[0] = files[0].rename(files[0].with_name("elsewhere.jsonl"))
    with files[0].open("a") as file:
        file.write(json.dumps({"prompt": "more", "completion": " rows"}) + "\n")
    check_identity(before, identity(files, train_limit=5))


def test_a_changed_setting_is_told_from_a_changed_file(files):
    before = identity(files)
    for changes in ({"response_only": False}, {"train_limit": 5}):
        with pytest.raises(ValueError, match="the files are the same, so the tokenizer or a"):
            check_identity(before, identity(files, **changes))


def test_a_file_less_is_told(files):
    before = identity(files)
    now = {**identity(files), "train": "other", "files": before["files"][:1]}
    with pytest.raises(ValueError, match="it read 2 files then, and 1 now"):
        check_identity(before, now)


def test_generated_rows_are_told_apart_too():
    def generated(seed):
        config = DataConfig(
            template="plain", max_length=24, task=dataclasses.replace(TASK, seed=seed)
        )
        return build_data(config, make_tokenizer()).identity

    check_identity(generated(3), generated(3))
    with pytest.raises(ValueError, match=r"training rows and held-out rows than .*a setting in"):
        check_identity(generated(3), generated(4))


def test_no_held_out_rows_have_an_identity_of_their_own():
    with_rows = data_identity(examples(FIRST), examples(SECOND), [])
    without = data_identity(examples(FIRST), None, [])
    with pytest.raises(ValueError, match="got other held-out rows"):
        check_identity(with_rows, without)
