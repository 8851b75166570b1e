"""What a partition needs to know of each kernel's spectrum, planned once before training.

``plan_spectra`` decomposes every targeted kernel (``decompose.py``), one layer at a time per
device. Blocks [S2] need each coordinate's centre of mass in the spectrum; bands [S1] need the parts
of the weight themselves.

Several processes share the layers out: each decomposes its own, then all receive all results
(``exchange.py``), so every layer is decomposed once and all processes hold the same bits.

Abstract kernels (``jax.ShapeDtypeStruct``) give abstract spectra and compute nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from threadpoolctl import threadpool_limits

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.planning.aligned import AxisTable, align
from smoa_jax.adapter.planning.cache import CacheEntry
from smoa_jax.adapter.planning.decompose import layer_bands, layer_scores, traced_bands
from smoa_jax.adapter.planning.exchange import (
    gather_layer,
    raise_together,
    share_result,
    spans_processes,
)
from smoa_jax.adapter.planning.memory import available_memory, decomposition_bytes
from smoa_jax.adapter.planning.stack import (
    SPECTRAL_PARTITIONS,
    BandParts,
    BlockScores,
    LayerStack,
    Result,
    Spectra,
    Spectrum,
    abstract_spectrum,
    layer_structs,
)
from smoa_jax.adapter.targets import Target, find_targets, lookup
from smoa_jax.adapter.types import Params
from smoa_jax.checks import require

#: Called with (layers done, layers in all, module path) as planning proceeds.
Progress: TypeAlias = Callable[[int, int, str], None]


def plan_spectra(
    base_params: Params,
    config: SmoaConfig,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    cuts: Mapping[str, Any] | None = None,
    targets: Sequence[Target] | None = None,
    shared_axes: AxisTable | None = None,
) -> Spectra:
    """Decompose every kernel that ``config`` adapts; slow once, cacheable.

    Memory: one layer's kernel and factors at a time per device, beside the results, which are two
    vectors per layer for blocks and M - 1 kernels for bands, laid out like their kernel. With
    several processes all must call this, with the same arguments; kernels may span them.

    Args:
        base_params: Nested dict of arrays, or of ``ShapeDtypeStruct`` for an abstract plan.
        config: Only its targets, partition and number of subspaces matter here.
        cache_dir: Directory of results of earlier calls, keyed by the content of each layer's
            weights. An entry that cannot be read is recomputed, with a warning.
        progress: Told after every layer, of this process's layers.
        cuts: Of bands that are known already, (L?, M-1) by dotted module path; None: by energy.
        targets: What ``find_targets`` finds in these params, where it has been asked already.
        shared_axes: For ``aligned_blocks``, which coordinates kernels share; a decoder's is
            ``smoa_jax.models.symmetry.shared_axes``. None: each kernel has its own.

    Returns:
        Spectra by dotted module path; ``{}`` when the partition needs none.

    Raises:
        ValueError: as ``find_targets``; if a band is empty; if a kernel is not finite.
    """
    targets = find_targets(base_params, config) if targets is None else targets
    if config.partition not in SPECTRAL_PARTITIONS:
        return {}
    kernels = [lookup(base_params, target.kernel_path) for target in targets]
    if any(isinstance(kernel, jax.ShapeDtypeStruct) for kernel in kernels):
        abstract = {target.name: abstract_spectrum(target, config) for target in targets}
        return {name: spectrum for name, spectrum in abstract.items() if spectrum is not None}
    table = (shared_axes or {}) if config.partition == "aligned_blocks" else {}
    if any(isinstance(kernel, Tracer) for kernel in kernels):
        traced = {t.name: _traced(t, k, config) for t, k in zip(targets, kernels, strict=True)}
        return align(traced, base_params, targets, table) if table else traced
    jobs = [
        _Job(target, kernel, layer)
        for target, kernel in zip(targets, kernels, strict=True)
        for layer, selected in enumerate(target.selected)
        if selected
    ]
    planner = _Planner(config, Path(cache_dir) if cache_dir is not None else None)

    def plan(job: _Job, fetch: Callable[[], Any], device: Any) -> Result:
        return planner.layer(fetch(), job.name, _known_cuts(cuts, job), device)

    own = _plan_share(jobs, plan, progress, 1 if config.has_blocks else config.num_subspaces)
    stacks = {t.name: LayerStack(t, k, config) for t, k in zip(targets, kernels, strict=True)}
    for number, job in enumerate(jobs):
        like = layer_structs(job.target.matrix_shape[-2:], job.kernel.dtype, config)
        owner = number % jax.process_count()
        result = share_result(own.pop(number, None), like, owner)
        stacks[job.target.name].put(job.layer, result)
    spectra = {name: stack.spectrum() for name, stack in stacks.items()}
    return align(spectra, base_params, targets, table) if table else spectra


def check_bands(stored_norms: np.ndarray, parts: BandParts, path: str) -> None:
    """Refuse recomputed bands whose norms differ from the stored ones by more than 1e-5.

    Raises:
        ValueError: naming the kernel; the base is then another one than the adapter's.
    """
    got, expected = np.asarray(parts.norms), np.asarray(stored_norms)
    error = float(np.max(np.abs(got - expected) / np.maximum(np.abs(expected), 1e-30)))
    require(
        error <= 1e-5,
        f"bands of {path} whose norms differ by {error:.1e} (relative) from the stored ones",
        "at most 1e-5",
        "load the adapter onto the base it was trained on",
    )


def num_workers(
    shapes: Sequence[tuple[int, ...]],
    *,
    num_bands: int = 1,
    cpus: int | None = None,
    memory: int | None = None,
) -> int:
    """Layers to decompose at a time: one for each CPU of this process that there is memory for.

    Args:
        shapes: (I, O) of the layers.
        num_bands: Parts of each weight that are formed; 1 where none is.
        cpus: That this process may use; None: as the system says.
        memory: Bytes that are free; None: likewise.
    """
    if cpus is None:
        affinity = getattr(os, "sched_getaffinity", None)
        cpus = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    memory = available_memory() if memory is None else memory
    largest = max(
        (decomposition_bytes(shape[0], shape[1], num_bands) for shape in shapes), default=1
    )
    return max(1, min(cpus, memory // largest))


@dataclasses.dataclass(frozen=True)
class _Job:
    """One layer to decompose."""

    target: Target
    kernel: Any
    layer: int

    @property
    def name(self) -> str:
        return f"{self.target.name}[{self.layer}]" if self.target.leading else self.target.name


def _plan_share(
    jobs: Sequence[_Job],
    plan: Callable[[_Job, Callable[[], Any], Any], Result],
    progress: Progress | None,
    num_bands: int,
) -> dict[int, Result]:
    """The results of every n-th job, n processes in all, layers in parallel.

    All processes walk through all jobs together, since each has parts of the kernels that span
    them; a layer of such a kernel is held by the process that decomposes it alone.
    """
    count, me = jax.process_count(), jax.process_index()
    devices = jax.local_devices()
    workers = num_workers([job.target.matrix_shape[-2:] for job in jobs], num_bands=num_bands)
    if devices[0].platform != "cpu":
        workers = min(len(devices), workers)
    total = len(range(me, len(jobs), count))
    results: dict[int, Result] = {}
    pending: dict[Future, int] = {}
    error: Exception | None = None

    def settle(most: int) -> None:
        """Wait until at most ``most`` layers are under way."""
        while len(pending) > most:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                number = pending.pop(future)
                results[number] = future.result()
                if progress is not None:
                    progress(len(results), total, jobs[number].target.name)

    # One BLAS thread each: LAPACK's own threads slow a busy machine down by a factor of ten.
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        try:
            for number, job in enumerate(jobs):
                mine = number % count == me and error is None
                try:
                    if mine:
                        settle(workers - 1)
                except Exception as raised:  # the others still wait for this process's parts
                    error, mine = raised, False
                fetch = functools.partial(kernel_layer, job.kernel, job.target, job.layer)
                if spans_processes(job.kernel):
                    matrix = fetch()
                    fetch = functools.partial(np.asarray, matrix)
                if mine:
                    device = devices[number // count % len(devices)]
                    pending[pool.submit(plan, job, fetch, device)] = number
            try:
                if error is None:
                    settle(0)
            except Exception as raised:
                error = raised
            raise_together(error)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


class _Planner:
    """Decomposes single layers, or finds them in the cache."""

    def __init__(self, config: SmoaConfig, cache_dir: Path | None):
        self._config = config
        self._cache_dir = cache_dir

    def layer(self, weight: Any, name: str, cuts: list[int] | None, device: Any) -> Result:
        """What the partition needs of one (I, O) weight; with ``cuts``, its bands between them."""
        entries = self._entries(weight, name, cuts)
        for entry in entries:
            found = entry.read()
            if found is not None and (cuts is None or cuts == found["cuts"].tolist()):
                return found
        matrix = jax.device_put(weight, device)
        require(
            bool(jnp.isfinite(matrix).all()),
            f"values that are not finite in {name}",
            "finite weights",
            "check the checkpoint",
        )
        if self._config.has_blocks:
            result = {k: np.asarray(v) for k, v in layer_scores(matrix).items()}
        else:
            result = layer_bands(matrix, self._config.num_subspaces, name, cuts)
        for entry in entries[-1:]:
            entry.write(result)
        return result

    def _entries(self, weight: Any, name: str, cuts: list[int] | None) -> list[CacheEntry]:
        """Where the result may lie; the last is its own place.

        Bands of known cuts are kept apart: they needn't be those that this host would cut.
        """
        if self._cache_dir is None:
            return []
        kind: tuple[Any, ...] = ("spectral_blocks",)
        if not self._config.has_blocks:  # scores serve all blocks, in any number; bands do not
            kind = (self._config.partition, self._config.num_subspaces)
        kinds = [kind] if cuts is None else [kind, (*kind, *cuts)]
        matrix = np.asarray(weight)
        like = layer_structs(matrix.shape, matrix.dtype, self._config)
        return [CacheEntry(self._cache_dir, matrix, kind, like, name) for kind in kinds]


def layer_bands_of(
    weight: np.ndarray,
    config: SmoaConfig,
    name: str,
    *,
    cuts: Any,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Result:
    """The fields of ``BandParts`` of one (I, O) weight, of which the cuts are known.

    Args:
        weight: On the host.
        config: Whose number of subspaces matters.
        name: Of the kernel, for errors.
        cuts: First singular indices of bands 2..M.
        cache_dir: As for ``plan_spectra``.

    Raises:
        ValueError: for cuts that this weight cannot have, or values that are not finite.
    """
    planner = _Planner(config, Path(cache_dir) if cache_dir is not None else None)
    return planner.layer(weight, name, [int(cut) for cut in np.asarray(cuts)], None)


def _known_cuts(cuts: Mapping[str, Any] | None, job: _Job) -> list[int] | None:
    if cuts is None:
        return None
    found = np.asarray(cuts[job.target.name])
    return [int(cut) for cut in (found[job.layer] if job.target.leading else found)]


def kernel_layer(kernel: Any, target: Target, layer: int) -> jax.Array:
    """One layer of a kernel as (I, O), without moving the others.

    All processes must call it for a kernel that spans them.
    """
    one: Any = gather_layer(kernel, target.view, layer)
    return target.view.of_one_layer().to_matrix(one)


def _traced(target: Target, kernel: Any, config: SmoaConfig) -> Spectrum:
    """The same as part of a traced program; ``jax.eval_shape`` then computes nothing."""
    matrix = target.view.to_matrix(kernel)
    layers = matrix if target.leading else matrix[None]
    if config.has_blocks:
        spectrum = BlockScores(**jax.lax.map(layer_scores, layers))
    else:
        subspaces = config.num_subspaces
        parts = jax.lax.map(lambda w: traced_bands(w, subspaces, target.name), layers)
        spectrum = BandParts(**parts)
    return spectrum if target.leading else jax.tree.map(lambda leaf: leaf[0], spectrum)
