"""The examples run, and do what they claim."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["linen_mlp", "nnx_mlp", "equinox_mlp"])
def test_a_frozen_model_of_another_framework_learns_in_a_plain_optax_loop(name):
    if name == "equinox_mlp":
        pytest.importorskip("equinox", reason="equinox is not installed (extra 'test')")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    outcome = module.main(steps=60)
    assert outcome["loss_after"] < 0.1 * outcome["loss_before"]
    assert outcome["base_moved"] == 0.0
    assert outcome["merge_error"] < 1e-5
