"""Where spectra are kept when nobody says where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.planning.cache import default_cache_dir
from smoa_jax.adapter.planning.spectra import plan_spectra


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SMOA_JAX_CACHE": "/big/disk", "XDG_CACHE_HOME": "/xdg"}, Path("/big/disk")),
        ({"SMOA_JAX_CACHE": "~/mine", "HOME": "/home/u"}, Path("/home/u/mine")),
        ({"SMOA_JAX_CACHE": "off"}, None),
        ({"SMOA_JAX_CACHE": "0"}, None),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/smoa_jax")),
        ({"HOME": "/home/u"}, Path("/home/u/.cache/smoa_jax")),
    ],
)
def test_the_default_place_is_the_users_cache_unless_moved_or_off(monkeypatch, variables, expected):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("SMOA_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == expected


def test_a_directory_that_cannot_be_written_is_a_warning_and_no_more(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    base = {"q_proj": {"kernel": np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)}}
    config = SmoaConfig(rank=4, num_subspaces=2, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="SMOA_JAX_CACHE names another directory, or says off"):
        found = plan_spectra(base, config, cache_dir=tmp_path / "file" / "cache")
    expected = plan_spectra(base, config)
    np.testing.assert_array_equal(found["q_proj"].inputs, expected["q_proj"].inputs)
