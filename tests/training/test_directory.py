"""One run at a time in an output directory, and nothing of it is lost or overwritten unasked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smoa_jax.training.directory import RunDirectory, RunError
from smoa_jax.training.run import run
from tests.training.tiny_run import run_config

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from smoa_jax.training.directory import RunDirectory

with RunDirectory(sys.argv[1]) as directory:
    directory.lock()
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has a run under way in ``tmp_path / "run"``."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_kept_out_until_the_first_ends_however_it_ends(tmp_path, holder):
    with RunDirectory(tmp_path / "run") as second:
        with pytest.raises(RunError, match="another run is under way"):
            second.lock()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        second.lock()
        with (
            RunDirectory(tmp_path / "run") as third,
            pytest.raises(RunError, match="another run is under way"),
        ):
            third.lock()
    with RunDirectory(tmp_path / "run") as last:
        last.lock()


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_a_run_under_way_is_neither_resumed_nor_overwritten(
    base_dir, tmp_path, one_device, holder, how
):
    config = run_config(base_dir, tmp_path / "run")
    RunDirectory(tmp_path / "run").write_config(config)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(RunError, match="another run is under way"):
        run(config, **how)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_of_two_runs_that_both_found_no_directory_one_is_refused(base_dir, tmp_path):
    config = run_config(base_dir, tmp_path / "run")
    with RunDirectory(tmp_path / "run") as first:
        first.begin(config, overwrite=False)
        with (
            RunDirectory(tmp_path / "run") as second,
            pytest.raises(RunError, match="another run"),
        ):
            second.begin(config, overwrite=False)
    with (
        RunDirectory(tmp_path / "run") as third,
        pytest.raises(RunError, match="another run began meanwhile"),
    ):
        third.begin(config, overwrite=False)


def test_overwriting_deletes_everything_but_the_lock(base_dir, tmp_path):
    config = run_config(base_dir, tmp_path / "run")
    old = tmp_path / "run" / "checkpoints" / "4"
    old.mkdir(parents=True)
    (old / "state").write_text("old")
    (tmp_path / "run" / "summary.json").write_text("{}")
    with RunDirectory(tmp_path / "run") as directory:
        directory.begin(config, overwrite=True)
        names = {path.name for path in directory.path.iterdir()}
        assert names == {".lock", "config.yaml"}


def test_a_changed_setting_is_told_with_both_values(base_dir, tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.begin(run_config(base_dir, tmp_path / "run", train_steps=4), overwrite=False)
    changed = run_config(base_dir, tmp_path / "run", train_steps=6, adapter_dropout=0.1)
    assert directory.changed_settings(changed) == [
        "adapter.dropout: 0.0 before, 0.1 now",
        "train.steps: 4 before, 6 now",
    ]
    directory.config_file.write_text("model: {path: x}  # YAML of somebody's own")
    assert directory.changed_settings(changed) == []
