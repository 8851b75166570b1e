"""The estimate for hardware without a compiler, against what XLA allocates on host devices."""

from __future__ import annotations

import jax
import pytest

from smoa_jax.planning.estimate import estimated_collectives, estimated_temporaries
from smoa_jax.planning.program_text import collective_bytes
from smoa_jax.planning.step import build_step, read_base
from tests.planning.small import run_of, write_model

#: Large enough for layers to outweigh what is kept in passing.
SIZES = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 640, "head_dim": 32}
RUNS = {
    "fsdp": ["--train.batch_size=32"],
    "tensor": ["--mesh.fsdp=4", "--mesh.tensor=2", "--model.remat=full"],
}


@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_lies_within_a_factor_of_two_of_what_is_allocated(name, tmp_path):
    config = run_of(write_model(tmp_path, **SIZES), "--data.max_length=256", *RUNS[name])
    step = build_step(config, jax.devices(), read_base(config))
    program = step.traced.lower().compile()
    allocated = program.memory_analysis().temp_size_in_bytes
    assert 0.5 < estimated_temporaries(step, fused=False) / allocated < 2
    moved, estimated = collective_bytes(program.as_text()), estimated_collectives(step)
    assert moved["all-gather"] / 2 < estimated["all-gather"] < 2 * moved["all-gather"]
    assert ("all-reduce" in estimated) == (name == "tensor")
    if name == "tensor":
        assert moved["all-reduce"] / 2 < estimated["all-reduce"] < 2 * moved["all-reduce"]


def test_less_is_kept_by_stricter_policies_and_by_fused_attention(tmp_path):
    model = write_model(tmp_path)
    sizes = []
    for policy in ("full", "projections", "none"):
        config = run_of(model, f"--model.remat={policy}")
        step = build_step(config, jax.devices(), read_base(config))
        sizes.append(estimated_temporaries(step, fused=False))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    assert estimated_temporaries(step, fused=True) < sizes[-1]
