"""The figure of ``smoa inspect``: how fast the singular values of adapters' updates fall.

One panel per kernel, one line per layer, each relative to its own largest value, so that adapters
of any size can be held against each other: LoRA's updates end at their rank R, which a vertical
line marks, where those that multiply the weight go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smoa_jax.checks import how_to_install, require
from smoa_jax.evaluation.inspection import RANK_TOLERANCE, UpdateSpectrum

#: Colour map, its part in use (the palest shades vanish on white) and line style of each adapter.
_FAMILIES = (("Blues", (0.4, 1.0), "-"), ("Oranges", (0.35, 0.9), "--"))
_FLOOR = 1e-7  # below the rounding of float32 there is nothing to see


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlottedAdapter:
    """An adapter as a figure shows it.

    Attributes:
        label: What the legend calls it.
        spectra: Of its updates.
        ranks: Name of a kernel -> the rank R of its factors.
    """

    label: str
    spectra: Sequence[UpdateSpectrum]
    ranks: Mapping[str, int]


def load_pyplot() -> Any:
    """Matplotlib, drawing into files alone.

    Raises:
        ImportError: without the extra ``plot``.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"got no matplotlib; expected the extra 'plot'; {how_to_install('plot')}"
        ) from error
    return plt


def plot_spectra(adapters: Sequence[PlottedAdapter], path: str | Path) -> None:
    """Draw the updates of one adapter, or of two beside each other, as PNG.

    Raises:
        ImportError: without the extra ``plot``.
        ValueError: if every update of an adapter is zero, as before any training.
    """
    plt = load_pyplot()
    for adapter in adapters:
        require(
            any(spectrum.rank for spectrum in adapter.spectra),
            f"an adapter whose updates are all zero ({adapter.label})",
            "a trained one",
            "train it first",
        )
    names = sorted({spectrum.name for adapter in adapters for spectrum in adapter.spectra})
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(4.2 * columns, 6) + 0.8, 3.2 * rows + 0.9),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    inks = [
        _Ink(plt, adapter, *family) for adapter, family in zip(adapters, _FAMILIES, strict=False)
    ]
    for axis, name in zip(axes.flat, names, strict=False):
        _draw_kernel(axis, name, inks)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("index of singular value", fontsize=10)
    for row in axes:
        row[0].set_ylabel("singular value / largest")
    for ink in inks:
        ink.draw_scale(figure, axes)
    figure.legend(
        handles=_legend(inks),
        loc="outside upper center",
        ncols=min(2, columns),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


class _Ink:
    """How one adapter is drawn: its colours from the first layer to the last, its line style."""

    def __init__(
        self, plt: Any, adapter: PlottedAdapter, family: str, part: tuple[float, float], style: str
    ):
        from matplotlib.colors import ListedColormap, Normalize

        layers = [spectrum.layer for spectrum in adapter.spectra]
        self.adapter, self.style = adapter, style
        self._colors = ListedColormap(plt.get_cmap(family)(np.linspace(*part, 256)))
        self._scale = Normalize(min(layers), max(max(layers), min(layers) + 1))
        self._has_scale = len(set(layers)) > 1
        self.mark = self._colors(0.75)

    def of(self, layer: int) -> Any:
        """The colour of a layer's line."""
        return self._colors(self._scale(layer)) if self._has_scale else self.mark

    def draw_scale(self, figure: Any, axes: Any) -> None:
        """What its colours say of layers."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.ticker import MaxNLocator

        if self._has_scale:
            scale = ScalarMappable(cmap=self._colors, norm=self._scale)
            ticks = MaxNLocator(nbins=6, integer=True)
            label = f"layer, {self.adapter.label.split(' (')[0]}"
            figure.colorbar(scale, ax=axes, ticks=ticks, aspect=50, pad=0.01).set_label(
                label, fontsize=9
            )


def _draw_kernel(axis: Any, name: str, inks: Sequence[_Ink]) -> None:
    ranks = [str(ink.adapter.ranks[name]) for ink in inks if name in ink.adapter.ranks]
    axis.set_title(f"{name.removeprefix('layers.')}, R = {' and '.join(ranks)}", fontsize=10)
    for ink in inks:
        if name in ink.adapter.ranks:
            axis.axvline(
                ink.adapter.ranks[name], color=ink.mark, linestyle=ink.style, lw=2.5, alpha=0.35
            )
        for spectrum in (s for s in ink.adapter.spectra if s.name == name and s.rank):
            values = spectrum.singular_values / spectrum.largest
            index = np.arange(1, len(values) + 1)
            axis.loglog(index, values, color=ink.of(spectrum.layer), linestyle=ink.style, lw=0.9)
    axis.axhspan(_FLOOR, RANK_TOLERANCE, color="0.93", zorder=0)
    axis.set_ylim(_FLOOR, 2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.grid(alpha=0.3)


def _legend(inks: Sequence[_Ink]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [Line2D([], [], color=ink.mark, ls=ink.style, label=ink.adapter.label) for ink in inks]
    rank = Line2D([], [], color="0.5", lw=2.5, alpha=0.5, label="R, the rank of the factors")
    uncounted = Patch(color="0.9", label="too small to count towards a rank")
    return [*lines, rank, uncounted]
