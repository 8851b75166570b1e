"""A merged model on the host, one kernel of one layer at a time: nothing else of it ever exists.

``MergedReader`` is a checkpoint like any other, under Hugging Face names: whoever reads a tensor of
it has the base's read from its files, the update formed from that layer's factors on the CPU, and
both added in float32. So an export needs neither an accelerator nor room for the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.merge import MergeLoss, layer_loss, merge_layer
from smoa_jax.adapter.planning.spectra import BandParts, check_bands, layer_bands_of
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.adapter.types import Bands, Modulation, Params
from smoa_jax.checkpoint.assemble import Index, StoredTensor
from smoa_jax.checkpoint.base import StoredBase
from smoa_jax.checkpoint.names import TensorSlot, TreePath


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """One layer of an adapted kernel, on the host.

    Attributes:
        name: Dotted path of the module.
        layer: Index among the model's layers; 0 for a kernel without one.
        weight: ``(I, O)``, float32.
        modulation: Its own, without a layer axis, with its bands if it has any.
    """

    name: str
    layer: int
    weight: np.ndarray
    modulation: Modulation


class MergedReader:
    """The tensors of a base with an adapter merged in, as a ``TensorReader``.

    Args:
        base: Whose weights are read.
        params: The adapter beside an abstract base (``open_adapter``), on the host.
        config: The adapter's.
        rounded_to: Dtype whose rounding loss is kept account of, for ``report``; None: of none.
        cache_dir: Where spectral bands are kept between uses; None: nowhere.
    """

    def __init__(
        self,
        base: StoredBase,
        params: Params,
        config: SmoaConfig,
        *,
        rounded_to: Any = None,
        cache_dir: Path | None = None,
    ):
        self._base, self._config = base, config
        self._rounded_to, self._cache_dir = rounded_to, cache_dir
        self._modulations: dict[TreePath, tuple[str, Modulation]] = {}
        for name, (path, node, key) in find_modulations(params).items():
            # Stored nowhere, an adapter's bands are abstract here; each layer's are made for it.
            known = dataclasses.replace(node, bands=None) if isinstance(node, Bands) else node
            self._modulations[(*path, key)] = (name, known)
        self._sums: dict[str, np.ndarray] = {}
        self._cpu = jax.devices("cpu")[0]

    @property
    def source(self) -> str:
        """Where the base lies."""
        return self._base.reader.source

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name, as the base stores them."""
        return self._base.reader.tensors

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor as laid out on disk; of an adapted kernel, merged in float32."""
        slot = self._base.slots.get(name)
        if slot is None or slot.path not in self._modulations:
            return self._base.reader.read(name, index)
        layer = self._layer(slot)
        if self._rounded_to is not None:
            self._account(layer, self._rounded_to)
        with jax.default_device(self._cpu):
            merged = np.asarray(merge_layer(layer.weight, layer.modulation))
        return (merged.T if slot.transpose else merged)[index]

    def ends(self, name: str, size: int) -> tuple[bytes, bytes]:
        """The ends of the base's own tensor."""
        return self._base.reader.ends(name, size)

    def layers(self, wanted: Mapping[str, Collection[int]] | None = None) -> Iterator[AdaptedLayer]:
        """Every adapted layer, kernel by kernel; of ``wanted``, by name, only the layers there."""
        slots: dict[TreePath, list[TensorSlot]] = {}
        for slot in self._base.slots.values():
            slots.setdefault(slot.path, []).append(slot)
        for path in sorted(self._modulations, key=lambda path: self._modulations[path][0]):
            name = self._modulations[path][0]
            for slot in slots[path]:
                if wanted is None or (slot.number or 0) in wanted.get(name, ()):
                    yield self._layer(slot)

    def measure(self, dtype: Any) -> dict[str, MergeLoss]:
        """What rounding to ``dtype`` would lose of each adapted kernel; none is merged."""
        self._sums.clear()
        for layer in self.layers():
            self._account(layer, dtype)
        return self.report()

    def report(self) -> dict[str, MergeLoss]:
        """What rounding has lost of the kernels read so far, by dotted module path."""
        return {name: MergeLoss.of_sums(*sums) for name, sums in sorted(self._sums.items())}

    def _layer(self, slot: TensorSlot) -> AdaptedLayer:
        name, node = self._modulations[slot.path]
        whole = tuple(slice(0, size) for size in slot.shape)
        stored = np.asarray(self._base.reader.read(slot.name, whole), np.float32)
        weight = stored.T if slot.transpose else stored
        if slot.layer is not None:
            node = jax.tree.map(lambda leaf: leaf[slot.layer], node)
        if isinstance(node, Bands):
            node = self._with_bands(weight, node, name, slot.number)
        return AdaptedLayer(name=name, layer=slot.number or 0, weight=weight, modulation=node)

    def _with_bands(
        self, weight: np.ndarray, node: Bands, name: str, layer: int | None
    ) -> Modulation:
        if not np.asarray(node.ranks).any():  # a layer that isn't adapted has no bands
            shape = (len(node.norms) - 1, *weight.shape)
            return dataclasses.replace(node, bands=np.zeros(shape, weight.dtype))
        where = name if layer is None else f"{name}[{layer}]"
        with jax.default_device(self._cpu):
            found = layer_bands_of(
                weight, self._config, where, cuts=node.cuts, cache_dir=self._cache_dir
            )
        check_bands(np.asarray(node.norms), BandParts(**found), where)
        return dataclasses.replace(node, bands=found["bands"])

    def _account(self, layer: AdaptedLayer, dtype: Any) -> None:
        with jax.default_device(self._cpu):
            sums = layer_loss(layer.weight, layer.modulation, jnp.dtype(dtype))
        known = self._sums.get(layer.name, np.zeros(3))
        self._sums[layer.name] = known + np.asarray(sums, np.float64)
