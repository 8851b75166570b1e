"""What a run says of settings that cost more than they are worth."""

from __future__ import annotations

import dataclasses
import json

import pytest

from smoa_jax.data.build import build_data
from smoa_jax.training.checks import advice_on_length, advice_on_steps
from tests.training.tiny_run import make_tokenizer, run_config


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    record = {"prompt": "one two", "completion": "three"}
    path.write_text("\n".join(json.dumps(record) for _ in range(6)))
    return str(path)


def test_rows_that_are_mostly_padding_are_told_with_the_length_that_would_do(rows, tmp_path):
    tokenizer = make_tokenizer()

    def said(**changes):
        options = {"source": "files", "train_files": (rows,), "task": None} | changes
        settings = {f"data_{name}": value for name, value in options.items() if value is not None}
        config = run_config(tmp_path, tmp_path / "run", **settings)
        data = build_data(config.data, tokenizer)
        return advice_on_length(config, data), int(data.train.examples.lengths.max())

    text, longest = said(max_length=64)
    assert f"the longest row has {longest} tokens" in text
    assert f"data.max_length=64; {longest} would be" in text
    assert said(max_length=2 * longest)[0] != ""
    assert said(max_length=2 * longest - 1)[0] == ""
    assert said(max_length=64, pack=True)[0] == ""
    assert said(max_length=64, buckets=(longest,))[0] == ""


def test_a_run_of_few_steps_says_what_makes_them_few(tmp_path):
    config = run_config(tmp_path, tmp_path / "run", train_steps=0, train_epochs=2.0)
    assert "steps: 9 in all, of train.batch_size=8" in advice_on_steps(config, 9)
    assert advice_on_steps(config, 10) == ""
    asked = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=9))
    assert advice_on_steps(asked, 9) == ""
