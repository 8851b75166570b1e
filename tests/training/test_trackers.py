"""Metrics reach TensorBoard and Weights & Biases, under the same names, once each."""

from __future__ import annotations

import sys
import time

import pytest

from smoa_jax.training.config import TrainConfig
from smoa_jax.training.directory import RunError
from smoa_jax.training.metrics import MetricsWriter
from smoa_jax.training.trackers import check_trackers, open_trackers


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self):
        self.logged, self.closed = [], 0

    def log(self, event, step, values):
        self.logged.append((event, step, dict(values)))

    def close(self):
        self.closed += 1


def test_trackers_get_the_numbers_of_every_event_and_are_closed(tmp_path):
    kept = Kept()
    writer = MetricsWriter(tmp_path, lambda _: [kept])
    writer.write("start", 0, {"data": {"rows": 3}})
    writer.write("train", 1, {"loss": 2.5, "tokens": 7, "note": "words", "missing": None})
    writer.write("eval", 1, {"eval_loss": None})
    writer.close()
    assert kept.logged == [("train", 1, {"loss": 2.5, "tokens": 7})]
    assert kept.closed == 1


def test_tensorboard_files_hold_the_values_by_name(tmp_path):
    settings = TrainConfig(output_dir=str(tmp_path), tensorboard=True)
    [tracker] = open_trackers(settings, tmp_path, {})
    tracker.log("train", 3, {"loss": 2.5})
    tracker.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


class FakeRun:
    """What of a run of Weights & Biases is used here."""

    def __init__(self, id):
        self.id, self.metrics, self.logged, self.finished = id, [], [], False

    def define_metric(self, name, *, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the library, which keeps the runs that were begun."""

    class Library:
        runs: list[tuple[FakeRun, dict]]
        error: Exception | None = None
        Settings = dict

        def init(self, **options):
            if self.error is not None:
                raise self.error
            run = FakeRun(options["id"] or f"run{len(self.runs)}")
            self.runs.append((run, options))
            return run

    library = Library()
    library.runs = []
    monkeypatch.setitem(sys.modules, "wandb", library)
    return library


def test_a_resumed_run_goes_on_under_the_name_it_began_with(tmp_path, wandb):
    settings = TrainConfig(output_dir=str(tmp_path), wandb="my-project")
    (tmp_path / "run").mkdir()
    for step in (4, 3):
        [tracker] = open_trackers(settings, tmp_path / "run", {"train": {"steps": 9}})
        tracker.log("train", step, {"loss": 0.5})
        tracker.close()
    (first, begun), (second, resumed) = wandb.runs
    assert (begun["project"], begun["name"], begun["id"]) == ("my-project", "run", None)
    assert begun["config"] == {"train": {"steps": 9}}
    assert (resumed["id"], resumed["resume"], second.id) == (first.id, "allow", first.id)
    # Step 3 comes again after step 4: an axis, since a count would refuse it.
    assert second.logged == [{"step": 3, "train/loss": 0.5}]
    assert second.metrics == [("*", "step")]
    assert first.finished
    assert second.finished


def test_what_keeps_it_from_starting_is_one_line(tmp_path, wandb):
    wandb.error = RuntimeError("No API key\nconfigured.")
    settings = TrainConfig(output_dir=str(tmp_path), wandb="p")
    with pytest.raises(RunError, match=r"got train\.wandb=p, .*No API key configured.*offline"):
        open_trackers(settings, tmp_path / "run", {})


def test_the_real_library_takes_what_it_is_given(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = TrainConfig(output_dir=str(tmp_path), wandb="p")
    [tracker] = open_trackers(settings, tmp_path, {"train": {"steps": 9}})
    tracker.log("train", 1, {"loss": 2.5})
    tracker.close()
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + 60
    while b"train/loss" not in file.read_bytes():  # a process of its own writes it
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("library", "changes"), [("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb": "p"})]
)
def test_a_missing_library_is_told_before_a_run_begins(tmp_path, monkeypatch, library, changes):
    settings = TrainConfig(output_dir=str(tmp_path), **changes)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}; .*pip install '\.\[track\]'"):
        check_trackers(settings)
    check_trackers(TrainConfig(output_dir=str(tmp_path)))
