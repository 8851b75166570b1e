"""Tell what a run takes of a slice that isn't there."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from smoa_jax.checks import refuse
from smoa_jax.commands.tables import console
from smoa_jax.models.options import REMAT_NAMES
from smoa_jax.planning.chips import Slice, parse_topology
from smoa_jax.planning.plan import Around, Plan, around, largest_batch, plan
from smoa_jax.planning.step import build_step, described_devices, for_accelerator, read_base
from smoa_jax.training.config import RunConfig
from smoa_jax.training.directory import jsonable


def plan_run(
    config: RunConfig,
    topology: str,
    *,
    search: bool = False,
    every_remat: bool = False,
    estimate: bool = False,
    as_json: bool = False,
) -> int:
    """Print memory, work and bounds of a run's step; exit status 1 where it does not fit."""
    where = parse_topology(topology)
    _use_host_devices(where)
    config = for_accelerator(config)
    devices = described_devices(where)
    base = read_base(config)
    aside = Console(stderr=True)

    def plan_of(changed: RunConfig) -> Plan:
        sizes = f"{changed.train.batch_size} rows, remat {changed.model.remat}"
        begun = time.monotonic()
        found = plan(changed, where, devices, base, compiled=not estimate)
        aside.print(f"planned {sizes}: {time.monotonic() - begun:.0f} s", style="dim")
        return found

    plans = [plan_of(_with(config, remat=name)) for name in REMAT_NAMES] if every_remat else []
    if search:
        step = build_step(_on_host(config, where), devices, base)
        unit = step.mesh.shape["data"] * step.mesh.shape["fsdp"] * config.train.accumulate
        plans += largest_batch(lambda rows: plan_of(_with(config, rows=rows)), unit)[-1:]
        if not plans:
            refuse(
                f"no batch of {unit} rows that fits {topology}",
                "one",
                "lower data.max_length, raise mesh.tensor, or choose a larger slice",
            )
    plans = plans or [plan_of(config)]
    beside = around(build_step(_on_host(config, where), devices, base))
    if as_json:
        print(json.dumps(jsonable(_as_json(plans, beside))))
    else:
        _show(config, where, plans, beside)
    return 0 if any(found.fits for found in plans) else 1


def _use_host_devices(where: Slice) -> None:
    """Plan on the host alone, with as many devices as cards are asked for."""
    try:
        jax.config.update("jax_platforms", "cpu")
        if where.chip.kind == "gpu" and where.count > 1:
            jax.config.update("jax_num_cpu_devices", where.count)
    except RuntimeError:  # JAX has been used in this process: its devices are what they are
        return


def _on_host(config: RunConfig, where: Slice) -> RunConfig:
    """A run whose step can be built here: attention doesn't matter to what is asked of it."""
    if where.chip.kind == "tpu":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))


def _with(config: RunConfig, *, rows: int = 0, remat: str = "") -> RunConfig:
    """The run with another batch or policy."""
    train, model = config.train, config.model
    if rows:
        train = dataclasses.replace(train, batch_size=rows)
    if remat:
        model = dataclasses.replace(model, **{"remat": remat})
    return dataclasses.replace(config, train=train, model=model)


# ------------------------------------------------------------------------------------ what is shown


def _show(config: RunConfig, where: Slice, plans: list[Plan], beside: Around) -> None:
    chip = where.chip
    mesh = ", ".join(f"{axis} {size}" for axis, size in plans[0].mesh.items())
    console.print(f"{config.model.path} on {where.count} x {chip.name}, mesh {mesh}", markup=False)
    console.print(_beside(plans) if len(plans) > 1 else _alone(plans[0]))
    word = "an estimate" if plans[0].estimated else "by the TPU's compiler"
    console.print(
        f"temporaries and what comes over links are {word}; times are bounds from published peaks "
        f"({chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s of memory, "
        f"{chip.link / 1e9:.0f} GB/s of links; {chip.source}): nothing has run",
        soft_wrap=True,
    )
    if beside.decompositions:
        console.print(
            f"spectra, once for a base: {beside.decompositions} decompositions, about "
            f"{beside.decomposition_flops / 1e12:.1f} TFLOP on the host, "
            f"{_size(beside.decomposition_bytes)} for the largest",
            soft_wrap=True,
        )
    console.print(f"a checkpoint {_size(beside.checkpoint)}, the adapter {_size(beside.adapter)}")


def _alone(found: Plan) -> Table:
    table = Table()
    table.add_column("a chip")
    table.add_column(f"{found.batch_size} x {found.length}, remat {found.remat}", justify="right")
    for name, cell in _ROWS.items():
        table.add_row(name, cell(found))
    return table


def _beside(plans: list[Plan]) -> Table:
    """A row for each plan, of what differs between them."""
    table = Table()
    table.add_column("remat", no_wrap=True)
    for column in ("rows", "temporaries", "together", "fits", "TFLOP", "at least", "MFU <="):
        table.add_column(column, justify="right")
    for found in plans:
        table.add_row(
            found.remat,
            str(found.batch_size),
            _size(found.temporaries),
            _size(found.bytes),
            "yes" if found.fits else "no",
            f"{found.flops / 1e12:.2f}",
            f"{1e3 * found.seconds:.0f} ms",
            f"{found.utilisation:.0%}",
        )
    return table


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _moved(found: Plan) -> str:
    if not found.collectives:
        return "-"
    return "\n".join(f"{kind} {_size(size)}" for kind, size in sorted(found.collectives.items()))


def _bounds(found: Plan) -> str:
    return "\n".join(f"{name} {1e3 * value:.1f} ms" for name, value in found.bounds.items())


_ROWS: dict[str, Any] = {
    "base": lambda found: _size(found.base),
    "adapter": lambda found: _size(found.adapter),
    "optimizer": lambda found: _size(found.optimizer),
    "activations and other temporaries": lambda found: _size(found.temporaries),
    "together": lambda found: _size(found.bytes),
    "memory": lambda found: _size(found.where.chip.memory),
    "": lambda found: "fits" if found.fits else "does not fit",
    "TFLOP a step, all chips": lambda found: f"{found.flops / 1e12:.2f}",
    "GFLOP a token": lambda found: f"{found.flops / found.tokens / 1e9:.2f}",
    "of them the frozen model's": lambda found: f"{found.needed_flops / found.flops:.0%}",
    "over links in a step": _moved,
    "a step at least": _bounds,
    "MFU at most": lambda found: f"{found.utilisation:.0%}",
    "compiled in": lambda found: f"{found.compile_seconds:.0f} s" if found.compile_seconds else "-",
}


def _as_json(plans: list[Plan], beside: Around) -> dict[str, Any]:
    def fields(found: Plan) -> dict[str, Any]:
        plain = {
            field.name: getattr(found, field.name)
            for field in dataclasses.fields(found)
            if field.name != "where"
        }
        derived = {"bytes": found.bytes, "fits": found.fits, "bounds": found.bounds}
        return plain | derived | {"mfu": found.utilisation}

    where = plans[0].where
    return {
        "chip": dataclasses.asdict(where.chip),
        "chips": where.count,
        "plans": [fields(found) for found in plans],
        "around": dataclasses.asdict(beside),
    }
