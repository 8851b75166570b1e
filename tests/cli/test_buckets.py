"""A run whose rows, spectra, output and export all lie in a bucket, killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smoa_jax import storage
from smoa_jax.cli import main
from smoa_jax.storage import located
from smoa_jax.training import run_lock
from tests.buckets import s3, s3_server  # noqa: F401
from tests.cli.test_processes import PATIENCE_S
from tests.cli.tiny import refusal
from tests.processes import xla_flags

ROOT = Path(__file__).parents[2]
#: In a process of its own what the tests do in theirs: one of eight devices.
PROGRAM = """
import sys
from smoa_jax.cli import main
from tests.cli.conftest import on_one_device

with on_one_device():
    sys.exit(main(sys.argv[1:]))
"""


def train_words(place, rows: object, run: object, cache: object) -> list[str]:
    return [
        *("train", "--config", str(place.config), "--train.steps", "400"),
        *("--train.save_every", "100", "--evaluation.rows", "0"),
        *("--data.train_files", f"[{rows}]", "--train.output_dir", str(run)),
        *("--model.spectra_cache", str(cache)),
    ]


def kill_after_a_checkpoint(words: list[str], directory: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": xla_flags(8)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    files, deadline = storage.filesystem(directory), time.monotonic() + PATIENCE_S
    while not any(name.endswith("/complete.json") for name in files.find(str(directory))):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_resumed_and_exported_as_if_on_disk(
    place,
    tmp_path,
    s3,  # noqa: F811
    one_device,
    monkeypatch,
    capsys,
):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.4)
    rows = located(f"{s3}/rows.jsonl")
    rows.write_bytes(place.rows.read_bytes())
    run, local = f"{s3}/runs/mine", tmp_path / "local"
    words = train_words(place, rows, run, f"{s3}/spectra")
    kill_after_a_checkpoint(words, located(f"{run}/checkpoints"))
    assert located(f"{run}/.lock").exists()
    assert not located(f"{run}/adapter").exists()

    assert main([*words, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "still goes on" in printed
    assert "resuming after step" in printed
    assert f"adapter: {run}/adapter" in printed
    names = {path.name for path in located(run).iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "adapter", "summary.json"}
    assert list(located(f"{s3}/spectra").iterdir())

    assert main(train_words(place, place.rows, local, "off")) == 0
    for name in ("adapter.safetensors", "adapter.json"):
        found = located(f"{run}/adapter/{name}").read_bytes()
        assert found == (local / "adapter" / name).read_bytes(), name

    for source, output in ((run, f"{s3}/merged"), (local, tmp_path / "merged")):
        export = ["export", "--model", str(place.base), "--adapter", str(source)]
        assert main([*export, "--output", str(output)]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        found = located(f"{s3}/merged/{name}").read_bytes()
        assert found == (tmp_path / "merged" / name).read_bytes(), name
    ask = ["--prompt", "sky 7", "--max_new_tokens", "4"]
    capsys.readouterr()
    assert main(["generate", "--model", f"{s3}/merged", "--template", "plain", *ask]) == 0
    assert "blue" in capsys.readouterr().out
    named = ["--model", str(place.base), "--adapter", run, "--checkpoint", "last"]
    assert main(["generate", *named, *ask]) == 0
    assert "blue" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--train.output_dir", "--data.train_files", "--model.path"])
def test_a_bucket_that_is_not_there_is_refused_before_any_weight_is_read(
    place,
    s3,  # noqa: F811
    one_device,
    monkeypatch,
    capsys,
    option,
):
    def no_weights(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("smoa_jax.training.prepare.load_model", no_weights)
    name = "s3://no-such-bucket/rows.jsonl"
    value = f"[{name}]" if option.endswith("files") else name
    line = refusal(capsys, ["train", "--config", place.config, option, value])
    assert name in line
    assert not place.run.exists()
