"""A save that fails costs no more than itself: the run is told, goes on, and saves again."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
import time

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.training.checkpoints import Identity, TrainingCheckpoints
from smoa_jax.training.run import RunError, run
from tests.training.tiny_run import read_metrics, run_config

IDENTITY = Identity(adapter_config={"rank": 4}, base_fingerprint="base")


@contextlib.contextmanager
def no_room():
    """No file of this process may grow over a few KiB, as on a disk that is almost full.

    The system itself refuses, in Orbax's own layers too, which Python could not stand in for.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state_of(step: int) -> dict[str, jax.Array]:
    """Values that don't compress."""
    return {"weights": jax.random.normal(jax.random.key(step), (64, 96))}


def abstract(state):
    where = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)


def test_a_full_disk_costs_one_checkpoint_and_the_one_before_it_stands(tmp_path):
    with TrainingCheckpoints(tmp_path, identity=IDENTITY, keep_last=1) as checkpoints:
        checkpoints.save(1, state_of(1), {}, wait=True)
        with no_room():
            checkpoints.save(2, state_of(2), {})
            with pytest.raises(CheckpointError, match=r"no checkpoint of step 2 \(.*1 stands"):
                checkpoints.wait()
        assert checkpoints.all_steps() == [1]
        with TrainingCheckpoints(tmp_path, identity=IDENTITY, read_only=True) as reader:
            restored = reader.restore(None, abstract(state_of(1)))
        np.testing.assert_array_equal(restored.state["weights"], state_of(1)["weights"])
        assert checkpoints.save(3, state_of(3), {}, wait=True)
        assert checkpoints.all_steps() == [3]
        restored = checkpoints.restore(3, abstract(state_of(3)))
        np.testing.assert_array_equal(restored.state["weights"], state_of(3)["weights"])
        (note,) = checkpoints.notes
        assert "got no checkpoint of step 2" in note
    assert {path.name for path in tmp_path.iterdir() if any(path.iterdir())} == {"3"}


def test_a_run_goes_on_over_a_full_disk_and_says_so(
    base_dir, tmp_path, one_device, capsys, monkeypatch
):
    config = run_config(base_dir, tmp_path / "run", train_steps=6, train_save_every=2)
    full, savers, save = contextlib.ExitStack(), [], TrainingCheckpoints.save

    def kept(self, *arguments, **options):
        savers.append(self)
        return save(self, *arguments, **options)

    monkeypatch.setattr(TrainingCheckpoints, "save", kept)
    monkeypatch.setattr(TrainingCheckpoints, "busy", False)  # none is put off

    def on_step(taken):
        while savers and savers[-1]._steps.busy:  # the disk is full for the whole of a save
            time.sleep(0.01)
        if taken.step == 3:
            full.enter_context(no_room())
        if taken.step == 5:
            full.close()
        return True

    assert run(config, on_step=on_step).finished
    assert "got no checkpoint of step 4" in capsys.readouterr().out
    steps = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert "4" not in steps
    assert "6" in steps
    assert len(read_metrics(tmp_path / "run", "train")) == 6


def test_an_output_directory_that_cannot_be_written_is_one_line(
    base_dir, tmp_path, one_device, monkeypatch
):
    original = tempfile.NamedTemporaryFile

    def read_only(*arguments, **options):
        if str(options.get("dir")) == str(tmp_path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))
        return original(*arguments, **options)

    def no_weights(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    monkeypatch.setattr("smoa_jax.training.prepare.load_model", no_weights)
    with pytest.raises(ValueError, match=r"run, which cannot be written \(.*[Rr]ead-only"):
        run(run_config(base_dir, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_turns_read_only_costs_one_checkpoint(tmp_path, monkeypatch):
    def read_only(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), options["dir"])

    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save(1, state_of(1), {}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "NamedTemporaryFile", read_only)
            checkpoints.save(2, state_of(2), {})
            with pytest.raises(CheckpointError, match=r"step 3 .*Read-only.*that of step 1 stands"):
                checkpoints.save(3, state_of(3), {}, wait=True)
        assert checkpoints.all_steps() == [1]
        assert checkpoints.save(4, state_of(4), {}, wait=True)
        assert checkpoints.all_steps() == [1, 4]


def test_a_save_that_is_due_while_another_goes_on_is_made_up_for(
    base_dir, tmp_path, one_device, monkeypatch
):
    """Slow storage: what is due at steps 2 and 4 waits until nothing is being saved."""
    answers = iter([False, True, True, False])
    monkeypatch.setattr(TrainingCheckpoints, "busy", property(lambda _: next(answers)))
    config = run_config(base_dir, tmp_path / "run", train_steps=9, train_save_every=2)
    assert run(config, on_step=lambda taken: taken.step < 7).finished is False
    saves = [record["step"] for record in read_metrics(tmp_path / "run", "save")]
    assert saves == [2, 6, 7]


def test_a_run_that_is_stopped_saves_once(base_dir, tmp_path, one_device):
    config = run_config(base_dir, tmp_path / "run", train_steps=9, train_save_every=2)
    assert not run(config, on_step=lambda taken: taken.step < 4).finished
    saves = [record["step"] for record in read_metrics(tmp_path / "run", "save")]
    assert saves[-1] == 4
    assert saves.count(4) == 1
    with pytest.raises(RunError, match="--resume goes on"):
        run(config)
