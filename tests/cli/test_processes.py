"""Real processes: signals in mid-training, and a life without PyTorch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from smoa_jax.commands.train import INTERRUPTED
from tests.cli.tiny import write_place
from tests.processes import xla_flags
from tests.training.tiny_run import read_metrics

ROOT = Path(__file__).parents[2]
#: How long to wait for a process, on a machine that is busy with others.
PATIENCE_S = 240.0


@pytest.fixture
def place(tmp_path, base):
    """Two hundred steps of a few milliseconds each, without held-out rows."""
    place = write_place(tmp_path, base)
    text = place.config.read_text()
    for old, new in {
        "steps: 120": "steps: 200",
        "save_every: 60": "save_every: 10",
        "eval_rows: 8": "eval_rows: 0",
        "\n  rows: 8": "\n  rows: 0",
        "rank: 8": "rank: 8\n  dropout: 0.1",
    }.items():
        assert old in text
        text = text.replace(old, new)
    place.config.write_text(text)
    return place


def start(arguments: Sequence[object]) -> subprocess.Popen[str]:
    """A Python process on one device; what it compiles is at hand for those after it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(place, run: Path, *options: object) -> subprocess.Popen[str]:
    words = ["train.py", "--config", place.config, "--train.output_dir", run, *options]
    return start(words)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """What a process that ends well, or with another status, has printed."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, err
    return out


def wait_for_saves(process: subprocess.Popen[str], run: Path, count: int) -> int:
    """The step of the ``count``-th save of a run, as soon as it is noted."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        steps = saved_steps(run)
        if len(steps) >= count:
            return steps[count - 1]
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("no checkpoint in time")


def saved_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in records if record["event"] == "save"]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def test_a_run_that_is_killed_and_terminated_ends_as_if_nothing_had_happened(place, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted = train(place, whole)

    process = train(place, broken)
    wait_for_saves(process, broken, 2)  # saving waits for the save before: one is on disk
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "adapter").exists()
    found = checkpoints(broken)[-1]
    assert 10 <= found < 200

    process = train(place, broken, "--resume")
    wait_for_saves(process, broken, len(saved_steps(broken)) + 1)
    process.send_signal(signal.SIGTERM)
    printed = finish(process, INTERRUPTED)
    stopped = read_metrics(broken, "train")[-1]["step"]
    assert [record["step"] for record in read_metrics(broken, "start")] == [0, found]
    assert found < stopped < 200
    assert f"resuming after step {found} of 200" in printed
    assert "stopping: steps under way end first, then it saves" in printed
    assert f"stopped at step {stopped}, saved; --resume goes on from there" in printed
    assert checkpoints(broken)[-1] == stopped
    assert not (broken / "adapter").exists()

    finish(train(place, broken, "--resume"))
    finish(uninterrupted)
    assert [record["step"] for record in read_metrics(broken, "start")][2] == stopped
    for name in ("adapter.safetensors", "adapter.json"):
        expected = (whole / "adapter" / name).read_bytes()
        assert (broken / "adapter" / name).read_bytes() == expected


WITHOUT_TORCH = """
import importlib.abc, sys

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.modules["torch"] = None
sys.meta_path.insert(0, NoTorch())

from smoa_jax.cli import main
from tests.processes import xla_flags

base, config, run = sys.argv[1:]
adapter = ["--model", base, "--adapter", f"{run}/adapter"]
for arguments in (
    ["train", "--config", config, "--train.output_dir", run, "--train.steps", "2"],
    ["generate", *adapter, "--prompt", "sky 7", "--max_new_tokens", "3"],
    ["export", *adapter, "--output", f"{run}/merged"],
    ["export", *adapter, "--output", f"{run}/peft", "--format", "peft"],
    ["generate", "--model", f"{run}/merged", "--prompt", "sky 7", "--max_new_tokens", "3"],
):
    assert main(arguments) == 0, arguments
assert not [name for name in sys.modules if name.startswith("torch.")]
"""


def test_everything_works_where_there_is_no_torch(place, tmp_path):
    run = tmp_path / "run"
    process = start(["-c", WITHOUT_TORCH, place.base, place.config, run])
    printed, warnings = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, warnings
    assert "training 2/2" in printed
    assert "torch" not in (printed + warnings).lower()
    assert (run / "merged" / "model.safetensors").exists()
    assert (run / "peft" / "adapter_model.safetensors").exists()
    assert (run / "merged" / "tokenizer.json").exists()
