"""Show what an adapter touches and, once trained, what it learned."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.targets import match_names
from smoa_jax.checkpoint.base import StoredBase, abstract_base, open_base
from smoa_jax.checkpoint.card import method_name
from smoa_jax.checkpoint.export.merged import MergedReader
from smoa_jax.checkpoint.names import layer_numbers
from smoa_jax.checkpoint.native.directory import open_adapter
from smoa_jax.checks import refuse, require
from smoa_jax.commands.tables import console
from smoa_jax.evaluation.inspection import (
    TargetRow,
    UpdateSpectrum,
    summarise,
    target_rows,
    update_spectrum,
)
from smoa_jax.evaluation.plots import PlottedAdapter, load_pyplot, plot_spectra
from smoa_jax.storage import is_remote
from smoa_jax.training.directory import jsonable
from smoa_jax.training.metrics import ProgressReport
from smoa_jax.training.model import spectra_cache
from smoa_jax.training.saved_adapter import adapter_directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inspected:
    """An adapter, or a plan of one: all that it trains, and the kernels and updates to show."""

    config: SmoaConfig
    trained: int
    rows: list[TargetRow]
    source: str = ""  # its directory
    spectra: list[UpdateSpectrum] = dataclasses.field(default_factory=list)


def inspect(
    *,
    model: str,
    adapter: str = "",
    checkpoint: str = "",
    compare: str = "",
    target_modules: list[str] | str | None = None,
    layers: list[int] | int | str | None = None,
    rank: int | None = None,
    num_subspaces: int | None = None,
    partition: str | None = None,
    modulation: str | None = None,
    plot: str = "",
    details: bool = False,
    as_json: bool = False,
    spectra_cache_dir: str = "auto",
) -> int:
    """Show targets, counts and, for a trained adapter, the spectra of its updates.

    Args:
        model: Hugging Face directory, GGUF file, or a name on the hub.
        adapter: Adapter directory, or a run's; without it: what rank, num_subspaces, partition and
            modulation would train.
        checkpoint: best, last or a step's number, of the run that adapter names or lies in;
            without it: the adapter as it stands.
        compare: Another adapter (or run) on the same base, to show beside it.
        target_modules: Kernels to show, or to plan for: q_proj,v_proj, a regular expression for a
            whole dotted path, or all-linear; without it: all of an adapter, the papers' five of a
            plan.
        layers: Layers to show, or to plan for: 3 or 0,1; without it: all.
        rank: Of a plan: total rank R; 32 unless given.
        num_subspaces: Of a plan: M; 2 unless given.
        partition: Of a plan: spectral_blocks (unless given), aligned_blocks, spectral_bands,
            contiguous_blocks, random_blocks or none.
        modulation: Of a plan: weight (unless given) or none.
        plot: PNG file for the singular values of the updates.
        details: Show every layer's update, not a summary of each kernel.
        as_json: Print one JSON object, nothing else.
        spectra_cache_dir: Where spectral bands are kept: auto, off or a directory.
    """
    plan = {
        "rank": rank,
        "num_subspaces": num_subspaces,
        "partition": partition,
        "modulation": modulation,
    }
    plan = {name: value for name, value in plan.items() if value is not None}
    learned = {"checkpoint": checkpoint, "compare": compare, "plot": plot, "details": details}
    _check_options(adapter, plan, [name for name, value in learned.items() if value], plot)
    chosen, modules = _indices(layers), _modules(target_modules)
    if adapter:
        base, cache_dir = open_base(model), spectra_cache(spectra_cache_dir)
        found = [
            _trained(base, source, step, modules, chosen, cache_dir)
            for source, step in ((adapter, checkpoint), (compare, ""))
            if source
        ]
    else:
        base = abstract_base(model)
        if modules is not None:
            plan["target_modules"] = modules
        config = SmoaConfig(layers=tuple(chosen), layer_numbers=layer_numbers(base.config), **plan)
        rows = target_rows(base.params, config)
        found = [_Inspected(config=config, trained=_count(rows), rows=rows)]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(base.params))
    if as_json:
        _print_json(found, model, total)
    else:
        for inspected in found:
            _show(inspected, total, details=details)
    if plot:
        Path(plot).parent.mkdir(parents=True, exist_ok=True)
        plot_spectra(_labelled(found), plot)
        if not as_json:
            console.print(f"plot: {plot}", soft_wrap=True, markup=False)
    return 0


# -------------------------------------------------------------------------------------- options


def _check_options(adapter: str, plan: dict[str, Any], learned: list[str], plot: str) -> None:
    """Refuses what would have no effect, and what can't be drawn, before anything is read."""
    if adapter and plan:
        given = ", ".join(f"--{name}" for name in plan)
        refuse(
            f"{given} with --adapter",
            "the adapter alone, which has its own",
            "leave them out, or leave out --adapter to see a plan",
        )
    if learned and not adapter:
        given = ", ".join(f"--{name}" for name in learned)
        refuse(f"{given} without --adapter", "a trained adapter", "name its directory or its run's")
    if plot:
        fits = Path(plot).suffix == ".png" and not is_remote(plot)
        require(fits, f"--plot {plot}", "a name on this machine that ends in .png")
        load_pyplot()


def _indices(layers: list[int] | int | str | None) -> list[int]:
    """The layers that ``3``, ``0,1`` and ``[0, 1]`` mean; none for all."""
    if layers is None or isinstance(layers, list):
        return layers or []
    words = [word.strip() for word in str(layers).split(",")]
    require(
        all(re.fullmatch(r"-?\d+", word) for word in words),
        f"--layers {layers}",
        "indices of layers, such as 3 or 0,1",
    )
    return [int(word) for word in words]


def _modules(target_modules: list[str] | str | None) -> list[str] | str | None:
    """Names, if that is what a text holds; else it is a regular expression, or all-linear."""
    if not isinstance(target_modules, str):
        return target_modules
    words = [word.strip() for word in target_modules.split(",")]
    are_names = all(re.fullmatch(r"\w+(\.\w+)*", word) for word in words)
    return words if are_names else target_modules


# ------------------------------------------------------------------------------------- adapters


def _trained(
    base: StoredBase,
    source: str,
    checkpoint: str,
    modules: list[str] | str | None,
    layers: Sequence[int],
    cache_dir: Path | None,
) -> _Inspected:
    """A trained adapter, with the updates of the kernels and layers that were asked for."""
    with adapter_directory(source, checkpoint, str(base.source)) as directory:
        params, config = open_adapter(directory, base.params, base_fingerprint=base.fingerprint)
    rows = target_rows(base.params, config)
    trained, names = _count(rows), [row.name for row in rows]
    if modules is not None:
        kept = match_names("--target_modules", modules, names)
        rows = [row for row in rows if row.name in kept]
    _check_layers(layers, rows)
    wanted = {row.name: row.among(layers) for row in rows}
    reader = MergedReader(base, params, config, cache_dir=cache_dir)
    total = sum(map(len, wanted.values()))
    spectra = []
    with (
        jax.default_device(jax.devices("cpu")[0]),
        ProgressReport("spectra of updates", total, console=Console(stderr=True)) as report,
    ):
        for found in reader.layers(wanted):
            spectra.append(update_spectrum(found.name, found.layer, found.weight, found.modulation))
            report.update(len(spectra), found.name)
    return _Inspected(config=config, trained=trained, rows=rows, source=source, spectra=spectra)


def _check_layers(layers: Sequence[int], rows: list[TargetRow]) -> None:
    known = sorted({layer for row in rows for layer in row.selected})
    if set(layers) <= set(known):
        return
    whole = known == list(range(known[0], known[-1] + 1))
    these = f"from {known[0]} to {known[-1]}" if whole else ", ".join(map(str, known))
    refuse(f"--layers {list(layers)}", f"indices of layers that the adapter changes: {these}")


def _count(rows: list[TargetRow]) -> int:
    return sum(row.trainable for row in rows)


# ------------------------------------------------------------------------------------ what is shown


def _labelled(found: list[_Inspected]) -> list[PlottedAdapter]:
    """Each under its method's name, and its directory's where methods are the same."""
    methods = [method_name(inspected.config) for inspected in found]
    return [
        PlottedAdapter(
            label=method if methods.count(method) == 1 else f"{method}, {inspected.source}",
            spectra=inspected.spectra,
            ranks={row.name: row.rank for row in inspected.rows},
        )
        for method, inspected in zip(methods, found, strict=True)
    ]


def _show(inspected: _Inspected, total: int, *, details: bool) -> None:
    config, trained = inspected.config, inspected.trained
    table = Table(title=f"{method_name(config)}, rank {config.rank}")
    for column in ("kernel", "layers", "inputs x outputs", "ranks", "trained"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in inspected.rows:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        ranks = "+".join(map(str, row.ranks))
        table.add_row(row.name, str(row.layers), shape, ranks, f"{row.trainable:,}")
    console.print(table)
    console.print(f"trained {trained:,} of {total:,} base parameters: {trained / total:.3%}")
    if inspected.spectra:
        console.print((_every_layer if details else _summary)(inspected.spectra))


def _summary(spectra: list[UpdateSpectrum]) -> Table:
    """One row per kernel."""
    table = Table(title="updates W' - W: least, median and greatest over the layers")
    table.add_column("kernel", no_wrap=True)
    for column in ("rank", "of", "norm / |W|, %", "largest singular value"):
        table.add_column(column, justify="right")
    for summary in summarise(spectra):
        table.add_row(
            summary.name.removeprefix("layers."),
            _spread(summary.rank, "{:.0f}"),
            str(summary.full_rank),
            _spread([100 * value for value in summary.relative_norm], "{:.3g}"),
            _spread(summary.largest, "{:.2g}"),
        )
    return table


def _spread(values: Sequence[float], form: str) -> str:
    """Three figures, or one where they are the same."""
    texts = [form.format(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def _every_layer(spectra: list[UpdateSpectrum]) -> Table:
    table = Table(title="updates W' - W")
    for column in ("kernel", "layer", "rank", "norm / |W|", "largest", "median"):
        justify = "left" if column == "kernel" else "right"
        table.add_column(column, justify=justify, no_wrap=column == "kernel")
    for spectrum in spectra:
        table.add_row(
            spectrum.name.removeprefix("layers."),
            str(spectrum.layer),
            f"{spectrum.rank} of {len(spectrum.singular_values)}",
            f"{spectrum.relative_norm:.2%}",
            f"{spectrum.largest:.2e}",
            f"{spectrum.median:.2e}",
        )
    return table


def _print_json(found: list[_Inspected], model: str, total: int) -> None:
    first, *others = [_as_json(inspected) for inspected in found]
    compared = {"compared": others[0]} if others else {}
    print(json.dumps({"model": model, "base_parameters": total, **first, **compared}))


def _as_json(inspected: _Inspected) -> dict[str, Any]:
    """Counts and updates under plain names."""
    return {
        "adapter": inspected.source,
        "method": method_name(inspected.config),
        "rank": inspected.config.rank,
        "trained_parameters": inspected.trained,
        "kernels": [
            {
                "name": row.name,
                "layers": list(row.selected),
                "inputs": row.shape[0],
                "outputs": row.shape[1],
                "ranks": list(row.ranks),
                "trained": row.trainable,
            }
            for row in inspected.rows
        ],
        "updates": [
            jsonable(
                {
                    "kernel": spectrum.name,
                    "layer": spectrum.layer,
                    "rank": spectrum.rank,
                    "full_rank": len(spectrum.singular_values),
                    "relative_norm": spectrum.relative_norm,
                    "largest_singular_value": spectrum.largest,
                    "median_singular_value": spectrum.median,
                }
            )
            for spectrum in inspected.spectra
        ],
    }
