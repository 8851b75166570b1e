"""One tiny base for all training tests, and JAX narrowed to one device where eight add nothing."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from smoa_jax.sharding import mesh
from smoa_jax.training import model as run_model
from tests.training.tiny_run import write_base


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.getbasetemp() / "tiny_base")


def use_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the test's runs see one device."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(run_model, "make_mesh", lambda config: mesh.make_mesh(config, devices))


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_device(monkeypatch)
