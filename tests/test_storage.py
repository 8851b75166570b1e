"""Paths in buckets do what paths on this machine do, and what can't be reached is told at once."""

from __future__ import annotations

import numpy as np
import pytest

from smoa_jax import storage
from smoa_jax.adapter.planning.cache import CacheEntry
from smoa_jax.checkpoint.directories import replaced_directory
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.storage import StorageError, check_writable, local_copy, located
from tests.buckets import bucket, gcs_server, gs, s3, s3_server  # noqa: F401


def names(bucket: str) -> list[str]:  # noqa: F811
    files = storage.filesystem(bucket)
    root = bucket.split("://")[1]
    return sorted(name.removeprefix(f"{root}/") for name in files.find(root))


def test_a_directory_in_a_bucket_holds_all_of_its_files_marker_last(bucket):  # noqa: F811
    target = located(f"{bucket}/out/model")
    with replaced_directory(target, marker="config.json", what="a", overwrite=False) as draft:
        (draft / "config.json").write_text("{}")
        (draft / "parts").mkdir()
        (draft / "parts" / "one").write_bytes(b"1")
        (draft / "old").write_bytes(b"0")
        assert names(bucket) == []
    assert names(bucket) == ["out/model/config.json", "out/model/old", "out/model/parts/one"]
    with (
        pytest.raises(CheckpointError, match="already exists"),
        replaced_directory(target, marker="config.json", what="a", overwrite=False),
    ):
        pass
    with replaced_directory(target, marker="config.json", what="a", overwrite=True) as draft:
        (draft / "config.json").write_text("[]")
        (draft / "new").write_bytes(b"2")
    assert names(bucket) == ["out/model/config.json", "out/model/new"]
    assert (target / "config.json").read_text() == "[]"


def test_an_upload_that_is_cut_short_leaves_no_marker(bucket, tmp_path, monkeypatch):  # noqa: F811
    for name in ("a", "config.json", "z"):
        (tmp_path / name).write_text(name)
    files = storage.filesystem(bucket)
    put, sent = files.put_file, []

    def fail(source, target, **options):
        if len(sent) == 2:
            raise OSError("the network is gone")
        sent.append(target)
        put(source, target, **options)

    monkeypatch.setattr(files, "put_file", fail)
    with pytest.raises(OSError, match="network"):
        storage.upload(tmp_path, located(f"{bucket}/model"), last="config.json")
    assert names(bucket) == ["model/a", "model/z"]


def test_a_copy_of_a_file_is_fetched_again_when_the_bucket_has_another(
    bucket,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("SMOA_JAX_CACHE", str(tmp_path / "cache"))
    path = located(f"{bucket}/rows.jsonl")
    path.write_text("one\n")
    first = local_copy(str(path))
    assert (first.name, first.read_text()) == ("rows.jsonl", "one\n")
    assert local_copy(path) == first
    path.write_text("another\n")
    assert local_copy(path).read_text() == "another\n"
    assert first.read_text() == "one\n"
    with pytest.raises(StorageError, match=r"none\.jsonl: got no such file"):
        local_copy(f"{bucket}/none.jsonl")


def test_spectra_are_kept_in_a_bucket(bucket):  # noqa: F811
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    import jax

    like = {"inputs": jax.ShapeDtypeStruct((3,), np.float32)}
    entry = CacheEntry(located(f"{bucket}/spectra"), matrix, ("blocks",), like, "q_proj")
    assert entry.read() is None
    entry.write({"inputs": np.array([1, 2, 3], np.float32)})
    found = entry.read()
    assert found is not None
    np.testing.assert_array_equal(found["inputs"], [1, 2, 3])
    located(f"{bucket}/spectra/{names(bucket)[0].split('/')[1]}").write_bytes(b"PK damaged")
    with pytest.warns(UserWarning, match="cannot be used"):
        assert entry.read() is None


def test_a_bucket_that_is_not_there_is_one_line(bucket):  # noqa: F811
    missing = located(f"{bucket.split('://')[0]}://no-such-bucket/run")
    assert not missing.exists()
    with pytest.raises(StorageError, match=r"no-such-bucket/run, which cannot be used") as raised:
        check_writable(missing)
    assert "\n" not in str(raised.value)
    check_writable(located(f"{bucket}/run"))
    assert names(bucket) == []


def test_a_bucket_that_does_not_answer_is_one_line(s3, monkeypatch):  # noqa: F811
    import s3fs

    class Unreachable(s3fs.S3FileSystem):
        def exists(self, path, **options):
            raise ConnectionError("could not connect\nto the endpoint")

    monkeypatch.setattr(storage, "filesystem", lambda path: Unreachable())
    message = r"s3://elsewhere, which cannot be reached \(could not connect to the endpoint\)"
    with pytest.raises(StorageError, match=message):
        located("s3://elsewhere/run")


@pytest.mark.parametrize("name", ["ftp://host/run", "s3://", "gs:///run"])
def test_what_is_no_bucket_is_refused(name):
    with pytest.raises(StorageError, match=r"expected a path, or gs://BUCKET"):
        located(name)
