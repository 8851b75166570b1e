"""Spectral order where kernels share coordinates: one score for all kernels of an axis.

A decoder computes the same after a relabelling of the coordinates of its residual stream, of each
layer's feed-forward, and of each layer's groups of heads. If the block ids of all kernels on such
an axis agree, the model can be relabelled so that every block is a slice (``relabelling.py``).

The score of a coordinate i of a shared axis, over the kernels k (and, unless each layer has
coordinates of its own, the layers) whose input or output it is:

    score(i) = sum_k w_k(i) r_k(i) / sum_k w_k(i)

with ``r_k(i)`` in [0, 1] its rank among k's coordinates by centre of mass in k's spectrum [S2, step
2], and ``w_k(i)`` its share of k's energy, ``|W_k[i, :]|^2 / |W_k|^2``. A group of heads has the
score of its coordinates together (both sums run over them too), so it stays whole and in order.
The order is then cut as [S2] cuts, in even pieces: where the groups don't divide, a cut runs
through one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from smoa_jax.adapter.planning.stack import BlockScores, Spectra
from smoa_jax.adapter.targets import Target, lookup
from smoa_jax.adapter.types import Params


@dataclasses.dataclass(frozen=True)
class SharedAxis:
    """Coordinates that can be relabelled together wherever they occur.

    Args:
        name: Tensors that have the same coordinates have the same name.
        per_layer: Whether each layer has coordinates of its own.
        groups: In how many equal groups they move, each in its own order (heads); 0: one by one.
    """

    name: str
    per_layer: bool = False
    groups: int = 0


#: Path of a tensor -> of each of its axes after the layers', which coordinates it has; None for an
#: axis whose coordinates stay. Tensors that aren't here share nothing.
AxisTable: TypeAlias = Mapping[tuple[str, ...], tuple[SharedAxis | None, ...]]


def align(spectra: Spectra, params: Params, targets: Sequence[Target], table: AxisTable) -> Spectra:
    """The same spectra with one score for each coordinate of an axis, however many share it.

    Args:
        spectra: ``BlockScores`` of each target.
        params: Of the base.
        targets: Whose kernels share coordinates; layers that aren't selected don't count.
        table: What they share; a kernel that isn't in it keeps its scores.
    """
    sums: dict[SharedAxis, Any] = {}
    for target in targets:
        kernel = lookup(params, target.kernel_path)
        for axis, side in _sides(target, table):
            scores = getattr(spectra[target.name], side)
            weights = _energies(kernel)[side] * _selected(target)
            terms = _grouped(axis, jnp.stack([weights * _ranks(scores), weights]))
            if not axis.per_layer and target.leading:
                terms = terms.sum(axis=1)
            sums[axis] = sums[axis] + terms if axis in sums else terms
    found = dict(spectra)
    for target in targets:
        for axis, side in _sides(target, table):
            weighted, weights = sums[axis]
            shared = weighted / jnp.maximum(weights, jnp.finfo(jnp.float32).tiny)
            own = getattr(found[target.name], side)
            spread = jnp.repeat(shared, own.shape[-1] // shared.shape[-1], axis=-1)
            changed = {side: jnp.broadcast_to(spread, own.shape)}
            found[target.name] = dataclasses.replace(found[target.name], **changed)
    return found


def _sides(target: Target, table: AxisTable) -> list[tuple[SharedAxis, str]]:
    """The shared axes of a kernel, each with the field of ``BlockScores`` that it has."""
    axes = table.get(target.kernel_path, (None, None))
    sides = zip(axes, (field.name for field in dataclasses.fields(BlockScores)), strict=True)
    return [(axis, side) for axis, side in sides if axis is not None and not target.view_text]


def _grouped(axis: SharedAxis, terms: Float[Array, "2 *L N"]) -> Float[Array, "2 *L G"]:
    if not axis.groups:
        return terms
    return terms.reshape(*terms.shape[:-1], axis.groups, -1).sum(axis=-1)


def _ranks(scores: Float[Array, "*L N"]) -> Float[Array, "*L N"]:
    """Place of each in the order of scores, from 0 to 1."""
    order = jnp.argsort(jnp.asarray(scores), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) / max(1, order.shape[-1] - 1)


def _selected(target: Target) -> Float[Array, "*L 1"]:
    selected = jnp.asarray(target.selected, jnp.float32)
    return selected[:, None] if target.leading else selected


def _energies(kernel: Any) -> dict[str, Float[Array, "*L N"]]:
    """Each coordinate's share of a layer's squared Frobenius norm; whole on every device."""

    def shares(kernel: jax.Array) -> dict[str, jax.Array]:
        squares = jnp.square(kernel.astype(jnp.float32))
        rows, columns = squares.sum(axis=-1), squares.sum(axis=-2)
        total = jnp.maximum(rows.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return {"inputs": rows / total, "outputs": columns / total}

    sharding = getattr(kernel, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jax.jit(shares)(kernel)
    return jax.jit(shares, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(kernel)
