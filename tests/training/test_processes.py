"""A run of several processes is the run of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from smoa_jax.sharding.processes import DistributedConfig
from smoa_jax.training.loop import run
from tests.processes import run_processes, start_processes
from tests.training.tiny_run import read_metrics, run_config
from tests.training.train_in_processes import CHANGES

PROGRAM = Path(__file__).with_name("train_in_processes.py")


def adapter_of(directory: Path) -> dict[str, np.ndarray]:
    (path,) = (directory / "adapter").glob("*.safetensors")
    return load_file(path)


def test_two_processes_train_what_one_trains(base_dir, tmp_path):
    run(run_config(base_dir, tmp_path / "one", **CHANGES))
    outcomes = run_processes(PROGRAM, [base_dir, tmp_path / "two", "whole"])
    assert outcomes[0]["finished"]
    assert outcomes[1]["loss_after"] == outcomes[0]["loss_after"]
    assert outcomes[1]["accuracy_after"] == outcomes[0]["accuracy_after"]
    for event, value in (("train", "loss"), ("eval", "eval_loss"), ("accuracy_after", "accuracy")):
        one, two = (
            [record[value] for record in read_metrics(tmp_path / name, event)]
            for name in ("one", "two")
        )
        assert len(two) == len(one)  # the first process alone writes
        np.testing.assert_allclose(two, one, rtol=1e-5)
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, atol=1e-4, err_msg=name)
        if "block" in name:
            np.testing.assert_array_equal(two[name], values)


@pytest.mark.slow
def test_processes_stop_together_on_sigterm_and_resume_bit_for_bit(base_dir, tmp_path):
    run_processes(PROGRAM, [base_dir, tmp_path / "whole", "whole"])
    stopped = run_processes(PROGRAM, [base_dir, tmp_path / "broken", "interrupted"])
    assert [outcome["finished"] for outcome in stopped] == [False, False]
    assert stopped[0]["steps"] == stopped[1]["steps"] < CHANGES["train_steps"]
    resumed = run_processes(PROGRAM, [base_dir, tmp_path / "broken", "resumed"])
    assert [outcome["finished"] for outcome in resumed] == [True, True]
    whole, broken = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "broken")
    for name, values in whole.items():
        np.testing.assert_array_equal(broken[name], values, err_msg=name)


def test_what_stops_one_process_stops_all_with_its_message(base_dir, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    finished = start_processes(PROGRAM, [base_dir, tmp_path / "taken", "whole"])
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
