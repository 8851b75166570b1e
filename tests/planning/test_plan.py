"""A plan: its parts, its bounds, the largest batch, and the command that prints it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from smoa_jax.checks import how_to_install
from smoa_jax.cli import main
from smoa_jax.planning.chips import parse_topology
from smoa_jax.planning.plan import around, largest_batch, plan
from smoa_jax.planning.step import build_step, described_devices, read_base
from tests.planning.small import run_of, write_model

ROOT = Path(__file__).parents[2]
without_libtpu = importlib.util.find_spec("libtpu") is None


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    config = run_of(
        write_model(tmp_path_factory.mktemp("model")), "--mesh.fsdp=4", "--mesh.tensor=2"
    )
    where, base = parse_topology("h100x8"), read_base(config)
    return config, base, plan(config, where, described_devices(where), base)


def test_the_parts_of_memory_are_those_of_the_run(planned):
    config, base, found = planned
    kernels = 64 * (128 + 2 * 64) + 128 * 64 + 3 * 64 * 160
    divided = 5 * kernels + 2 * 1024 * 64
    assert found.base == 4 * (divided / 8 + (2 * 5 + 1) * 64)
    step = build_step(config, jax.devices(), base)
    trained = sum(leaf.size for leaf in jax.tree.leaves(step.state["trainable"]))
    # Two moments of every factor, and the counters of AdamW, schedule, clipping and steps.
    factors = found.optimizer // 4 // 2
    assert trained / 8 <= factors <= trained / 2
    assert found.bytes == found.base + found.adapter + found.optimizer + found.temporaries
    assert found.estimated
    assert found.fits
    small = dataclasses.replace(found.where.chip, memory=int(found.bytes) - 1)
    assert not dataclasses.replace(found, where=dataclasses.replace(found.where, chip=small)).fits


def test_a_step_takes_no_less_than_its_slowest_bound(planned):
    *_, found = planned
    chip = found.where.chip
    assert found.bounds["products"] == found.flops / 8 / chip.flops
    assert found.bounds["links"] == sum(found.collectives.values()) / chip.link
    assert found.seconds == max(found.bounds.values())
    assert 0 < found.utilisation <= found.needed_flops / found.flops < 1
    busy = dataclasses.replace(found, flops=found.flops * 1e6)
    assert busy.utilisation == pytest.approx(found.needed_flops / busy.flops)


def test_attention_that_holds_no_scores_takes_less(planned):
    config, base, _ = planned
    where = parse_topology("h100x8")
    sizes = {
        name: plan(
            dataclasses.replace(config, model=dataclasses.replace(config.model, attention=name)),
            where,
            described_devices(where),
            base,
        ).temporaries
        for name in ("auto", "cudnn", "xla")
    }
    assert sizes["cudnn"] < sizes["xla"] == sizes["auto"]  # rows of 96 tokens are short


def test_spectra_and_checkpoints_are_counted(planned):
    config, base, _ = planned
    step = build_step(config, jax.devices(), base)
    found = around(step)
    assert found.decompositions == 5 * 5  # q, k, v, up and down of each layer
    trained = sum(leaf.size for leaf in jax.tree.leaves(step.state["trainable"]))
    assert 4 * 3 * trained < found.checkpoint < 4 * 3.5 * trained + 4096
    assert 4 * trained < found.adapter < found.checkpoint


@pytest.mark.parametrize("capacity", [99, 100, 130, 1000, 1130, 1159, 1160])
def test_the_largest_batch_is_found_in_few_tries(planned, capacity):
    *_, found = planned
    tried = []

    def plan_of(rows):
        tried.append(rows)
        where = dataclasses.replace(
            found.where, chip=dataclasses.replace(found.where.chip, memory=capacity)
        )
        bent = 30 if rows > 16 else 0  # not quite a line
        return dataclasses.replace(
            found,
            where=where,
            batch_size=rows,
            base=90 + bent,
            adapter=0,
            optimizer=0,
            temporaries=10 * rows // 4,
        )

    rows = [each.batch_size for each in largest_batch(plan_of, 4)]
    fitting = [n for n in range(4, 2000, 4) if plan_of(n).fits]
    del tried[-499:]
    assert (rows[-1] if rows else 0) == (fitting[-1] if fitting else 0)
    assert len(tried) <= 7
    assert all(number % 4 == 0 for number in tried)


def command(model, *words):
    """``smoa plan`` in a process of its own, which may still choose how many devices it has."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    arguments = [sys.executable, "-m", "smoa_jax.cli", "plan", "--model.path", str(model), *words]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_plans_for_more_devices_than_there_are(tmp_path):
    model = write_model(tmp_path, num_hidden_layers=2)
    done = command(model, "--topology", "a100x16", "--train.batch_size", "32", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["chips"], made["chip"]["name"]) == (16, "a100")
    (found,) = made["plans"]
    assert found["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
    assert found["estimated"]
    assert found["fits"]


def test_policies_and_the_largest_batch_stand_side_by_side(planned, tmp_path, capsys, monkeypatch):
    *_, found = planned

    def plan_of(config, where, devices, base, *, compiled):
        assert compiled
        rows, chip = config.train.batch_size, dataclasses.replace(where.chip, memory=10 << 20)
        return dataclasses.replace(
            found,
            where=dataclasses.replace(where, chip=chip),
            batch_size=rows,
            remat=config.model.remat,
            temporaries=(rows << 20) * (4 if config.model.remat == "none" else 1),
        )

    monkeypatch.setattr("smoa_jax.commands.plan.plan", plan_of)
    words = ["--remat", "all", "--search", "--data.max_length", "96", "--train.batch_size", "4"]
    model = str(write_model(tmp_path, num_hidden_layers=2))
    assert main(["plan", "--model.path", model, "--topology", "h100", *words]) == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"│ (\w+) +│ +(\d+) │.*│ +(yes|no) │", shown)
    assert rows == [
        ("none", "4", "no"),
        *((name, "4", "yes") for name in ("dots", "dots_no_batch", "projections", "full")),
        ("projections", "9", "yes"),
    ]
    assert "an estimate" in shown


def test_what_fits_nowhere_is_exit_status_one(planned, tmp_path, capsys, monkeypatch):
    *_, found = planned
    huge = dataclasses.replace(found, temporaries=1e15)
    monkeypatch.setattr("smoa_jax.commands.plan.plan", lambda *_, **__: huge)
    model = str(write_model(tmp_path, num_hidden_layers=2))
    words = ["plan", "--model.path", model, "--topology", "h100", "--data.max_length", "96"]
    assert main(words) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main([*words, "--search"]) == 2
    assert "got no batch of 1 rows that fits h100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v9-8"], "got --topology v9-8; expected a chip"),
        (["--topology", "h100", "--remat", "some"], "got --remat some; expected all"),
        (["--topology", "h100", "--data.max_length", "4096"], "for a model of 1024 positions"),
        (["--topology", "h100", "--model.attention", "splash"], "splash for a GPU; expected"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(words, message, tmp_path, capsys):
    assert main(["plan", "--model.path", str(write_model(tmp_path)), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.skipif(not without_libtpu, reason="libtpu is installed")
def test_without_libtpu_one_line_says_what_to_install(tmp_path, capsys):
    words = ["--model.path", str(write_model(tmp_path)), "--topology", "v5e-4"]
    assert main(["plan", *words]) == 2
    assert how_to_install("tpu") in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(without_libtpu, reason="libtpu, the TPU's compiler, is not installed")
def test_a_step_is_compiled_for_a_slice_that_is_not_there(tmp_path):
    model = write_model(tmp_path, num_hidden_layers=2, head_dim=128, hidden_size=256)
    done = command(model, "--topology", "v5e-4", "--data.max_length", "512", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["plans"]
    assert not found["estimated"]
    assert found["compile_seconds"] > 0
    assert found["temporaries"] > 0
    assert found["collectives"]["all-gather"] > 0
