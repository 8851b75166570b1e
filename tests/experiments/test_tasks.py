"""What runs learn and are scored on: pairs, splits without a common question, the same order."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from smoa_jax.data.config import DataConfig, TaskConfig
from smoa_jax.data.rows import Row
from smoa_jax.data.tokenizer import load_tokenizer
from smoa_jax.evaluation.answers import score_responses
from smoa_jax.experiments.config import GridConfig, MethodConfig, ProbeConfig, ScoringConfig
from smoa_jax.experiments.tasks import build_task, plain_text, probe_rows
from tests.cli.tiny import write_rows
from tests.experiments.tiny_grid import grid_config
from tests.training.tiny_run import write_base

PAPER_DATA = Path(
    os.environ.get("SMOA_PAPER_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("tasks") / "base")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def arithmetic(base, **changes):
    task = TaskConfig(name="parity", digits=1, terms=2, train_rows=20, eval_rows=13)
    data = DataConfig(source="arithmetic", task=task, template="plain", max_length=24)
    settings = {"probe": ProbeConfig(), "data": data, "scoring": ScoringConfig(test_rows=5)}
    return grid_config(base, Path("out"), **(settings | changes))


def test_the_probes_pairs_are_distinct_random_and_a_function_of_the_seed():
    with pytest.raises(ValueError, match="at most 8"):
        ProbeConfig(pairs=200, characters=1)
    rows = probe_rows(ProbeConfig(pairs=120, characters=2), 3)
    pairs = [row for row in rows if isinstance(row, Row)]
    assert [len(row.instruction + row.output) for row in pairs] == [4] * 120
    assert len({row.instruction for row in pairs}) == 120
    assert rows == probe_rows(ProbeConfig(pairs=120, characters=2), 3)
    assert rows != probe_rows(ProbeConfig(pairs=120, characters=2), 4)


def test_every_pair_is_trained_on_as_often_and_asked_for(base, tokenizer):
    config = grid_config(base, Path("out"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=11))
    task = build_task(config, 2, tokenizer)
    assert len(task.splits["test"].questions) == 11
    assert "validation" not in task.splits
    rows = task.batches["tokens"].reshape(11 * 8, 12)
    _, counts = np.unique(rows, axis=0, return_counts=True)
    assert counts.tolist() == [8] * 11


def test_a_pair_that_does_not_fit_is_refused(base, tokenizer):
    config = grid_config(base, Path("out"), data=DataConfig(template="plain", max_length=5))
    with pytest.raises(ValueError, match=r"pairs longer than data.max_length=5"):
        build_task(config, 0, tokenizer)


def test_training_validation_and_test_have_no_question_in_common(base, tokenizer):
    task = build_task(arithmetic(base), 0, tokenizer)
    asked = [set(task.splits[name].questions.questions) for name in ("validation", "test")]
    assert [len(part) for part in asked] == [8, 5]
    assert not asked[0] & asked[1]
    trained = {tokenizer.decode(row) for row in task.batches["tokens"].reshape(-1, 24)}
    assert not any(question in text for text in trained for question in asked[0] | asked[1])


def test_seeds_change_the_order_and_not_what_is_asked(base, tokenizer):
    config = arithmetic(base)
    first, again, other = (build_task(config, seed, tokenizer) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.batches["tokens"], again.batches["tokens"])
    assert (first.batches["tokens"] != other.batches["tokens"]).any()
    for name in ("validation", "test"):
        assert first.splits[name].questions.questions == other.splits[name].questions.questions


def test_test_rows_that_occur_elsewhere_are_dropped_and_counted(base, tokenizer, tmp_path):
    def rows(*names):
        return [(name, f"of {name}") for name in names]

    files = {
        "train": write_rows(tmp_path / "train.jsonl", rows(*"abcdefgh")),
        "valid": write_rows(tmp_path / "valid.jsonl", rows(*"hijk")),
        "test": write_rows(tmp_path / "test.jsonl", rows(*"abknopq")),
    }
    data = DataConfig(
        train_files=(str(files["train"]),),
        eval_files=(str(files["valid"]),),
        template="plain",
        max_length=24,
    )
    scoring = ScoringConfig(test_files=(str(files["test"]),))
    task = build_task(arithmetic(base, data=data, scoring=scoring), 0, tokenizer)
    assert task.splits["validation"].questions.questions == ("i", "j", "k")
    assert task.splits["test"].questions.questions == ("n", "o", "p", "q")
    assert (task.counts["test_in_train"], task.counts["test_in_validation"]) == (2, 1)


def test_plain_text_fills_whole_rows_and_is_named(base, tokenizer):
    index, name = plain_text(grid_config(base, Path("out")), tokenizer)
    assert index.examples.lengths.tolist() == [18] * 3
    assert index.examples.trained.all()
    assert name.startswith("pydoc_data.topics of Python 3.")


def test_what_makes_no_experiment_is_refused(base):
    method = {"x": MethodConfig()}
    for make, words in (
        (lambda: GridConfig(), "without methods"),
        (lambda: GridConfig(methods=method, learning_rates=()), "x without a learning rate"),
        (lambda: GridConfig(methods=method, refine_seeds=(0,)), "distinct seeds"),
        (lambda: GridConfig(methods=method, learning_rates=(0.0,)), "positive"),
        (lambda: arithmetic(base, scoring=ScoringConfig()), "without test rows"),
        (lambda: grid_config(base, Path("o"), data=DataConfig()), "template=auto"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.paper_data
@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_equations_of_mawps_come_to_their_answers(name):
    path = PAPER_DATA / "mawps" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    rows = json.loads(path.read_text())
    score = score_responses(
        [row["output"] for row in rows], [row["answer"] for row in rows], "mawps"
    )
    # Not all of the data set's equations do; they are counted in docs/study.md.
    assert score.correct == {"train": 1842, "valid": 232, "test": 235}[name]
