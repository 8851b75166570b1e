"""Planning: what the cache keeps, and how processes share the layers out."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.adapter import spectrum
from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.spectrum import plan_spectra
from tests.adapter.plan_in_processes import CONFIGS, base_params, outcome_of
from tests.processes import run_processes


def test_processes_plan_and_adapt_together_what_one_does_alone(tmp_path):
    program = Path(__file__).with_name("plan_in_processes.py")
    left, right = run_processes(program, [tmp_path / "cache"])
    alone = {name: outcome_of(base_params(), config) for name, config in CONFIGS.items()}
    for outcome in (left, right):
        for name, expected in alone.items():
            assert outcome[name] == expected, name
        assert outcome["whole"] == alone["blocks"]
        assert outcome["unselected"] == "passed"
        assert outcome["error"].startswith("got values that are not finite in wide[1]; expected")
    # 1 + 4 + 4 + 3 layers, half of them each, and found in the cache the second time.
    assert (left["decomposed"], right["decomposed"]) == (6, 6)
