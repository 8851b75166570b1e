"""Buckets on this machine, for tests: servers from the package index that speak S3's and GCS's API.

Tests that need them are skipped where they aren't installed, and say so.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator

import pytest

from smoa_jax import storage
from smoa_jax.storage import located


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server with a bucket named ``bucket``; what a process needs to find it."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    yield environment
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch) -> str:
    """``s3://bucket``, empty."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    files = storage.filesystem("s3://bucket")
    if files.exists("bucket"):
        files.rm("bucket", recursive=True)
    files.mkdir("bucket")
    return "s3://bucket"


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    """The address of a GCS server with a bucket named ``bucket``."""
    pytest.importorskip("gcsfs")
    server_module = pytest.importorskip("gcp_storage_emulator.server")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # gcsfs reads it when it is imported, and keeps what it has read.
    os.environ["STORAGE_EMULATOR_HOST"] = address = f"http://127.0.0.1:{port}"
    server = server_module.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield address
    server.stop()
    os.environ.pop("STORAGE_EMULATOR_HOST", None)


@pytest.fixture
def gs(gcs_server) -> str:
    """``gs://bucket``, empty."""
    located("gs://bucket/x")
    files = storage.filesystem("gs://bucket")
    for name in files.find("bucket"):
        files.rm_file(name)
    return "gs://bucket"


@pytest.fixture(params=["s3", "gs"])
def bucket(request) -> str:
    """A bucket of each kind in turn."""
    return request.getfixturevalue(request.param)
