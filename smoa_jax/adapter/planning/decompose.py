"""The spectrum of one layer's weight: centres of mass for blocks [S2], parts for bands [S1].

The decomposition is the symmetric eigendecomposition of the smaller Gram matrix, not an SVD. With
``W W^T = U diag(s^2) U^T`` (for I <= O) everything the method defines follows without a division:
``e_in = U^2 s^2``, ``e_out = (W^T U)^2``, ``s = |W^T U|`` column by column, ``W_m = U_m U_m^T W``.
It is several times faster and gives the same partition; ``benchmarks/spectral_planning.py``
measures both. All of it is float32 at the highest matmul precision.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.checks import require

_HIGHEST = jax.lax.Precision.HIGHEST
#: How many programs there are at most for the bands of kernels of one shape.
_BAND_WIDTHS = 16


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
        require(
            stop > start,
            f"an empty spectral band {band + 1} of {num_bands} in {path}, whose first singular "
            f"value holds {energy[0]:.0%} of the energy",
            "a singular value in every band",
            "lower num_subspaces or exclude the kernel",
        )
    return tuple(cuts)


@jax.jit
def layer_scores(matrix: jax.Array) -> dict[str, jax.Array]:
    """Centre of mass of every input and output coordinate of an (I, O) weight [S2, step 2]."""
    wide = matrix.shape[0] <= matrix.shape[1]
    weight = matrix.astype(jnp.float32)
    vectors, projected, values = _decompose(weight if wide else weight.T)
    near, far = _centre(vectors**2 * values[None, :] ** 2), _centre(projected**2)
    return {"inputs": near, "outputs": far} if wide else {"inputs": far, "outputs": near}


def layer_bands(
    matrix: jax.Array, num_bands: int, name: str, cuts: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """The parts of one (I, O) weight in each band of its spectrum but the last [S1].

    Args:
        matrix: The weight.
        num_bands: M.
        name: Of the kernel, for errors.
        cuts: First indices of bands 2..M, if they are known: another library may round energies to
            the other side of a cut. None: by energy.

    Raises:
        ValueError: if a band is empty.
    """
    transposed = matrix.shape[0] > matrix.shape[1]
    vectors, projected, values = _factors(matrix)
    if cuts is None:
        cuts = band_cuts(np.asarray(values), num_bands, name)
    edges = (0, *cuts)
    require(
        list(edges) == sorted({*edges}) and edges[-1] < len(values),
        f"cuts {tuple(cuts)} for the {len(values)} singular values of {name}",
        "ascending indices inside them",
        "the adapter is damaged, or of another base",
    )
    rest = matrix.astype(jnp.float32)
    parts, norms = [], []
    for start, stop in itertools.pairwise(edges):
        part = _band(vectors, projected, start, stop, transposed)
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


def traced_bands(matrix: jax.Array, num_bands: int, name: str) -> dict[str, jax.Array]:
    """``layer_bands`` as part of a traced program."""
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
    return {"bands": bands, "cuts": cuts, "norms": jnp.stack([*norms, jnp.linalg.norm(rest)])}


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


def _centre(energy: jax.Array) -> jax.Array:
    index = jnp.arange(energy.shape[1], dtype=jnp.float32)
    total = jnp.maximum(energy.sum(axis=1), jnp.finfo(jnp.float32).tiny)
    return jnp.matmul(energy, index, precision=_HIGHEST) / total


@jax.jit
def _factors(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = matrix.shape[0] <= matrix.shape[1]
    weight = matrix.astype(jnp.float32)
    return _decompose(weight if wide else weight.T)


def _band(
    vectors: jax.Array, projected: jax.Array, start: int, stop: int, transposed: bool
) -> jax.Array:
    """``U_m (W^T U_m)^T`` of the indices from ``start`` to before ``stop``.

    Taken as wide as a multiple of q/16, so that cuts that differ from kernel to kernel don't each
    compile a program: on a GPU that took longer than the decompositions.
    """
    size = vectors.shape[1]
    step = max(1, -(-size // _BAND_WIDTHS))
    width = min(size, -(-(stop - start) // step) * step)
    first = min(start, size - width)
    return _band_product(vectors, projected, first, start, stop, width=width, transposed=transposed)


@functools.partial(jax.jit, static_argnames=("width", "transposed"))
def _band_product(vectors, projected, first, start, stop, *, width: int, transposed: bool):
    index = first + jnp.arange(width)
    inside = ((index >= start) & (index < stop))[None, :]
    left = jnp.where(inside, jax.lax.dynamic_slice_in_dim(vectors, first, width, axis=1), 0)
    right = jax.lax.dynamic_slice_in_dim(projected, first, width, axis=1)
    part = jnp.matmul(left, right.T, precision=_HIGHEST)
    return part.T if transposed else part
