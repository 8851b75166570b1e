"""Streamed rows: every one of them, once an epoch, packed apart, resumed bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from smoa_jax.data import identity
from smoa_jax.data.build import build_data
from smoa_jax.data.config import DataConfig, HubConfig
from smoa_jax.data.packing import make_batch, plan_rows
from smoa_jax.data.rows import BadRowError, Text
from smoa_jax.data.streaming import JsonLines, PackedStream, StreamedRows, _as_batch


class Numbered:
    """Record i is a row of 2 + i % 7 tokens, all of them i + 1."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return f"record {index}", index


def streamed(count=23, **options):
    def parse(record):
        return Text(text=str(record[1]), origin=record[0])

    def encode(row):
        number = int(row.text)
        length = 2 + number % 7
        trained = np.asarray([0] + [1] * (length - 1), np.uint8)
        return [(np.full(length, number + 1, np.int32), trained)]

    defaults = {"max_length": 16, "pad": 0}
    return StreamedRows(Numbered(count), parse, encode, **defaults | options)


def open_stream(count=23, batch_size=4, seed=0, **options):
    identity = {"train": "t", "eval": "", "train_files": [], "eval_files": [], "settings": {}}
    return PackedStream(streamed(count), batch_size, seed, identity=identity, **options)


def examples_of(batch):
    """(record, ids) of every segment, in the order of rows."""
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            ids = tokens[segments == segment]
            assert len(set(ids.tolist())) == 1
            found.append((int(ids[0]) - 1, len(ids)))
    return found


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_every_record_comes_whole_and_once_an_epoch(prefetch):
    stream = open_stream(prefetch=prefetch)
    seen = [e for batch, _ in itertools.islice(stream, 40) for e in examples_of(batch)]
    stream.close()
    assert all(length == 2 + record % 7 for record, length in seen)
    counts = np.bincount([record for record, _ in seen], minlength=23)
    # Bins are emitted together: an epoch may end within them, and no record is ahead by more.
    assert counts.min() >= counts.max() - 2 > 5


def test_packed_rows_are_laid_out_as_those_in_memory(make_examples):
    examples = make_examples([3, 5, 2, 4, 7])
    plan = plan_rows(examples, max_length=16, pack=True)
    rows = list(range(len(plan)))
    expected = make_batch(examples, plan, rows, length=16, batch_size=len(rows))
    trained = np.zeros_like(expected["tokens"])
    for place, row in enumerate(rows):
        flags = np.concatenate([examples[member][1] for member in plan.row(row)])
        trained[place, : len(flags)] = flags
    packed = {
        "tokens": expected["tokens"],
        "trained": trained,
        "tokens_segment_ids": expected["segment_ids"],
        "tokens_positions": expected["positions"],
    }
    assert_equal(_as_batch(packed, slice(None), examples.pad), expected)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_stream_resumes_bit_for_bit_from_the_state_of_any_batch(prefetch):
    whole = list(itertools.islice(open_stream(prefetch=prefetch), 14))
    for stop in (1, 8, 9):
        state = json.loads(json.dumps(whole[stop - 1][1]))
        resumed = open_stream(prefetch=prefetch).restore(state)
        for (first, _), (second, _) in zip(whole[stop:], resumed, strict=False):
            assert_equal(first, second)
        resumed.close()


def test_processes_share_one_sequence_of_batches_and_one_state():
    whole = list(itertools.islice(open_stream(), 5))
    halves = [
        list(itertools.islice(open_stream(process_index=i, process_count=2), 5)) for i in (0, 1)
    ]
    for (batch, state), (first, left), (second, right) in zip(whole, *halves, strict=True):
        assert_equal(batch, {name: np.concatenate([first[name], second[name]]) for name in batch})
        assert state == left == right


def test_seeds_order_records_otherwise():
    orders = [examples_of(next(open_stream(seed=seed))[0]) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_a_position_in_another_stream_is_refused():
    _, state = next(open_stream())
    with pytest.raises(ValueError, match=r"got a position in streamed data of seed 0; expected 1"):
        open_stream(seed=1).restore(state)
    with pytest.raises(ValueError, match=r"of batch_size 4; expected 8"):
        open_stream(batch_size=8).restore(state)
    other = {**state, "data": {**state["data"], "train": "others"}}
    with pytest.raises(ValueError, match=r"got other rows to train on"):
        open_stream().restore(other)


# ----------------------------------------------------------------------------------- from files


@pytest.fixture
def files(tmp_path):
    """Two files of rows, one with a blank line and a broken one, and held-out rows of which some
    occur in training."""
    rows = [{"prompt": f"question {n}\n", "completion": str(n)} for n in range(40)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(lines[:15]) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\r\n".join([*lines[15:30], '{"prompt": ']))
    (tmp_path / "eval.jsonl").write_text("\n".join(lines[27:35]))
    return tmp_path


def config_of(files, **changes):
    options = {
        "train_files": (str(files / "a.jsonl"), str(files / "b.jsonl")),
        "eval_files": (str(files / "eval.jsonl"),),
        "on_bad_row": "skip",
        "max_length": 32,
        "stream": True,
    }
    return DataConfig(**options | changes)


def test_lines_are_found_by_their_offsets(files):
    records = JsonLines([files / "a.jsonl", files / "b.jsonl"])
    assert len(records) == 31
    assert [records[i][1]["completion"] for i in (0, 14, 15, 29)] == ["0", "14", "15", "29"]
    with pytest.raises(BadRowError, match=r"b\.jsonl line at byte \d+: got a line that is not JS"):
        records[30]
    with pytest.raises(ValueError, match=r"got data file .*a\.json to stream; expected"):
        JsonLines([files / "a.json"])


def test_streamed_files_are_read_once_before_a_run_and_known_by_their_content(
    smollm2, files, monkeypatch
):
    hashed = []
    digest = identity._file_digest
    monkeypatch.setattr(identity, "_file_digest", lambda name: hashed.append(name) or digest(name))
    config = config_of(files)
    data = build_data(config, smollm2)
    assert hashed == list(config.eval_files)
    assert data.identity["train_files"] == [[name, digest(name)] for name in config.train_files]


def test_rows_are_dropped_for_what_they_are_and_counted(smollm2, files):
    data = build_data(config_of(files), smollm2)
    assert (len(data.questions), data.config.template) == (8, "plain")
    assert data.counts["train"] == {"streamed_rows": 31}
    stream = data.train_stream(4)
    texts = set()
    for batch, _ in itertools.islice(stream, 12):
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                texts.add(smollm2.decode(tokens[segments == segment], skip_special_tokens=True))
    stream.close()
    # Questions 27, 28 and 29 are held out; line 30 is broken.
    assert texts == {f"question {n}\n{n}" for n in range(27)}
    assert data.streamed.counts["train_in_eval"] >= 3
    assert data.streamed.counts["bad_rows"] >= 1


def test_a_bad_row_stops_a_stream_unless_told_otherwise(smollm2, files):
    # To evaluate, the training rows are not even opened.
    data = build_data(config_of(files, on_bad_row="error"), smollm2, held_out_only=True)
    assert (data.streamed, data.train, len(data.questions)) == (None, None, 8)
    lines = (files / "b.jsonl").read_text().splitlines()
    (files / "b.jsonl").write_text("\n".join([*lines[:-1] * 5, lines[-1]]))
    data = build_data(config_of(files, on_bad_row="error"), smollm2)
    with pytest.raises(BadRowError, match="got a line that is not JSON"):
        list(itertools.islice(data.train_stream(4), 40))


def test_ids_that_a_model_has_no_embedding_for_are_refused_when_they_come_up(smollm2, files):
    data = build_data(config_of(files), smollm2)
    data.streamed.require_ids_below(len(smollm2))
    next(data.train_stream(2))
    data.streamed.require_ids_below(9)
    with pytest.raises(ValueError, match=r"got token id \d+ in record \d+ for a model with 9 emb"):
        next(data.train_stream(2))


def test_a_changed_file_is_named_when_a_stream_resumes(smollm2, files):
    _, state = next(build_data(config_of(files), smollm2).train_stream(4))
    with (files / "b.jsonl").open("a") as file:
        file.write('\n{"prompt": "more", "completion": "rows"}')
    with pytest.raises(ValueError, match=r"b\.jsonl changed since the run began .*other rows to"):
        build_data(config_of(files), smollm2).train_stream(4).restore(state)


def test_a_limit_takes_the_first_records_alone(smollm2, files):
    data = build_data(config_of(files, train_limit=3, eval_files=()), smollm2)
    batch, _ = next(data.train_stream(1))
    assert len(data.streamed) == 3
    assert {f"question {n}" in smollm2.decode(batch["tokens"][0]) for n in range(3)} == {True}


def test_a_data_set_of_the_hub_streams_too(smollm2, files, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", files / "cache")
    directory = files / "hub"
    directory.mkdir()
    (files / "a.jsonl").rename(directory / "train.jsonl")
    text = (directory / "train.jsonl").read_text().removeprefix("\ufeff")
    (directory / "train.jsonl").write_text(text)
    hub = HubConfig(name=str(directory))
    data = build_data(config_of(files, train_files=(), eval_files=(), hub=hub), smollm2)
    batch, state = next(data.train_stream(2))
    assert "question" in smollm2.decode(batch["tokens"][0])
    again = build_data(config_of(files, train_files=(), eval_files=(), hub=hub), smollm2)
    again.train_stream(2).restore(state).close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_files": (), "eval_rows": 3}, "got data.stream=true with data.eval_rows"),
        ({"buckets": (8,)}, "got data.stream=true with data.eval_rows, data.eval_fraction or"),
        (
            {"source": "arithmetic", "train_files": (), "eval_files": ()},
            "got data.stream=true with data.source=arithmetic",
        ),
    ],
)
def test_what_streaming_cannot_have_is_refused(files, changes, message):
    with pytest.raises(ValueError, match="got data") as error:
        config_of(files, **changes)
    assert message in str(error.value)


def test_streaming_is_of_no_account_where_it_is_not_asked_for(files):
    config = dataclasses.replace(config_of(files), stream=False)
    assert "stream" not in config.row_settings()
