"""Show what an adapter touches and, once trained, what it learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.checkpoint.base import abstract_base, open_base
from smoa_jax.checkpoint.export.merged import MergedReader
from smoa_jax.checkpoint.native.directory import open_adapter
from smoa_jax.checks import require
from smoa_jax.commands.tables import console
from smoa_jax.evaluation.inspection import plot_spectra, target_rows, update_spectrum
from smoa_jax.training.model import spectra_cache
from smoa_jax.training.saved_adapter import adapter_directory


def inspect(
    *,
    model: str,
    adapter: str = "",
    checkpoint: str = "",
    rank: int = 32,
    num_subspaces: int = 2,
    partition: str = "spectral_blocks",
    modulation: str = "weight",
    target_modules: list[str] | str | None = None,
    layers: list[int] | int | None = None,
    plot: str = "",
    spectra_cache_dir: str = "auto",
) -> int:
    """Show targets, counts and, for a trained adapter, the spectra of its updates.

    Args:
        model: Hugging Face directory or GGUF file.
        adapter: Adapter directory, or a run's; empty: what the options below would train.
        checkpoint: best, last or a step's number, of the run that adapter names or lies in; empty:
            the adapter as it stands.
        rank: Total rank R.
        num_subspaces: M.
        partition: As in a run's adapter section.
        modulation: weight or none.
        target_modules: Names, a regular expression, or all-linear; none: the papers' five.
        layers: Layers whose updates to show, one or a list; none: all.
        plot: PNG file for the singular values of the updates.
        spectra_cache_dir: Where spectral bands are kept: auto, off or a directory.
    """
    require(bool(adapter) or not plot, "--plot without --adapter", "a trained adapter to plot")
    require(not plot or Path(plot).suffix == ".png", f"--plot {plot}", "a name that ends in .png")
    require(
        bool(adapter) or not checkpoint, "--checkpoint without --adapter", "a run's directory there"
    )
    abstract = abstract_base(model)
    reader: MergedReader | None = None
    chosen = (layers,) if isinstance(layers, int) else tuple(layers or ())
    if adapter:
        _check_layers(chosen, abstract.config.num_layers)
        base = open_base(model)
        with adapter_directory(adapter, checkpoint, model) as directory:
            params, config = open_adapter(directory, base.params, base_fingerprint=base.fingerprint)
        reader = MergedReader(base, params, config, cache_dir=spectra_cache(spectra_cache_dir))
    else:
        options: dict[str, Any] = {"partition": partition, "modulation": modulation}
        if target_modules is not None:
            options["target_modules"] = target_modules
        config = SmoaConfig(rank=rank, num_subspaces=num_subspaces, **options)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    rows = target_rows(abstract.params, config)
    table = Table(title=f"{config.partition}, modulation {config.modulation}, rank {config.rank}")
    for column in ("kernel", "layers", "inputs x outputs", "ranks", "trained"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        ranks = "+".join(map(str, row.ranks))
        table.add_row(row.name, str(row.layers), shape, ranks, f"{row.trainable:,}")
    console.print(table)
    trained = sum(row.trainable for row in rows)
    console.print(f"trained {trained:,} of {total:,} base parameters: {trained / total:.3%}")
    if reader is not None:
        _show_updates(reader, chosen, plot)
    return 0


def _check_layers(layers: tuple[int, ...], depth: int) -> None:
    require(
        not any(not 0 <= layer < depth for layer in layers),
        f"--layers {list(layers)}",
        f"indices from 0 to {depth - 1}",
    )


def _show_updates(reader: MergedReader, layers: tuple[int, ...], plot: str) -> None:
    with jax.default_device(jax.devices("cpu")[0]):
        spectra = [
            update_spectrum(found.name, found.layer, found.weight, found.modulation)
            for found in reader.layers(layers)
        ]
    table = Table(title="updates W' - W")
    for column in ("kernel", "layer", "rank", "norm / |W|", "largest", "median"):
        justify = "left" if column == "kernel" else "right"
        table.add_column(column, justify=justify, no_wrap=column == "kernel")
    for spectrum in spectra:
        values = spectrum.singular_values
        table.add_row(
            spectrum.name.removeprefix("layers."),
            str(spectrum.layer),
            f"{spectrum.rank} of {len(values)}",
            f"{spectrum.relative_norm:.2%}",
            f"{values[0]:.2e}",
            f"{values[len(values) // 2]:.2e}",
        )
    console.print(table)
    if plot:
        Path(plot).parent.mkdir(parents=True, exist_ok=True)
        plot_spectra(spectra, plot)
        console.print(f"plot: {plot}", soft_wrap=True, markup=False)
