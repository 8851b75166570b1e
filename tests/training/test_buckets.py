"""A run in a bucket, where nothing is renamed, appended or locked: checkpoints, metrics, lock."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from smoa_jax import storage
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.storage import located
from smoa_jax.training import growing
from smoa_jax.training.checkpoints import Identity, TrainingCheckpoints
from smoa_jax.training.growing import GrowingFiles
from smoa_jax.training.run_lock import Taken, _BucketLock
from tests.buckets import bucket, gcs_server, gs, s3, s3_server  # noqa: F401
from tests.test_storage import names

IDENTITY = Identity(adapter_config={"rank": 4}, base_fingerprint="base")


def state_of(step: int) -> dict[str, jax.Array]:
    return {"weights": jax.random.normal(jax.random.key(step), (9, 7)), "key": jax.random.key(step)}


def abstract():
    where = SingleDeviceSharding(jax.devices()[0])
    struct = jax.eval_shape(lambda: state_of(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), struct)


def check_restored(checkpoints: TrainingCheckpoints, step: int) -> None:
    restored = checkpoints.restore(None, abstract())
    assert (restored.step, restored.data_position) == (step, {"row": step})
    np.testing.assert_array_equal(restored.state["weights"], state_of(step)["weights"])
    assert restored.state["key"] == state_of(step)["key"]


def test_checkpoints_come_back_bit_for_bit_and_the_last_and_best_are_kept(bucket):  # noqa: F811
    directory = f"{bucket}/run/checkpoints"
    losses = {3: 2.5, 5: 1.5, 8: 2.0}
    with TrainingCheckpoints(directory, identity=IDENTITY, keep_last=1) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state_of(step), {"row": step}, {"eval_loss": loss})
        checkpoints.wait()
        assert checkpoints.all_steps() == [5, 8]
        check_restored(checkpoints, 8)
    assert {name.split("/")[2] for name in names(bucket)} == {"5", "8"}
    with TrainingCheckpoints(directory, identity=None, read_only=True) as reader:
        assert (reader.best_step(), reader.latest_step()) == (5, 8)
        check_restored(reader, 8)
    other = Identity(adapter_config={"rank": 5}, base_fingerprint="base")
    with pytest.raises(CheckpointError, match="belongs to another run: got rank=4"):
        TrainingCheckpoints(directory, identity=other)


def test_a_step_counts_when_it_is_whole_and_only_then(s3):  # noqa: F811
    directory = located(f"{s3}/checkpoints")
    with TrainingCheckpoints(str(directory), identity=IDENTITY, keep_last=4) as checkpoints:
        for step in (0, 1, 2, 3):
            checkpoints.save(step, state_of(step), {"row": step}, wait=True)
    (directory / "3" / "complete.json").unlink()  # as if killed before the end of the upload
    with TrainingCheckpoints(str(directory), identity=IDENTITY, read_only=True) as reader:
        assert reader.all_steps() == [0, 1, 2]
    record = located(f"{s3}/checkpoints/1/record/metadata")
    record.write_bytes(record.read_bytes()[:-4])
    with TrainingCheckpoints(str(directory), identity=IDENTITY, read_only=True) as reader:
        check_restored(reader, 2)
        with pytest.raises(CheckpointError, match=r"checkpoints/1: can't be read .*bytes instead"):
            reader.restore(1, abstract())
    content = next(name for name in names(s3) if name.startswith("checkpoints/2/state/ocdbt.p"))
    path = located(f"{s3}/{content}")
    path.write_bytes(path.read_bytes()[:-5])
    with TrainingCheckpoints(str(directory), identity=IDENTITY) as checkpoints:
        assert not any(name.startswith("checkpoints/3/") for name in names(s3))
        check_restored(checkpoints, 0)
        (note,) = checkpoints.notes
        assert "passed over step 2, 1 for step 0" in note
        assert "bytes instead of" in note
        checkpoints.save(2, state_of(2), {"row": 2}, wait=True)
    with TrainingCheckpoints(str(directory), identity=IDENTITY) as checkpoints:
        assert checkpoints.all_steps() == [0, 2]
        check_restored(checkpoints, 2)


def test_an_upload_that_fails_costs_one_checkpoint(s3, monkeypatch):  # noqa: F811
    files = storage.filesystem(s3)

    def fail(*_, **__):
        raise ConnectionError("the network is gone")

    with TrainingCheckpoints(f"{s3}/checkpoints", identity=IDENTITY, keep_last=1) as checkpoints:
        checkpoints.save(1, state_of(1), {"row": 1}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(files, "put_file", fail)
            patch.setattr(files, "find", fail)
            patch.setattr(files, "ls", fail)
            patch.setattr(files, "listdir", fail)
            checkpoints.save(2, state_of(2), {"row": 2})
            with pytest.raises(CheckpointError, match=r"2 \(.*network is gone.*step 1 stands"):
                checkpoints.wait()
        assert checkpoints.all_steps() == [1]
        check_restored(checkpoints, 1)
        checkpoints.save(4, state_of(4), {"row": 4}, wait=True)
        assert checkpoints.all_steps() == [4]
    assert {name.split("/")[1] for name in names(s3)} == {"4"}


def test_what_grows_goes_up_whole_and_goes_on_where_it_was(bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr(growing, "EVERY_S", 0.0)
    home = located(f"{bucket}/run")
    for number in range(2):
        files = GrowingFiles(home, ["metrics.jsonl", "board"])
        with (files.path / "metrics.jsonl").open("a") as file:
            file.write(f"{number}\n")
        files.push_soon()
        (files.path / "board").mkdir(exist_ok=True)
        (files.path / "board" / f"events.{number}").write_text("x")
        files.close()
        assert not files.path.exists()
    assert (home / "metrics.jsonl").read_text() == "0\n1\n"
    assert names(bucket) == ["run/board/events.0", "run/board/events.1", "run/metrics.jsonl"]


def test_metrics_wait_for_a_bucket_that_fails(s3, monkeypatch):  # noqa: F811
    home, bucket_files = located(f"{s3}/run"), storage.filesystem(s3)
    files = GrowingFiles(home, [])
    (files.path / "metrics.jsonl").write_text("0\n")

    def fail(*_, **__):
        raise ConnectionError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(bucket_files, "put_file", fail)
        with pytest.warns(UserWarning, match="network is gone.*wait for the next upload"):
            files.push()
    files.close()
    assert (home / "metrics.jsonl").read_text() == "0\n"


def test_a_second_run_is_kept_out_of_a_bucket_while_the_first_lives(bucket):  # noqa: F811
    path = located(f"{bucket}/run/.lock")
    first, second = _BucketLock(path, beat_s=0.1), _BucketLock(path, beat_s=0.4)
    first.acquire()
    with pytest.raises(Taken):
        second.acquire()
    first.check()
    first.release()
    assert not path.exists()
    second.acquire()
    second.release()


def test_a_run_that_died_is_known_by_its_silence_and_one_that_slept_stops(s3):  # noqa: F811
    path = located(f"{s3}/.lock")
    first, second = _BucketLock(path, beat_s=30.0), _BucketLock(path, beat_s=0.1)
    first.acquire()  # and gives no sign of life for as long as this test takes
    second.acquire()
    with pytest.raises(Taken):
        first.check()
    second.check()
    first.release()
    assert json.loads(path.read_text())["beat"] >= 1  # it is the second one's
    second.release()
    assert not path.exists()
