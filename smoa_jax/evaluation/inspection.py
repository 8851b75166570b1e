"""What an adapter touches, and what it learned: targets, counts, spectra of its updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.residual import residual
from smoa_jax.adapter.targets import Target, find_targets
from smoa_jax.adapter.tree import count_target
from smoa_jax.adapter.types import Modulation, Params

#: Singular values below this share of the largest do not count towards a rank.
RANK_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetRow:
    """One kernel of a stack as a report shows it.

    ``selected`` holds the indices of the layers that are adapted, 0 for a kernel without a stack;
    ``ranks`` those of the subspaces.
    """

    name: str
    stacked: bool
    selected: tuple[int, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    trainable: int

    @property
    def layers(self) -> int:
        """How many layers are adapted."""
        return len(self.selected)

    @property
    def rank(self) -> int:
        """R, of all subspaces together."""
        return sum(self.ranks)

    def among(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The adapted layers that are in ``layers``; all if it is empty or there is no stack."""
        if not layers or not self.stacked:
            return self.selected
        return tuple(layer for layer in self.selected if layer in layers)


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

    @property
    def largest(self) -> float:
        """The largest singular value."""
        return float(self.singular_values[0])

    @property
    def median(self) -> float:
        """The singular value in the middle."""
        return float(self.singular_values[len(self.singular_values) // 2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateSummary:
    """The updates of one kernel, each figure as least, median and greatest over its layers."""

    name: str
    layers: int
    full_rank: int
    rank: tuple[float, float, float]
    relative_norm: tuple[float, float, float]
    largest: tuple[float, float, float]


def target_rows(base_params: Params, config: SmoaConfig) -> list[TargetRow]:
    """What ``config`` would train of a (possibly abstract) tree."""
    return [_row(target, config) for target in find_targets(base_params, config)]


def _row(target: Target, config: SmoaConfig) -> TargetRow:
    return TargetRow(
        name=target.name,
        stacked=bool(target.leading),
        selected=tuple(
            layer for layer, chosen in zip(target.layers, target.selected, strict=True) if chosen
        ),
        shape=target.matrix_shape[-2:],
        ranks=target.subspace_ranks,
        trainable=count_target(target, config),
    )


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


def summarise(spectra: Sequence[UpdateSpectrum]) -> list[UpdateSummary]:
    """One summary for each kernel, in the order of ``spectra``."""
    kernels: dict[str, list[UpdateSpectrum]] = {}
    for spectrum in spectra:
        kernels.setdefault(spectrum.name, []).append(spectrum)
    return [
        UpdateSummary(
            name=name,
            layers=len(found),
            full_rank=len(found[0].singular_values),
            rank=_spread(found, lambda spectrum: spectrum.rank),
            relative_norm=_spread(found, lambda spectrum: spectrum.relative_norm),
            largest=_spread(found, lambda spectrum: spectrum.largest),
        )
        for name, found in kernels.items()
    ]


def _spread(
    spectra: Sequence[UpdateSpectrum], figure: Callable[[UpdateSpectrum], float]
) -> tuple[float, float, float]:
    values = [figure(spectrum) for spectrum in spectra]
    return float(min(values)), float(np.median(values)), float(max(values))
