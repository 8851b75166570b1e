"""Spectra, and how those of single layers are laid upon each other.

Bands are as large as their kernel, so they lie where it lies; everything else is small, and whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.placement import full_spec
from smoa_jax.adapter.targets import Target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockScores:
    """Centre of mass in the spectrum of each input and output coordinate, in units of index j."""

    inputs: Any  # (L?, I) float32
    outputs: Any  # (L?, O) float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BandParts:
    """The bands of the spectrum: their matrices but the last, where they begin, their norms."""

    bands: Any  # (L?, M-1, I, O) in the kernel's dtype
    cuts: Any  # (L?, M-1) float32, first singular index of bands 2..M
    norms: Any  # (L?, M) float32, Frobenius


#: Partitions that follow a kernel's spectrum.
SPECTRAL_PARTITIONS = ("spectral_blocks", "aligned_blocks", "spectral_bands")
Spectrum: TypeAlias = BlockScores | BandParts
#: Dotted module path -> spectrum; empty for partitions that need none.
Spectra: TypeAlias = dict[str, Spectrum]
#: What planning one layer gives, by field of its spectrum.
Result: TypeAlias = dict[str, np.ndarray]
#: Begin and end of a part of an array, for each axis.
Bounds: TypeAlias = tuple[tuple[int, int], ...]


def layer_structs(
    shape: tuple[int, ...], dtype: Any, config: SmoaConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the result of one (I, O) layer looks like."""
    inputs, outputs = shape
    subspaces = config.num_subspaces
    if config.has_blocks:
        shapes = {"inputs": (inputs,), "outputs": (outputs,)}
    else:
        shapes = {
            "bands": (subspaces - 1, inputs, outputs),
            "cuts": (subspaces - 1,),
            "norms": (subspaces,),
        }
    return {
        name: jax.ShapeDtypeStruct(shape, dtype if name == "bands" else jnp.float32)
        for name, shape in shapes.items()
    }


def abstract_spectrum(target: Target, config: SmoaConfig) -> Spectrum | None:
    """What planning a target gives, of ``ShapeDtypeStruct``; None where it gives nothing."""
    if config.partition not in SPECTRAL_PARTITIONS:
        return None
    fields = {
        name: jax.ShapeDtypeStruct((*target.leading, *struct.shape), struct.dtype)
        for name, struct in layer_structs(target.matrix_shape[-2:], target.dtype, config).items()
    }
    return BlockScores(**fields) if config.has_blocks else BandParts(**fields)


class LayerStack:
    """The results of one kernel, layer upon layer; layers left out hold zeros.

    Bands lie where their kernel lies: of a kernel with a ``NamedSharding`` only the shards of this
    process's devices exist. Everything else is small, and whole.
    """

    def __init__(self, target: Target, kernel: Any, config: SmoaConfig):
        self._target = target
        self._abstract = abstract_spectrum(target, config)
        assert self._abstract is not None
        self._sharding = _bands_sharding(target, kernel) if not config.has_blocks else None
        self._whole: dict[str, np.ndarray] = {}
        self._shards: dict[Bounds, np.ndarray] = {}  # of bands, by place
        for field in dataclasses.fields(self._abstract):
            struct = getattr(self._abstract, field.name)
            if field.name == "bands" and self._sharding is not None:
                for bounds in self._places().values():
                    if bounds not in self._shards:
                        shape = [stop - start for start, stop in bounds]
                        self._shards[bounds] = np.zeros(shape, struct.dtype)
            else:
                self._whole[field.name] = np.zeros(struct.shape, struct.dtype)

    def put(self, layer: int, result: Mapping[str, np.ndarray]) -> None:
        """Take in one layer's result."""
        stacked = bool(self._target.leading)
        for name, array in self._whole.items():
            array[(layer,) if stacked else ()] = result[name]
        for bounds, shard in self._shards.items():
            part = tuple(slice(*edges) for edges in (bounds[1:] if stacked else bounds))
            if not stacked:
                shard[...] = result["bands"][part]
            elif layer in range(*bounds[0]):
                shard[layer - bounds[0][0]] = result["bands"][part]

    def spectrum(self) -> Spectrum:
        """All layers."""
        fields: dict[str, Any] = dict(self._whole)
        if self._sharding is not None:
            assert isinstance(self._abstract, BandParts)
            struct = self._abstract.bands
            arrays = [
                jax.device_put(self._shards[bounds], device)
                for device, bounds in self._places().items()
            ]
            fields["bands"] = jax.make_array_from_single_device_arrays(
                struct.shape, self._sharding, arrays, dtype=struct.dtype
            )
        assert self._abstract is not None
        return type(self._abstract)(**fields)

    def _places(self) -> dict[Any, Bounds]:
        """Where the bands of each device of this process begin and end, by axis."""
        assert self._sharding is not None
        assert isinstance(self._abstract, BandParts)
        shape = self._abstract.bands.shape
        return {
            device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            for device, index in self._sharding.addressable_devices_indices_map(shape).items()
            if index is not None
        }


def _bands_sharding(target: Target, kernel: Any) -> NamedSharding | None:
    """That of the kernel, bands whole; None where its axes are not those of its matrix."""
    if not isinstance(kernel, jax.Array) or not isinstance(kernel.sharding, NamedSharding):
        return None
    if target.view_text:
        return None
    axes = full_spec(kernel.sharding, kernel.ndim)
    return NamedSharding(kernel.sharding.mesh, PartitionSpec(*axes[:-2], None, *axes[-2:]))
