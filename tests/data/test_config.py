"""From a configuration to batches and questions."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from smoa_jax.data.build import build_data
from smoa_jax.data.config import DataConfig, HubConfig, TaskConfig
from smoa_jax.data.identity import changed_settings
from smoa_jax.data.pipeline import eval_batches

PAPER_DATA = Path(
    os.environ.get("SMOA_PAPER_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)


def test_arithmetic_comes_with_batches_questions_and_counts(smollm2):
    config = DataConfig(
        source="arithmetic",
        task=TaskConfig(name="weave", train_rows=50, eval_rows=9),
        max_length=64,
        template="plain",
    )
    data = build_data(config, smollm2)
    batch, state = next(data.train_stream(8))
    assert batch["tokens"].shape == (8, 64)
    assert state["positions"] == [8]
    assert data.eval is not None
    assert sum((b["segment_ids"].max(axis=1) > 0).sum() for b in eval_batches(data.eval, 4)) == 9
    assert len(data.questions) == 9
    question, answer = data.questions.questions[0], data.questions.references[0]
    assert smollm2.decode(data.questions.prompts[0]) == question + "\n"
    first, second = question.removesuffix(" =").split(" @ ")
    assert answer == first[0] + second[0] + first[1] + second[1]
    assert data.counts["train"] == {
        "rows": 50,
        "batch_rows": 50,
        "bad_rows": 0,
        "prompt_too_long": 0,
        "responses_truncated": 0,
        "texts_divided": 0,
        "response_tokens": 50 * 5,
    }
    assert data.counts["eval"]["rows"] == 9
    assert data.counts["read"]["eval_in_train"] == 0


def write_rows(path, numbers):
    rows = [{"instruction": f"question {n}", "input": "", "output": str(n)} for n in numbers]
    path.write_text(json.dumps(rows))
    return str(path)


def test_held_out_files_and_taken_out_rows_share_no_question_with_training(smollm2, tmp_path):
    train = write_rows(tmp_path / "train.json", range(40))
    test = write_rows(tmp_path / "test.json", range(35, 50))
    explicit = DataConfig(source="files", train_files=(train,), eval_files=(test,))
    data = build_data(explicit, smollm2)
    assert data.questions.references == tuple(str(n) for n in range(40, 50))
    assert data.counts["read"]["eval_in_train"] == 5
    for share in ({"eval_rows": 4}, {"eval_fraction": 0.1}):
        data = build_data(DataConfig(source="files", train_files=(train,), **share), smollm2)
        assert (data.counts["train"]["rows"], len(data.questions)) == (36, 4)
    alone = build_data(DataConfig(source="files", train_files=(train,), train_limit=7), smollm2)
    assert (len(alone.train), alone.eval, len(alone.questions)) == (7, None, 0)
    with pytest.raises(ValueError, match="which is none; expected at least one row"):
        build_data(DataConfig(source="files", train_files=(train,), eval_fraction=0.001), smollm2)


def test_bad_rows_are_counted_on_both_sides(smollm2, tmp_path):
    path = tmp_path / "mixed.json"
    many_turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    rows = [{"prompt": "a", "completion": "b"}, {"what": 1}, {"messages": many_turns}]
    path.write_text(json.dumps(rows))
    config = DataConfig(
        source="files", train_files=(str(path),), on_bad_row="skip", template="alpaca"
    )
    data = build_data(config, smollm2)
    assert data.counts["read"]["bad_rows"] == 1
    assert data.counts["train"]["bad_rows"] == 1
    assert len(data.train) == 1


def test_packing_and_buckets_are_options(smollm2):
    task = TaskConfig(name="parity", train_rows=60, eval_rows=0)
    packed = build_data(
        DataConfig(source="arithmetic", task=task, pack=True, template="plain"), smollm2
    )
    assert packed.counts["train"]["batch_rows"] == len(packed.train) < 10
    bucketed = build_data(
        DataConfig(source="arithmetic", task=task, buckets=(20, 21, 22, 30)), smollm2
    )
    assert set(bucketed.train.plan.buckets) <= {20, 21, 22, 30, 256}
    assert len(bucketed.train) == 60


def test_every_setting_reaches_what_it_is_about(smollm2, tmp_path):
    train = write_rows(tmp_path / "train.json", range(30))
    test = write_rows(tmp_path / "test.json", range(30, 50))
    base = DataConfig(source="files", train_files=(train,), eval_files=(test,))

    def build(**changes):
        return build_data(dataclasses.replace(base, **changes), smollm2)

    reference = build()
    assert next(build(seed=1).train_stream(30))[1]["seed"] == 1
    assert len(build(eval_limit=3).questions) == 3
    assert build(response_only=False).train.examples.trained.all()
    assert not reference.train.examples.trained.all()
    assert build(max_length=99).train.plan.buckets == (99,)
    plain = build(template="plain").questions.prompts[0]
    assert smollm2.decode(plain) == "question 30\n"
    share = DataConfig(source="files", train_files=(train,), eval_rows=5)
    kept = [
        build_data(dataclasses.replace(share, seed=seed), smollm2).questions.references
        for seed in (0, 1)
    ]
    assert kept[0] != kept[1]
    tasks = [
        DataConfig(source="arithmetic", task=TaskConfig(seed=seed, train_rows=5, eval_rows=5))
        for seed in (0, 1)
    ]
    drawn = [build_data(task, smollm2).questions.questions for task in tasks]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "web"}, "got data.source='web'; expected one of auto, files, hub"),
        ({"source": "hub"}, "got data.source=hub with data.hub.name=''; expected hub and a name"),
        (
            {"source": "files", "hub": HubConfig(name="a/b")},
            "got data.source=files with data.hub.name='a/b'",
        ),
        (
            {"train_files": ("a.json",), "hub": HubConfig(name="a/b")},
            "got data files and data.hub.name; expected one of them",
        ),
        (
            {"hub": HubConfig(name="a/b", eval_split="test"), "eval_fraction": 0.5},
            "got held-out files or a split with data.eval_rows or data.eval_fraction",
        ),
        ({"columns": {"question": "q"}}, "got data.columns with question; expected fields of"),
        ({"template": "vicuna"}, "got data.template='vicuna'"),
        ({"on_bad_row": "ignore"}, "got data.on_bad_row='ignore'"),
        ({"max_length": 1}, "got data.max_length=1"),
        ({"seed": -1}, "got data.seed=-1"),
        ({"eval_fraction": 1.0}, "got data.eval_fraction=1.0"),
        (
            {"source": "arithmetic", "train_files": ("a.json",)},
            "got data files with data.source=arithmetic",
        ),
        (
            {"source": "files", "train_files": ("a",), "eval_rows": 1, "eval_fraction": 0.1},
            "got data.eval_rows and data.eval_fraction",
        ),
        (
            {"source": "files", "train_files": ("a",), "eval_files": ("b",), "eval_rows": 1},
            "got held-out files or a split with data.eval_rows",
        ),
    ],
)
def test_contradicting_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=r"got (data|held-out)") as error:
        DataConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize("source", ["auto", "files"])
def test_no_task_is_generated_unasked(smollm2, source):
    with pytest.raises(ValueError, match=r"rows to train on; name data\.train_files"):
        build_data(DataConfig(source=source), smollm2)
    with pytest.raises(ValueError, match=r"data\.hub\.name, or data\.eval_files"):
        build_data(DataConfig(source=source), smollm2, held_out_only=True)
    with pytest.raises(ValueError, match=r"rows to train on; name data\.train_files"):
        build_data(DataConfig(source=source, eval_files=("held-out.jsonl",)), smollm2)


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ASKED = {"instruction": "a", "output": "b"}
JOINED = {"prompt": "a", "completion": "b"}
BARE = {"text": "words to the end"}


@pytest.mark.parametrize(
    ("rows", "template"),
    [
        ([ASKED, ASKED], "alpaca"),
        ([JOINED, JOINED], "plain"),
        ([JOINED, ASKED], "alpaca"),
        ([ASKED, CHAT], "chat"),
        ([BARE, BARE], "plain"),
        ([BARE, JOINED], "plain"),
    ],
)
def test_files_and_their_rows_say_what_auto_means(smollm2, tmp_path, rows, template):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    data = build_data(DataConfig(train_files=(str(path),)), smollm2)
    assert (data.config.source, data.config.template) == ("files", template)
    asked = dataclasses.replace(data.config, template="plain")
    assert build_data(asked, smollm2).config.template == "plain"
    alone = DataConfig(eval_files=(str(path),))
    held_out = build_data(alone, smollm2, held_out_only=True)
    assert held_out.train is None
    assert held_out.eval is not None
    assert (held_out.config.template, len(held_out.eval)) == (template, len(rows))


def test_columns_of_other_names_reach_both_splits(smollm2, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n} + 1 =", "solution": str(n + 1)} for n in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"instruction": "question", "output": "solution"}
    split = DataConfig(train_files=(str(path),), eval_rows=2, columns=columns)
    assert len(build_data(split, smollm2).questions) == 2
    files = DataConfig(
        train_files=(str(path),), eval_files=(str(path),), train_limit=5, columns=columns
    )
    assert build_data(files, smollm2).questions.questions == tuple(
        row["question"] for row in rows[5:]
    )
    unmapped = dataclasses.replace(files, columns={})
    with pytest.raises(ValueError, match=r"rows\.jsonl row 1: got fields question, solution"):
        build_data(unmapped, smollm2)


def test_columns_explain_other_rows_and_earlier_positions_know_none(smollm2, tmp_path):
    assert "columns" not in DataConfig().row_settings()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "b", "reply": "c"}))
    config = DataConfig(train_files=(str(path),), columns={})
    other = dataclasses.replace(config, columns={"output": "reply"})
    first, second = (build_data(each, smollm2).identity for each in (config, other))
    assert "data.columns is {'output': 'reply'} and was unset" in changed_settings(first, second)


def test_a_bad_task_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="got arithmetic task 'nope'"):
        DataConfig(source="arithmetic", task=TaskConfig(name="nope"))
    with pytest.raises(ValueError, match="got train_rows=0"):
        TaskConfig(train_rows=0)


@pytest.mark.paper_data
def test_the_papers_rows_are_read_and_encoded_whole(smollm2):
    files = sorted(PAPER_DATA.glob("*/*.json"))
    if not files:
        pytest.skip(f"the papers' task data is not at {PAPER_DATA}; set SMOA_PAPER_DATA")
    for file in files:
        config = DataConfig(
            source="files",
            train_files=(str(file),),
            train_limit=60,
            eval_rows=20,
            max_length=512,
        )
        data = build_data(config, smollm2)
        assert data.counts["train"]["rows"] + data.counts["eval"]["rows"] >= 59, file
        assert data.counts["train"]["responses_truncated"] == 0, file
