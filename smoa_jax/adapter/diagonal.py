"""Diagonal blocks that are slices: where a kernel's block ids ascend, each block is a HiRA.

    y[:, O_m] += x[:, I_m] (s W[I_m, O_m] * (A_m B_m^T))          for m = 1 .. M

Rows ``I_m`` and columns ``O_m`` are consecutive, so a product over the blocks alone takes 1/M of a
dense one, without a gather. On a mesh that divides inputs or outputs each device has some whole
blocks, or part of one, along that axis: there its slices are known when the program is built, and
along the other they begin where the device's place says.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smoa_jax.adapter.config import split_evenly
from smoa_jax.adapter.types import Blocks, LowRank, Modulation

#: Where a slice begins: known, or the device's own.
_Start: TypeAlias = int | jax.Array


class Span(NamedTuple):
    """Consecutive coordinates."""

    start: _Start
    size: int

    def of(self, array: jax.Array, axis: int) -> jax.Array:
        """This part of an array's axis."""
        if self.size == array.shape[axis]:
            return array
        if isinstance(self.start, int):
            return jax.lax.slice_in_dim(array, self.start, self.start + self.size, axis=axis)
        return jax.lax.dynamic_slice_in_dim(array, self.start, self.size, axis=axis)


#: Rows and columns of a diagonal block.
Block: TypeAlias = tuple[Span, Span]


@dataclasses.dataclass(frozen=True)
class Division:
    """In how many parts a mesh divides the two axes of a kernel, and which part a device has."""

    inputs: int = 1
    outputs: int = 1
    index: _Start = 0


def pieces(size: int, num_blocks: int) -> np.ndarray:
    """Block ids ``(size,)`` that ascend, in even pieces [S2, step 3]."""
    sizes = split_evenly(size, num_blocks)
    return np.repeat(np.arange(len(sizes)), sizes).astype(np.float32)


def in_pieces(in_block: np.ndarray, out_block: np.ndarray, num_blocks: int) -> bool:
    """Whether block ids ``(L?, I)`` and ``(L?, O)`` ascend in even pieces, in all layers."""
    return all(
        bool(np.all(ids == pieces(ids.shape[-1], num_blocks))) for ids in (in_block, out_block)
    )


def marked_contiguous(tree: Any, contiguous: bool) -> Any:
    """A tree of whatever values whose blocks are said to be slices, or not to be.

    Ids that ascend in a whole kernel don't in a part of it, so whoever cuts a node says no.
    """

    def visit(node: Any) -> Any:
        if isinstance(node, Blocks):
            return dataclasses.replace(node, contiguous=contiguous)
        return node

    return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, Blocks))


def diagonal_blocks(node: Modulation, division: Division) -> tuple[Block, ...] | None:
    """The blocks of a device's part of a kernel; None where they aren't slices.

    Args:
        node: Of one layer, with a device's rows of ``a`` and ``b``.
        division: Of the kernel over the mesh.
    """
    if not isinstance(node, Blocks) or not node.contiguous:
        return None
    num_blocks, inputs, outputs = node.ranks.shape[-1], node.a.shape[-2], node.b.shape[-2]
    parts = division.inputs * division.outputs
    if parts == 1:
        pairs = zip(_even(inputs, num_blocks), _even(outputs, num_blocks), strict=True)
        return tuple(pairs)
    rows_divided = division.inputs > 1
    divided, whole = (inputs, outputs) if rows_divided else (outputs, inputs)
    if not _sliceable(division, num_blocks, divided * parts, whole):
        _warn_of_dense(division, num_blocks, node)
        return None
    count = max(1, num_blocks // parts)  # whole blocks of a device, or the one it has a part of
    first = division.index * num_blocks // parts
    own = [Span(k * divided // count, divided // count) for k in range(count)]
    size = whole // num_blocks
    across = [Span((first + k) * size, size) for k in range(count)]
    if rows_divided:
        return tuple(zip(own, across, strict=True))
    return tuple(zip(across, own, strict=True))


def block_of(node: Modulation, rows: Span, columns: Span) -> LowRank:
    """The modulation of one block alone: a HiRA."""
    return LowRank(
        a=rows.of(node.a, 0),
        b=columns.of(node.b, 0),
        scale=node.scale,
        ranks=node.ranks,
        weight_modulated=node.weight_modulated,
    )


def assembled(parts: Sequence[jax.Array], spans: Sequence[Span], size: int, axis: int) -> jax.Array:
    """Parts of an axis of that size, each at its place; zeros where there is none."""
    if all(isinstance(span.start, int) for span in spans):  # they fill the axis
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
    shape = list(parts[0].shape)
    shape[axis] = size
    total = jnp.zeros(shape, parts[0].dtype)
    for part, span in zip(parts, spans, strict=True):
        total = jax.lax.dynamic_update_slice_in_dim(total, part, span.start, axis=axis)
    return total


def with_blocks(
    kernel: Float[Array, "I O"], blocks: Sequence[Block], values: Sequence[jax.Array]
) -> Float[Array, "I O"]:
    """The kernel with other values in its blocks."""
    if len(blocks) == 1 and values[0].shape == kernel.shape:
        return values[0]
    for (rows, columns), value in zip(blocks, values, strict=True):
        kernel = jax.lax.dynamic_update_slice(kernel, value, (rows.start, columns.start))
    return kernel


def _even(size: int, num_blocks: int) -> list[Span]:
    sizes = split_evenly(size, num_blocks)
    return [Span(stop - n, n) for stop, n in zip(itertools.accumulate(sizes), sizes, strict=True)]


def _sliceable(division: Division, num_blocks: int, divided: int, whole: int) -> bool:
    """Whether each device has whole blocks, or a part of one, along the axis that is divided."""
    if division.inputs > 1 and division.outputs > 1:
        return False
    parts = division.inputs * division.outputs
    even = divided % num_blocks == 0 and whole % num_blocks == 0
    return even and (num_blocks % parts == 0 or parts % num_blocks == 0)


def _warn_of_dense(division: Division, num_blocks: int, node: Blocks) -> None:
    warnings.warn(
        f"{num_blocks} contiguous blocks of a kernel ({node.a.shape[-2] * division.inputs}, "
        f"{node.b.shape[-2] * division.outputs}) on a mesh that divides its inputs by "
        f"{division.inputs} and its outputs by {division.outputs} aren't slices on each device; "
        "their products are dense, as of blocks in any order. To have slices, let the mesh's "
        "tensor axis and num_subspaces divide one another",
        stacklevel=2,
    )
