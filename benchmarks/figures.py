"""The pictures of the README, out of a model and two finished runs.

    python benchmarks/figures.py --model MODEL --smoa runs/appointments --lora runs/lora

``blocks.png``: a kernel in grey, and in colour the elements that SMoA can reach, each block in its
own; as the kernel lies in memory, and with rows and columns sorted by block, which nothing but this
picture ever does. ``spectra.png``: singular values of what both runs have learned of one kernel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

import smoa_jax
from smoa_jax.adapter.types import Blocks
from smoa_jax.checkpoint.base import open_base
from smoa_jax.checkpoint.export.merged import AdaptedLayer, MergedReader
from smoa_jax.checkpoint.native.directory import open_adapter
from smoa_jax.evaluation.inspection import update_spectrum

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
_CORNER = 96  # rows and columns of the corner that is shown: single elements can be seen


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--smoa", required=True, type=Path, help="a finished run, spectral blocks")
    parser.add_argument("--lora", required=True, type=Path, help="a finished run of LoRA")
    parser.add_argument("--kernel", default="layers.self_attn.q_proj")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--output", type=Path, default=Path("docs/assets"))
    options = parser.parse_args()
    found = {}
    for name in ("SMoA", "LoRA"):
        found[name] = read_layer(
            options.model, getattr(options, name.lower()), options.kernel, options.layer
        )
    options.output.mkdir(parents=True, exist_ok=True)
    draw_blocks(found["SMoA"], options.output / "blocks.png")
    draw_spectra(found, options.output / "spectra.png")


def read_layer(model: str, run: Path, kernel: str, layer: int) -> AdaptedLayer:
    """One layer of what a run has adapted: its weight and its own modulation."""
    base = open_base(model)
    params, config = open_adapter(run / "adapter", base.params, base_fingerprint=base.fingerprint)
    trained = smoa_jax.count_trainable(base.params, config)
    print(f"{run}: rank {config.rank}, {trained:,} trained parameters")
    return next(MergedReader(base, params, config).layers({kernel: [layer]}))


def draw_blocks(found: AdaptedLayer, path: Path) -> None:
    """A corner of a kernel, the elements of each block in a colour of their own."""
    assert isinstance(found.modulation, Blocks)
    inputs, outputs = (
        np.asarray(ids)[:_CORNER].astype(int)
        for ids in (found.modulation.in_block, found.modulation.out_block)
    )
    corner = np.abs(found.weight[:_CORNER, :_CORNER])
    strength = np.clip(corner / np.quantile(corner, 0.98), 0, 1)[..., None]
    colours = np.asarray([to_rgb(colour) for colour in _COLOURS])
    within = inputs[:, None] == outputs[None, :]
    tint = np.where(within[..., None], colours[inputs][:, None, :], 0.35)
    picture = 1 - strength * (1 - tint)
    sorted_picture = picture[np.argsort(inputs, kind="stable")][
        :, np.argsort(outputs, kind="stable")
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    titles = ("as the kernel lies in memory", "rows and columns sorted by block")
    for axis, image, title in zip(axes, (picture, sorted_picture), titles, strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set(title=title, xlabel="output", ylabel="input")
    blocks = int(max(inputs.max(), outputs.max())) + 1
    patches = [Patch(color=_COLOURS[m], label=f"block {m + 1}") for m in range(blocks)]
    patches.append(Patch(color="0.35", label="left as it is"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.suptitle(
        f"|W|, {found.name} of layer {found.layer}: {_CORNER} of {len(found.weight)} inputs and "
        f"{_CORNER} of {found.weight.shape[1]} outputs"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_spectra(found: dict[str, AdaptedLayer], path: Path) -> None:
    """Singular values of each update, relative to its largest."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, layer in found.items():
        spectrum = update_spectrum(layer.name, layer.layer, layer.weight, layer.modulation)
        values = spectrum.singular_values / spectrum.singular_values[0]
        shown = values[values > 1e-6]
        axis.loglog(np.arange(1, len(shown) + 1), shown, marker=".", label=name)
        print(f"{name}: rank {spectrum.rank} of {len(values)}")
    axis.set(
        xlabel="index of singular value",
        ylabel="singular value / largest",
        title=f"what was learned of {layer.name} in layer {layer.layer}",
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
