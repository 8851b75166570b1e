"""A position is refused on other data, whatever has changed, and the refusal says what has."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from smoa_jax.data.build import build_data
from smoa_jax.data.config import DataConfig, TaskConfig
from smoa_jax.data.packing import plan_rows
from smoa_jax.data.pipeline import ExamplesIndex, TrainStream, unchecked

LAYOUTS = [{}, {"pack": True}, {"buckets": (4, 6)}]
LENGTHS = [2, 7, 3, 5, 5, 8, 4]


def stream_of(examples, **layout):
    plan = plan_rows(examples, max_length=8, **layout)
    return TrainStream(ExamplesIndex(examples=examples, plan=plan), 2, 0)


def some_state(stream):
    """The position after three batches, as a checkpoint gives it back."""
    states = [state for _, state in itertools.islice(stream, 3)]
    stream.close()
    return json.loads(json.dumps(states[-1]))


def changed(examples, name, index, value):
    array = getattr(examples, name).copy()
    array[index] = value
    return dataclasses.replace(examples, **{name: array})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_rows_of_equal_number_and_lengths_are_refused(make_examples, layout):
    examples = make_examples(LENGTHS)
    state = some_state(stream_of(examples, **layout))
    stream_of(make_examples(LENGTHS), **layout).restore(state)
    last = len(examples.tokens) - 1
    swapped = examples.tokens.copy()
    swapped[examples.offsets[3] : examples.offsets[5]] = [4] * 5 + [3] * 5
    for other in (
        dataclasses.replace(examples, tokens=examples.tokens + 100),
        dataclasses.replace(examples, tokens=swapped),
        changed(examples, "tokens", last, 60),
        changed(examples, "trained", last, 0),
    ):
        with pytest.raises(ValueError, match="got other rows to train on than when the run began"):
            stream_of(other, **layout).restore(state)


def test_the_same_tokens_cut_otherwise_are_other_rows(make_examples):
    examples = dataclasses.replace(make_examples([3, 4]), tokens=np.arange(7, dtype=np.int32))
    other = dataclasses.replace(examples, offsets=np.asarray([0, 4, 7]))
    with pytest.raises(ValueError, match="got other rows to train on"):
        stream_of(other).restore(some_state(stream_of(examples)))


def test_a_position_of_an_earlier_version_is_taken_where_its_own_rule_holds(make_examples):
    examples = make_examples(LENGTHS)
    state = some_state(stream_of(examples))
    assert unchecked(state) == ""
    earlier = {key: state[key] for key in ("positions", "seed", "rows", "plan")}
    assert stream_of(examples).restore(earlier).state == state
    assert "saved by an earlier version" in unchecked(earlier)
    assert "\n" not in unchecked(earlier)
    for other in ({"pack": True}, {"buckets": (4, 6)}):
        with pytest.raises(ValueError, match="got a data position with"):
            stream_of(examples, **other).restore(earlier)
    with pytest.raises(ValueError, match="got a data position with rows 7; expected 6"):
        stream_of(make_examples(LENGTHS[:6])).restore(earlier)


@dataclasses.dataclass
class Place:
    """Two files of rows, the settings that read them, and a tokenizer that knows their words."""

    train: Path
    held_out: Path
    config: DataConfig
    tokenizer: object

    def state(self):
        return some_state(build_data(self.config, self.tokenizer).train_stream(4))

    def resume(self, state, **changes):
        config = dataclasses.replace(self.config, **changes)
        return build_data(config, self.tokenizer).train_stream(4).restore(state)

    def refusal(self, state, **changes) -> str:
        with pytest.raises(ValueError, match="than when the run began") as error:
            self.resume(state, **changes)
        assert "\n" not in str(error.value)
        return str(error.value)


def write(path, numbers, **changes):
    rows = [{"instruction": f"q {n}", "output": f"a {n}"} | changes for n in numbers]
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(params=LAYOUTS)
def place(request, tmp_path, make_tokenizer, chatml):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    write(train, range(10, 23))
    write(held_out, range(30, 35))
    words = " ".join(["q a b", *map(str, range(10, 60))])
    config = DataConfig(
        source="files",
        train_files=(str(train),),
        eval_files=(str(held_out),),
        template="plain",
        max_length=16,
        **request.param,
    )
    return Place(train, held_out, config, make_tokenizer(words + "\n", chat_template=chatml))


def test_the_file_that_changed_is_named(place):
    state = place.state()
    place.resume(state)
    write(place.train, range(40, 53))  # as many rows of as many tokens
    refusal = place.refusal(state)
    assert refusal.startswith(f"{place.train} changed since the run began (SHA-256 ")
    assert "got other rows to train on" in refusal
    assert "held-out" not in refusal


def test_one_changed_word_is_another_data_set(place):
    state = place.state()
    place.train.write_text(place.train.read_text().replace("a 22", "a 11"))
    assert str(place.train) in place.refusal(state)


def test_changed_held_out_rows_are_refused_too(place):
    state = place.state()
    write(place.held_out, range(50, 55))
    refusal = place.refusal(state)
    assert refusal.startswith(f"{place.held_out} changed")
    assert "got other held-out rows" in refusal
    write(place.held_out, range(30, 35), answer="b")  # the same tokens, scored otherwise
    assert "got other held-out rows" in place.refusal(state)


def test_a_file_by_another_name_is_the_same_data(place):
    state = place.state()
    moved = place.train.rename(place.train.with_name("moved.jsonl"))
    place.resume(state, train_files=(str(moved),))
    moved.write_text(moved.read_text() + "\n\n")  # nor does an empty line change a row
    place.resume(state, train_files=(str(moved),))


def test_files_that_come_go_or_change_places_are_named(place, tmp_path):
    more = tmp_path / "more.jsonl"
    write(more, range(23, 30))
    one, both = (str(place.train),), (str(place.train), str(more))
    state = place.state()
    assert f"{more} was not among data.train_files" in place.refusal(state, train_files=both)
    place.config = dataclasses.replace(place.config, train_files=both)
    state = place.state()
    assert f"{more} is gone from data.train_files" in place.refusal(state, train_files=one)
    assert "in another order" in place.refusal(state, train_files=both[::-1])


@pytest.mark.parametrize(
    ("setting", "value", "was"),
    [
        ("response_only", False, "True"),
        ("template", "chat", "plain"),
        ("train_limit", 9, "0"),
        ("max_length", 8, "16"),
    ],
)
def test_a_setting_that_changes_rows_is_named(place, setting, value, was):
    if setting == "max_length":
        place.train.write_text(place.train.read_text().replace("a 22", "a 22" + " b" * 4))
    state = place.state()
    refusal = place.refusal(state, **{setting: value})
    assert "from the same files by other settings" in refusal
    assert f"data.{setting} is {value} and was {was}" in refusal


def test_a_setting_that_changes_no_row_is_no_matter(place):
    place.resume(place.state(), on_bad_row="skip", train_limit=99, prefetch=0)


def test_another_tokenizer_is_told_apart(place, make_tokenizer):
    state = place.state()
    place.tokenizer = make_tokenizer(*map(str, range(59, 9, -1)), "q a b\n")
    assert "by the same settings; expected the same tokens" in place.refusal(state)


def test_a_layout_that_changed_is_named(place):
    state = place.state()
    other = {"pack": not place.config.pack, "buckets": ()}
    with pytest.raises(ValueError, match=r"got a data position with .*data\.pack is"):
        place.resume(state, **other)


def test_generated_rows_are_refused_by_the_settings_of_their_task(make_tokenizer):
    tokenizer = make_tokenizer(*map(str, range(10)), "parity of = odd even\n")

    def data(**task):
        rows = TaskConfig(name="parity", digits=1, terms=5, train_rows=12, eval_rows=4)
        config = DataConfig(
            source="arithmetic", task=dataclasses.replace(rows, **task), template="plain"
        )
        return build_data(config, tokenizer).train_stream(4)

    state = some_state(data())
    data().restore(state)
    with pytest.raises(ValueError, match=r"data\.task\.seed is 3 and was 0") as error:
        data(seed=3).restore(state)
    assert "other rows to train on and held-out rows" in str(error.value)
    with pytest.raises(ValueError, match=r"got other held-out rows .*data\.task\.eval_rows is 0"):
        data(eval_rows=0).restore(state)
