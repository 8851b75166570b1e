"""The examples run, and do what they claim."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_someone_elses_flax_model_learns_in_a_plain_optax_loop():
    spec = importlib.util.spec_from_file_location("plain_optax", EXAMPLES / "plain_optax.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, after = module.main(steps=60)
    assert after < 0.5 * before
