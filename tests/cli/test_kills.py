"""Killed again and again, at moments nobody chose, a run comes to what it would have come to."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.test_processes import PATIENCE_S, checkpoints, finish, start
from tests.cli.tiny import write_place
from tests.training.tiny_run import read_metrics

#: Steps of a few milliseconds each, every fourth one saved, which takes longer than it.
CHANGES = {
    "steps: 120": "steps: 240",
    "save_every: 60": "save_every: 4",
    "eval_rows: 8": "eval_rows: 5",
    "\n  rows: 8": "\n  rows: 0",
    "rank: 8": "rank: 8\n  dropout: 0.1",
}


@pytest.fixture
def place(tmp_path, base):
    place = write_place(tmp_path, base)
    text = place.config.read_text()
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    place.config.write_text(text)
    return place


def launch(place, run: Path, *options: object) -> subprocess.Popen[str]:
    words = ["train.py", "--config", place.config, "--train.output_dir", run, *options]
    return start(words)


def started(run: Path) -> int:
    """How often a run has got as far as training."""
    return len(read_metrics(run, "start")) if (run / "metrics.jsonl").exists() else 0


def kill_some_time_after_it_starts(process, run: Path, before: int, seconds: float) -> bool:
    """Whether it was killed rather than finished."""
    deadline = time.monotonic() + PATIENCE_S
    while started(run) <= before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_at_many_moments_loses_nothing_but_steps_it_takes_again(place, tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    moments = random.Random(seed)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(launch(place, whole))

    kills, resumed = 0, [0]
    for attempt in range(12):
        options = ["--resume"] if (broken / "config.yaml").exists() else []
        process = launch(place, broken, *options)
        killed = kill_some_time_after_it_starts(
            process, broken, started(broken), moments.uniform(0.0, 0.8)
        )
        kills += killed
        if not killed:
            break
        known = checkpoints(broken)
        resumed.append(known[-1] if known else 0)
        assert resumed[-1] >= resumed[-2], attempt  # nothing that was saved is lost
    finish(launch(place, broken, "--resume"))
    assert kills >= 4
    assert read_metrics(broken, "start")[-1]["step"] == resumed[-1]
    for name in ("adapter.safetensors", "adapter.json"):
        expected = (whole / "adapter" / name).read_bytes()
        assert (broken / "adapter" / name).read_bytes() == expected
    assert not list((broken / "checkpoints").glob("damaged-*"))
    taken = {record["step"] for record in read_metrics(broken, "train")}
    assert taken == set(range(1, 241))
