"""What an adapter touches, and what it learned: targets, counts, spectra of its updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.modulation import residual
from smoa_jax.adapter.targets import find_targets
from smoa_jax.adapter.tree import count_target
from smoa_jax.adapter.types import Modulation, Params
from smoa_jax.checks import require

#: Singular values below this share of the largest do not count towards a rank.
RANK_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetRow:
    """One kernel of a stack as a report shows it."""

    name: str
    layers: int
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    trainable: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateSpectrum:
    """Singular values of ``W' - W`` of one layer's kernel, descending.

    ``rank`` counts those above ``RANK_TOLERANCE`` of the largest; ``relative_norm`` is the
    Frobenius norm of the update over that of the weight.
    """

    name: str
    layer: int
    singular_values: np.ndarray
    rank: int
    relative_norm: float


def target_rows(base_params: Params, config: SmoaConfig) -> list[TargetRow]:
    """What ``config`` would train of a (possibly abstract) tree."""
    return [
        TargetRow(
            name=target.name,
            layers=sum(target.selected),
            shape=target.matrix_shape[-2:],
            ranks=target.subspace_ranks,
            trainable=count_target(target, config),
        )
        for target in find_targets(base_params, config)
    ]


def update_spectrum(
    name: str, layer: int, weight: jax.Array | np.ndarray, modulation: Modulation
) -> UpdateSpectrum:
    """The spectrum of one layer's update, from its (I, O) weight and its own modulation."""
    change = residual(jnp.asarray(weight), modulation)
    values = np.asarray(jnp.linalg.svd(change, compute_uv=False))
    norm = float(np.linalg.norm(np.asarray(weight, np.float32)))
    return UpdateSpectrum(
        name=name,
        layer=layer,
        singular_values=values,
        rank=int((values > RANK_TOLERANCE * values[0]).sum()) if values[0] else 0,
        relative_norm=float(np.linalg.norm(values)) / norm,
    )


def plot_spectra(spectra: Sequence[UpdateSpectrum], path: str | Path) -> None:
    """Singular values of the updates, one panel per kernel, one line per layer, as PNG.

    Raises:
        ImportError: without the extra ``plot``.
        ValueError: if every update is zero, as before any training.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
    except ImportError as error:
        raise ImportError(
            "got no matplotlib; expected the extra 'plot'; pip install 'smoa-jax[plot]'"
        ) from error
    require(
        any(spectrum.rank for spectrum in spectra),
        "an adapter whose updates are all zero",
        "a trained one",
        "train it first",
    )
    names = sorted({spectrum.name for spectrum in spectra})
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    depth = max(spectrum.layer for spectrum in spectra) + 1
    colors = plt.get_cmap("viridis")
    for place, name in enumerate(names):
        axis = axes.flat[place]
        for spectrum in (s for s in spectra if s.name == name and s.rank):
            values = spectrum.singular_values / spectrum.singular_values[0]
            index = np.arange(1, len(values) + 1)
            axis.semilogy(index, values, color=colors(spectrum.layer / max(depth - 1, 1)), lw=0.9)
        axis.set_title(name.removeprefix("layers."), fontsize=10)
        axis.set_ylim(1e-7, 2)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("index of singular value")
    figure.supylabel("singular value of the update, relative to its largest")
    if depth > 1:
        scale = ScalarMappable(cmap=colors, norm=Normalize(0, depth - 1))
        figure.colorbar(scale, ax=axes, label="layer")
    figure.savefig(path, dpi=130)
    plt.close(figure)
