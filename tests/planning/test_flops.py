"""Products of a step, counted from its trace, against those of an unrolled model's program."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from smoa_jax.planning.flops import count_flops
from smoa_jax.planning.step import build_step, read_base
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from tests.planning.small import run_of, write_model

RUNS = {
    "blocks": ["--train.accumulate=2", "--mesh.fsdp=1"],
    "lora_full": [
        "--adapter.modulation=none",
        "--adapter.partition=none",
        "--adapter.num_subspaces=1",
        "--model.remat=full",
        "--mesh.fsdp=1",
    ],
}


def unrolled_products(text: str) -> float:
    """2 x results x contracted of every dot of an HLO program without loops, calls followed."""
    assert " while(" not in text
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        begin = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if begin:
            name = "ENTRY" if begin[1] else begin[2]
            bodies[name] = []
        elif line.startswith("  "):
            bodies[name].append(line)
    found: dict[str, float] = {}

    def products(name: str) -> float:
        if name not in found:
            found[name] = sum(of_line(line, bodies[name]) for line in bodies[name])
        return found[name]

    def of_line(line: str, body: list[str]) -> float:
        called = re.search(r" call\(.*to_apply=%?([\w.\-]+)", line)
        if called:
            return products(called[1])
        dot = re.search(
            r"= \w+\[([\d,]*)\].* dot\(%?([\w.\-]+),.*lhs_contracting_dims=\{([\d,]*)\}", line
        )
        if not dot:
            return 0.0
        operand = re.escape(dot[2])
        left = next(
            m
            for m in (
                re.search(rf"^ *(?:ROOT )?%?{operand} = \w+\[([\d,]*)\]", each) for each in body
            )
            if m
        )
        shape, results = (numbers(text) for text in (left[1], dot[1]))
        return 2.0 * math.prod(results) * math.prod(shape[axis] for axis in numbers(dot[3]))

    return products("ENTRY")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


@pytest.mark.parametrize("name", RUNS)
def test_scans_count_as_often_as_they_run(name, tmp_path, monkeypatch):
    config = run_of(write_model(tmp_path), *RUNS[name])
    base = read_base(config)
    counted = build_step(config, jax.devices()[:1], base).flops
    scan = jax.lax.scan
    monkeypatch.setattr(
        jax.lax, "scan", lambda *args, **named: scan(*args, **{**named, "unroll": True})
    )
    step = build_step(config, jax.devices()[:1], base)
    text = step.jitted.lower(step.state, step.frozen, step.batch).as_text(dialect="hlo")
    assert counted == unrolled_products(text)


def test_an_adapted_step_takes_more_than_the_frozen_model_and_lora_about_as_much(tmp_path):
    shares = {}
    for name, words in RUNS.items():
        step = build_step(
            config := run_of(write_model(tmp_path), *words), jax.devices()[:1], read_base(config)
        )
        layers = 5 * (64 * (8 + 2 * 4 + 8) * 16 + 3 * 64 * 160)
        attention = 5 * 2 * 2 * 96 * 8 * 16
        needed = 2 * step.tokens * (2 * (layers + 64 * 1024) + attention)
        assert step.needed_flops == needed
        shares[name] = step.flops / needed
    assert 1.3 < shares["blocks"] < 2.2
    # LoRA keeping nothing runs every layer forward a second time, the head not.
    assert 1.4 < shares["lora_full"] < 1.8


def test_a_device_s_products_count_for_every_device():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    rows, columns = PartitionSpec("fsdp"), PartitionSpec(None, "tensor")
    divided = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(rows, columns), out_specs=PartitionSpec("fsdp", "tensor")
    )
    # Each device forms its columns' square whole: twice over tensor's halves, on each of fsdp's.
    forming = jax.shard_map(
        lambda x, w: x @ (w.T @ w),
        mesh=mesh,
        in_specs=(rows, columns),
        out_specs=rows,
        check_vma=False,
    )
    x, w = jnp.ones((8, 6)), jnp.ones((6, 10))
    assert count_flops(jax.make_jaxpr(divided)(x, w)) == 2 * 8 * 6 * 10
    assert count_flops(jax.make_jaxpr(forming)(jnp.ones((8, 5)), w)) == 8 * (
        2 * 5 * 6 * 5 + 2 * 2 * 5 * 5
    )


def test_products_in_a_loop_of_unknown_length_are_refused():
    def loop(x):
        return jax.lax.while_loop(lambda y: y.sum() < 3, lambda y: y @ y, x)

    with pytest.raises(ValueError, match="got products in a loop of unknown length"):
        count_flops(jax.make_jaxpr(loop)(jnp.ones((4, 4))))
