"""A run of several processes is the run of one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from smoa_jax.sharding.processes import DistributedConfig, batch_share
from smoa_jax.training.run import run
from tests.processes import run_processes, start_processes
from tests.training.tiny_run import read_metrics, run_config
from tests.training.train_in_processes import CHANGES

PROGRAM = Path(__file__).with_name("train_in_processes.py")


def adapter_of(directory: Path) -> dict[str, np.ndarray]:
    (path,) = (directory / "adapter").glob("*.safetensors")
    return load_file(path)


def assert_same_run(one: Path, two: Path):
    """Metrics and adapter, up to the order in which devices sum."""
    for event, value in (("train", "loss"), ("eval", "eval_loss"), ("accuracy_after", "accuracy")):
        left, right = (
            [record[value] for record in read_metrics(path, event)] for path in (one, two)
        )
        assert len(left) == len(right)  # the first process alone writes
        np.testing.assert_allclose(left, right, rtol=1e-5)
    left, right = adapter_of(one), adapter_of(two)
    assert left.keys() == right.keys()
    for name, values in left.items():
        np.testing.assert_allclose(right[name], values, atol=1e-4, err_msg=name)
        if "block" in name:
            np.testing.assert_array_equal(right[name], values)


def test_two_processes_train_what_one_trains(base_dir, tmp_path):
    run(run_config(base_dir, tmp_path / "one", **CHANGES["small"]))
    outcomes = run_processes(PROGRAM, [base_dir, tmp_path / "two", "small", "whole"])
    assert outcomes[0]["finished"]
    assert outcomes[1]["loss_after"] == outcomes[0]["loss_after"]
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_processes_stop_together_on_sigterm_and_resume_bit_for_bit(base_dir, tmp_path):
    run(run_config(base_dir, tmp_path / "one", **CHANGES["full"]))
    whole = run_processes(PROGRAM, [base_dir, tmp_path / "two", "full", "whole"])
    assert whole[1]["accuracy_after"] == whole[0]["accuracy_after"]
    assert_same_run(tmp_path / "one", tmp_path / "two")

    broken = [base_dir, tmp_path / "broken", "full"]
    stopped = run_processes(PROGRAM, [*broken, "interrupted"])
    assert [outcome["finished"] for outcome in stopped] == [False, False]
    assert stopped[0]["steps"] == stopped[1]["steps"] < CHANGES["full"]["train_steps"]
    resumed = run_processes(PROGRAM, [*broken, "resumed"])
    assert [outcome["finished"] for outcome in resumed] == [True, True]
    left, right = adapter_of(tmp_path / "two"), adapter_of(tmp_path / "broken")
    for name, values in left.items():
        np.testing.assert_array_equal(right[name], values, err_msg=name)


def test_what_stops_one_process_stops_all_with_its_message(base_dir, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    finished = start_processes(PROGRAM, [base_dir, tmp_path / "taken", "small", "whole"])
    for status, _, errors in finished:
        assert status != 0
        assert "which is not empty; expected a new directory" in errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_processes": 2}, "expected all three"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, "process_id below"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 0}, "initialize=false"),
    ],
)
def test_half_a_cluster_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**fields)


@pytest.mark.parametrize(
    ("axes", "owners", "expected"),
    [
        ((2, 2, 1), [0, 0, 1, 1], (1, 2)),
        ((4, 1, 1), [0, 1, 0, 1], (1, 2)),  # as a torus may order them
        ((1, 2, 2), [0, 1, 0, 1], (0, 1)),  # tensor spans the processes: all hold all rows
        ((2, 1, 2), [0, 1, 2, 3], (0, 2)),
    ],
)
def test_processes_share_a_batch_by_the_rows_their_devices_hold(
    axes, owners, expected, monkeypatch
):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert batch_share(mesh_of(axes, owners)) == expected


def test_rows_that_processes_share_in_part_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"make mesh.tensor a divisor"):
        batch_share(mesh_of((3, 1, 2), [0, 0, 0, 1, 1, 1]))


def mesh_of(axes, owners):
    """What ``batch_share`` looks at of a mesh whose devices belong to ``owners``."""
    devices = np.array([SimpleNamespace(process_index=owner) for owner in owners])
    return SimpleNamespace(
        devices=devices.reshape(axes),
        shape=dict(zip(("data", "fsdp", "tensor"), axes, strict=True)),
    )
