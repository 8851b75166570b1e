"""Where spectra are kept when nobody says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from smoa_jax.adapter.planning.cache import default_cache_dir


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
