"""Processes that die or hang end the job in time; as many or as few as there are go on from it."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from smoa_jax.sharding.processes import DistributedConfig
from smoa_jax.sharding.watchdog import LOST_PROCESS, Watchdog
from smoa_jax.storage import located
from smoa_jax.training import run as training_run
from smoa_jax.training import run_lock
from smoa_jax.training.run import run
from tests.buckets import s3, s3_server  # noqa: F401
from tests.processes import run_processes, start_processes
from tests.training.test_processes import PROGRAM
from tests.training.tiny_run import read_metrics, run_config
from tests.training.train_in_processes import CHANGES, LAST_STEP, log_rows


def rows_taken(output: Path) -> dict[int, list[str]]:
    """The rows of each step in the order of the processes, each step as it was taken last."""
    parts = sorted(output.parent.glob(f"{output.name}.rows-*"))
    assert parts
    taken: dict[int, list[list[str]]] = {}
    for number, part in enumerate(parts):
        of_process = dict(json.loads(line) for line in part.read_text().splitlines())
        for step, rows in of_process.items():
            taken.setdefault(step, [[] for _ in parts])[number] = rows
    return {step: [row for rows in shares for row in rows] for step, shares in taken.items()}


def losses(output: Path) -> dict[int, float]:
    """By step, each as it was taken last."""
    return {record["step"]: record["loss"] for record in read_metrics(output, "train")}


def check_same(output: Path, expected_rows, expected_losses, start: int) -> None:
    rows, found = rows_taken(output), losses(output)
    assert set(rows) == set(range(start + 1, CHANGES["saving"]["train_steps"] + 1))
    for step, of_step in rows.items():
        assert of_step == expected_rows[step]
        assert found[step] == pytest.approx(expected_losses[step], rel=1e-5)


@pytest.mark.slow
def test_what_a_killed_process_leaves_goes_on_with_other_processes_on_other_meshes(
    base_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(training_run, "train", training_run.train)  # put back afterwards
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    log_rows(Path(f"{whole}.rows-0"))
    run(run_config(base_dir, whole, **CHANGES["saving"]))
    rows, expected = rows_taken(whole), losses(whole)
    assert len(set(rows[1])) == 8  # the rows can be told apart

    ended = start_processes(PROGRAM, [base_dir, broken, "saving", "killed"])
    assert all(status != 0 for status, _, _ in ended)
    assert any(word in ended[0][2] for word in ("another process", "another task", "heartbeat"))
    taken = rows_taken(broken)
    assert {step: taken[step] for step in range(1, LAST_STEP)} == {
        step: rows[step] for step in range(1, LAST_STEP)
    }

    for count, mesh in ((1, {"mesh_fsdp": 4, "mesh_tensor": 2}), (4, {"mesh_data": 2})):
        resumed = tmp_path / f"as-{count}"
        shutil.copytree(broken, resumed)
        found = max(int(p.name) for p in (resumed / "checkpoints").iterdir() if p.name.isdigit())
        assert found in (2, 4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RUN_CHANGES", json.dumps(mesh))
            arguments = [base_dir, resumed, "saving", "resumed"]
            outcomes = run_processes(PROGRAM, arguments, count=count, devices=8 // count)
        assert all(outcome["finished"] for outcome in outcomes)
        check_same(resumed, rows, expected, found)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_job_with_a_message(base_dir, tmp_path):
    ended = start_processes(PROGRAM, [base_dir, tmp_path / "run", "saving", "hung"])
    statuses = [status for status, _, _ in ended]
    assert LOST_PROCESS in statuses
    assert all(status != 0 for status in statuses)
    assert any("distributed.step_timeout=20 s" in errors for _, _, errors in ended)
    assert losses(tmp_path / "run").keys() <= {1, 2}


def test_a_watchdog_ends_what_makes_no_progress_and_nothing_else():
    said, ended = [], threading.Event()

    def end(message: str) -> None:
        said.append(message)
        ended.set()

    watchdog = Watchdog(1.0, "process 1 of 2", end)
    for _ in range(8):
        assert not ended.wait(0.25)
        watchdog.progress()
    assert ended.wait(10)
    assert "no progress in process 1 of 2 for distributed.step_timeout=1 s" in said[0]
    quiet = Watchdog(0.2, "process 0 of 2", lambda _: said.append("late"))
    quiet.stop()
    assert not threading.Event().wait(0.5)
    assert len(said) == 1


@pytest.mark.parametrize("fields", [{"heartbeat_timeout": 0}, {"step_timeout": -1.0}])
def test_times_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match="expected at least 1, and at least 0"):
        DistributedConfig(initialize=True, **fields)


def test_rows_of_steps_differ(tmp_path):
    """The control of the comparison above: another order is seen."""
    output = tmp_path / "run"
    (tmp_path / "run.rows-0").write_text('[1, ["a", "b"]]\n[2, ["c", "d"]]\n[2, ["d", "c"]]\n')
    (tmp_path / "run.rows-1").write_text('[1, ["x", "y"]]\n[2, ["z", "w"]]\n')
    assert rows_taken(output) == {1: ["a", "b", "x", "y"], 2: ["d", "c", "z", "w"]}


@pytest.mark.slow
def test_two_processes_save_into_a_bucket_and_one_goes_on(
    base_dir,
    tmp_path,
    s3,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.4)
    settings = CHANGES["saving"] | {"train_save_every": 3}
    monkeypatch.setenv("RUN_CHANGES", json.dumps({"train_output_dir": f"{s3}/run"} | settings))
    run(run_config(base_dir, tmp_path / "whole", **settings))
    arguments = [base_dir, tmp_path / "unused", "saving", "interrupted"]
    stopped = run_processes(PROGRAM, arguments)
    assert [outcome["finished"] for outcome in stopped] == [False, False]
    steps = {path.name for path in located(f"{s3}/run/checkpoints").iterdir()}
    assert str(stopped[0]["steps"]) in steps
    assert not located(f"{s3}/run/.lock").exists()
    resumed = run(run_config(base_dir, f"{s3}/run", **settings), resume=True)
    assert resumed.finished
    assert losses(located(f"{s3}/run")) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
