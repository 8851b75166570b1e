"""What a partition needs to know of each kernel's spectrum, planned once before training.

``plan_spectra`` decomposes every targeted kernel, one layer at a time per device, in float32 at the
highest matmul precision. Blocks [S2] need each coordinate's centre of mass in the spectrum; bands
[S1] need the parts of the weight themselves.

The decomposition is the symmetric eigendecomposition of the smaller Gram matrix, not an SVD. With
``W W^T = U diag(s^2) U^T`` (for I <= O) everything the method defines follows without a division:
``e_in = U^2 s^2``, ``e_out = (W^T U)^2``, ``s = |W^T U|`` column by column, ``W_m = U_m U_m^T W``.
It is several times faster and gives the same partition; ``benchmarks/spectral_planning.py``
measures both.

Abstract kernels (``jax.ShapeDtypeStruct``) give abstract spectra and compute nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from threadpoolctl import threadpool_limits

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.targets import Target, find_targets
from smoa_jax.adapter.types import Params

_HIGHEST = jax.lax.Precision.HIGHEST
_CACHE_VERSION = 1


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


Spectrum: TypeAlias = BlockScores | BandParts
#: Dotted module path -> spectrum; empty for partitions that need none.
Spectra: TypeAlias = dict[str, Spectrum]
#: Called with (layers done, layers in all, module path) as planning proceeds.
Progress: TypeAlias = Callable[[int, int, str], None]


def plan_spectra(
    base_params: Params,
    config: SmoaConfig,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Spectra:
    """Decompose every kernel that ``config`` adapts; slow once, cacheable.

    Memory: one layer's kernel and factors at a time per device, beside the results, which are two
    vectors per layer for blocks and M - 1 kernels for bands.

    Args:
        base_params: Nested dict of arrays, or of ``ShapeDtypeStruct`` for an abstract plan.
        config: Only its targets, partition and number of subspaces matter here.
        cache_dir: Directory of results of earlier calls, keyed by the content of each layer's
            weights. An entry that cannot be read is recomputed, with a warning.
        progress: Told after every layer.

    Returns:
        Spectra by dotted module path; ``{}`` when the partition needs none.

    Raises:
        ValueError: as ``find_targets``; if a band is empty; if a kernel is not finite.
    """
    targets = find_targets(base_params, config)
    if config.partition not in ("spectral_blocks", "spectral_bands"):
        return {}
    kernels = [_module(base_params, target)[target.key] for target in targets]
    if any(isinstance(kernel, jax.ShapeDtypeStruct) for kernel in kernels):
        return {t.name: _abstract(t, k, config) for t, k in zip(targets, kernels, strict=True)}
    if any(isinstance(kernel, Tracer) for kernel in kernels):
        return {t.name: _traced(t, k, config) for t, k in zip(targets, kernels, strict=True)}
    planner = _Planner(config, Path(cache_dir) if cache_dir is not None else None)
    jobs = [
        (target, kernel, layer)
        for target, kernel in zip(targets, kernels, strict=True)
        for layer, selected in enumerate(target.selected)
        if selected
    ]
    results: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    devices = jax.local_devices()
    workers = min(len(devices), os.cpu_count() or 1)
    if devices[0].platform == "cpu":
        workers = os.cpu_count() or 1
    # One BLAS thread each: LAPACK's own threads slow a busy machine down by a factor of ten.
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        futures = [
            pool.submit(planner.layer, target, kernel, layer, devices[index % len(devices)])
            for index, (target, kernel, layer) in enumerate(jobs)
        ]
        try:
            for done, ((target, _, layer), future) in enumerate(zip(jobs, futures, strict=True)):
                results[target.name, layer] = future.result()
                if progress is not None:
                    progress(done + 1, len(jobs), target.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {t.name: _assemble(t, k, config, results) for t, k in zip(targets, kernels, strict=True)}


def check_bands(stored_norms: np.ndarray, parts: BandParts, path: str) -> None:
    """Refuse recomputed bands whose norms differ from the stored ones by more than 1e-5.

    Raises:
        ValueError: naming the kernel; the base is then another one than the adapter's.
    """
    got, expected = np.asarray(parts.norms), np.asarray(stored_norms)
    error = float(np.max(np.abs(got - expected) / np.maximum(np.abs(expected), 1e-30)))
    if not error <= 1e-5:
        raise ValueError(
            f"got bands of {path} whose norms differ by {error:.1e} (relative) from the stored "
            "ones; expected at most 1e-5; load the adapter onto the base it was trained on"
        )


def band_cuts(singular_values: np.ndarray, num_bands: int, path: str) -> tuple[int, ...]:
    """First index of bands 2..M by cumulative energy of singular values, in float64 [S1].

    Band m holds the j with ``(m-1)/M < E(j) <= m/M``; the last one takes the rest.

    Raises:
        ValueError: if a band is empty, naming the kernel.
    """
    values = np.asarray(singular_values, np.float64)
    energy = np.cumsum(values)
    energy = energy / energy[-1] if energy[-1] > 0 else energy
    cuts = [int(np.searchsorted(energy, m / num_bands, side="right")) for m in range(1, num_bands)]
    edges = [0, *cuts, len(values)]
    for band, (start, stop) in enumerate(itertools.pairwise(edges)):
        if stop <= start:
            raise ValueError(
                f"got an empty spectral band {band + 1} of {num_bands} in {path}, whose first "
                f"singular value holds {energy[0]:.0%} of the energy; expected a singular value in "
                "every band; lower num_subspaces or exclude the kernel"
            )
    return tuple(cuts)


class _Planner:
    """Decomposes single layers, or finds them in the cache."""

    def __init__(self, config: SmoaConfig, cache_dir: Path | None):
        self._config = config
        self._cache_dir = cache_dir

    def layer(self, target: Target, kernel: Any, layer: int, device: Any) -> dict[str, np.ndarray]:
        name = f"{target.name}[{layer}]" if target.leading else target.name
        matrix = kernel_layer(kernel, target, layer)
        path = self._entry(matrix)
        if path is not None and path.exists():
            found = self._read(path, matrix.shape, name)
            if found is not None:
                return found
        matrix = jax.device_put(matrix, device)
        if not bool(jnp.isfinite(matrix).all()):
            raise ValueError(
                f"got values that are not finite in {name}; expected finite weights; check the "
                "checkpoint"
            )
        if self._config.has_blocks:
            result = {k: np.asarray(v) for k, v in _scores(matrix).items()}
        else:
            result = _bands(matrix, self._config.num_subspaces, name)
        if path is not None:
            _write(path, result)
        return result

    def _entry(self, matrix: Any) -> Path | None:
        if self._cache_dir is None:
            return None
        host = np.asarray(matrix)
        kind = (_CACHE_VERSION, self._config.partition, str(host.dtype), host.shape)
        if not self._config.has_blocks:  # scores serve any number of blocks, bands do not
            kind = (*kind, self._config.num_subspaces)
        digest = hashlib.sha256(repr(kind).encode())
        digest.update(np.ascontiguousarray(host).view(np.uint8).data)
        return self._cache_dir / f"{digest.hexdigest()[:40]}.npz"

    def _read(self, path: Path, shape: tuple[int, ...], name: str):
        inputs, outputs = shape
        subspaces = self._config.num_subspaces
        expected = {"inputs": (inputs,), "outputs": (outputs,)}
        if not self._config.has_blocks:
            expected = {
                "bands": (subspaces - 1, inputs, outputs),
                "cuts": (subspaces - 1,),
                "norms": (subspaces,),
            }
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = {key: stored[key] for key in expected}
            if any(found[key].shape != size for key, size in expected.items()):
                raise ValueError(f"shapes {[value.shape for value in found.values()]}")
            return found
        except Exception as error:  # zip, zlib, key and value errors alike mean: not usable
            warnings.warn(
                f"the cached spectrum of {name} in {path} cannot be used ({error}); it is "
                "computed again",
                stacklevel=2,
            )
            return None


def kernel_layer(kernel: Any, target: Target, layer: int) -> jax.Array:
    """One layer of a kernel as (I, O), without moving the others."""
    if not target.leading:
        return target.view.to_matrix(kernel)
    if target.view.num_layer_axes == 1:
        one = jax.lax.index_in_dim(kernel, layer, target.view.order[0], keepdims=False)
        return target.view.of_one_layer().to_matrix(one)
    return target.view.to_matrix(kernel)[layer]


def _write(path: Path, result: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.{id(result)}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **result)  # type: ignore[arg-type]
    os.replace(temporary, path)


def _decompose(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For I <= O: ``U`` (I, q), ``W^T U`` (O, q) and ``s`` (q,), in descending order of s."""
    gram = jnp.matmul(matrix, matrix.T, precision=_HIGHEST)
    _, vectors = jnp.linalg.eigh(gram)
    vectors = vectors[:, ::-1]
    projected = jnp.matmul(matrix.T, vectors, precision=_HIGHEST)
    values = jnp.sqrt(jnp.sum(projected**2, axis=0))
    # The Gram matrix orders by s^2 in its own rounding; |W^T u| is the finer measure.
    order = jnp.argsort(-values, stable=True)
    return vectors[:, order], projected[:, order], values[order]


@jax.jit
def _scores(matrix: jax.Array) -> dict[str, jax.Array]:
    """Centre of mass of every coordinate [S2, step 2]."""
    wide = matrix.shape[0] <= matrix.shape[1]
    weight = matrix.astype(jnp.float32)
    vectors, projected, values = _decompose(weight if wide else weight.T)
    near, far = _centre(vectors**2 * values[None, :] ** 2), _centre(projected**2)
    return {"inputs": near, "outputs": far} if wide else {"inputs": far, "outputs": near}


def _centre(energy: jax.Array) -> jax.Array:
    index = jnp.arange(energy.shape[1], dtype=jnp.float32)
    total = jnp.maximum(energy.sum(axis=1), jnp.finfo(jnp.float32).tiny)
    return jnp.matmul(energy, index, precision=_HIGHEST) / total


@jax.jit
def _factors(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = matrix.shape[0] <= matrix.shape[1]
    weight = matrix.astype(jnp.float32)
    return _decompose(weight if wide else weight.T)


@functools.partial(jax.jit, static_argnames=("start", "stop", "transposed"))
def _band(vectors, projected, *, start: int, stop: int, transposed: bool) -> jax.Array:
    part = jnp.matmul(vectors[:, start:stop], projected[:, start:stop].T, precision=_HIGHEST)
    return part.T if transposed else part


def _bands(matrix: jax.Array, num_bands: int, name: str) -> dict[str, np.ndarray]:
    """The parts of one (I, O) weight in each band of its spectrum but the last [S1]."""
    transposed = matrix.shape[0] > matrix.shape[1]
    vectors, projected, values = _factors(matrix)
    cuts = band_cuts(np.asarray(values), num_bands, name)
    edges = (0, *cuts)
    rest = matrix.astype(jnp.float32)
    parts, norms = [], []
    for start, stop in itertools.pairwise(edges):
        part = _band(vectors, projected, start=start, stop=stop, transposed=transposed)
        part = part.astype(matrix.dtype)  # the last band then takes up this rounding
        rest = rest - part.astype(jnp.float32)
        parts.append(np.asarray(part))
        norms.append(float(jnp.linalg.norm(part.astype(jnp.float32))))
    norms.append(float(jnp.linalg.norm(rest)))
    shape = (num_bands - 1, *matrix.shape)
    return {
        "bands": np.stack(parts) if parts else np.zeros(shape, matrix.dtype),
        "cuts": np.asarray(cuts, np.float32),
        "norms": np.asarray(norms, np.float32),
    }


def _module(params: Params, target: Target) -> Params:
    for key in target.path:
        params = params[key]
    return params


def _abstract(target: Target, kernel: Any, config: SmoaConfig) -> Spectrum:
    *leading, inputs, outputs = target.matrix_shape
    subspaces = config.num_subspaces

    def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *shape), dtype)

    if config.has_blocks:
        return BlockScores(inputs=struct(inputs), outputs=struct(outputs))
    return BandParts(
        bands=struct(subspaces - 1, inputs, outputs, dtype=kernel.dtype),
        cuts=struct(subspaces - 1),
        norms=struct(subspaces),
    )


def _traced(target: Target, kernel: Any, config: SmoaConfig) -> Spectrum:
    """The same as part of a traced program; ``jax.eval_shape`` then computes nothing."""
    matrix = target.view.to_matrix(kernel)
    layers = matrix if target.leading else matrix[None]
    if config.has_blocks:
        spectrum = BlockScores(**jax.lax.map(_scores, layers))
    else:
        subspaces = config.num_subspaces
        spectrum = jax.lax.map(lambda w: _traced_bands(w, subspaces, target.name), layers)
    return spectrum if target.leading else jax.tree.map(lambda leaf: leaf[0], spectrum)


def _traced_bands(matrix: jax.Array, num_bands: int, name: str) -> BandParts:
    transposed = matrix.shape[0] > matrix.shape[1]
    vectors, projected, values = _factors(matrix)
    cuts = jax.pure_callback(  # on the host, for float64 and for the error of an empty band
        lambda s: np.asarray(band_cuts(np.asarray(s), num_bands, name), np.float32),
        jax.ShapeDtypeStruct((num_bands - 1,), jnp.float32),
        values,
    )
    edges = jnp.concatenate([jnp.zeros(1), cuts])
    index = jnp.arange(values.shape[0])
    rest, parts, norms = matrix.astype(jnp.float32), [], []
    for band in range(num_bands - 1):
        inside = (index >= edges[band]) & (index < edges[band + 1])
        part = jnp.matmul(vectors * inside[None, :], projected.T, precision=_HIGHEST)
        part = (part.T if transposed else part).astype(matrix.dtype)
        rest = rest - part.astype(jnp.float32)
        parts.append(part)
        norms.append(jnp.linalg.norm(part.astype(jnp.float32)))
    bands = jnp.stack(parts) if parts else jnp.zeros((0, *matrix.shape), matrix.dtype)
    return BandParts(bands=bands, cuts=cuts, norms=jnp.stack([*norms, jnp.linalg.norm(rest)]))


def _assemble(target: Target, kernel: Any, config: SmoaConfig, results) -> Spectrum:
    """Stack the layers of one kernel; layers left out hold zeros."""
    abstract = _abstract(target, kernel, config)
    fields = {}
    for field in dataclasses.fields(abstract):
        struct = getattr(abstract, field.name)
        array = np.zeros(struct.shape, struct.dtype)
        for layer, selected in enumerate(target.selected):
            if selected:
                array[(layer,) if target.leading else ()] = results[target.name, layer][field.name]
        fields[field.name] = array
    return type(abstract)(**fields)
