"""One run of ``smoa train`` that the tests of the other commands look at."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import jax
import pytest

from smoa_jax.cli import main
from smoa_jax.sharding import mesh
from smoa_jax.training import model as run_model
from tests.cli.tiny import Place, write_place
from tests.training.tiny_run import write_base


@contextlib.contextmanager
def on_one_device():
    """Eight devices add nothing to these tests but time."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(run_model, "make_mesh", lambda config: mesh.make_mesh(config, devices))
        yield


@pytest.fixture
def one_device():
    with on_one_device():
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.getbasetemp() / "tiny_base")


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory) -> Place:
    """A finished run and what it printed; not to be changed."""
    place = write_place(tmp_path_factory.mktemp("trained"), base)
    printed = io.StringIO()
    with on_one_device(), contextlib.redirect_stdout(printed):
        assert main(["train", "--config", str(place.config)]) == 0
    place.printed = printed.getvalue()
    return place


@pytest.fixture
def place(tmp_path, base) -> Place:
    """Somewhere to start a run."""
    return write_place(tmp_path, base)


@pytest.fixture
def finished(tmp_path, trained) -> Place:
    """A copy of the finished run, under the configuration that it wrote."""
    run = shutil.copytree(trained.run, tmp_path / "run")
    return Place(base=trained.base, config=run / "config.yaml", rows=trained.rows, run=run)


@pytest.fixture
def model(tmp_path, base) -> Path:
    """A copy of the base, to be damaged."""
    return shutil.copytree(base, tmp_path / "model")
