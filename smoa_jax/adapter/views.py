"""Kernels of any shape, seen as stacks of (inputs, outputs) matrices.

Plain ``(I, O)`` and stacked ``(L, I, O)`` kernels need no view. For others a view names the axes
and divides them in three groups, layers | inputs | outputs:

- ``"L | D | N H"``: a stacked attention kernel ``(L, D, N, H)`` whose outputs are heads x head dim;
- ``"| N H | D"``: one output projection ``(N, H, D)``, no layer axis;
- ``"N D H -> | D | N H"``: axes stored in another order than they are grouped.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from smoa_jax.checks import require


@dataclasses.dataclass(frozen=True)
class View:
    """A parsed view: ``order`` transposes stored axes to layers, inputs, outputs."""

    order: tuple[int, ...]
    num_layer_axes: int
    num_input_axes: int

    def split(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The sizes of the layer, input and output axes of a kernel of ``shape``."""
        sizes = tuple(shape[axis] for axis in self.order)
        first, second = self.num_layer_axes, self.num_layer_axes + self.num_input_axes
        return sizes[:first], sizes[first:second], sizes[second:]

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(L, I, O)``, or ``(I, O)`` without layer axes."""
        layers, inputs, outputs = self.split(shape)
        leading = (math.prod(layers),) if layers else ()
        return (*leading, math.prod(inputs), math.prod(outputs))

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """The kernel as ``(L?, I, O)``; a no-op where it already is."""
        if self.order == tuple(range(kernel.ndim)) and kernel.shape == self.matrix_shape(
            kernel.shape
        ):
            return kernel
        return jnp.transpose(kernel, self.order).reshape(self.matrix_shape(kernel.shape))

    def from_matrix(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of ``to_matrix`` for a kernel of ``shape``."""
        if matrix.shape == shape and self.order == tuple(range(len(shape))):
            return matrix
        ordered = matrix.reshape(tuple(shape[axis] for axis in self.order))
        inverse = sorted(range(len(shape)), key=self.order.__getitem__)
        return jnp.transpose(ordered, inverse)

    def of_one_layer(self) -> View:
        """The view of one layer's kernel, the layer axes being gone."""
        kept = self.order[self.num_layer_axes :]
        rank = {axis: position for position, axis in enumerate(sorted(kept))}
        return View(tuple(rank[axis] for axis in kept), 0, self.num_input_axes)


@functools.cache
def parse_view(text: str) -> View:
    """Parse a view, such as ``"L | D | N H"``.

    Raises:
        ValueError: if it does not have three groups of distinct axis names.
    """
    stored, arrow, grouped = text.partition("->")
    groups = [group.split() for group in (grouped if arrow else stored).split("|")]
    names = [name for group in groups for name in group]
    order = stored.split() if arrow else names
    require(
        len(groups) == 3
        and bool(groups[1] and groups[2])
        and len(set(names)) == len(names)
        and sorted(order) == sorted(names),
        f"kernel view {text!r}",
        "distinct axis names in three groups, layers | inputs | outputs (layers may be empty), "
        "such as 'L | D | N H', or with the stored order first, 'N D H -> | D | N H'",
    )
    return View(tuple(order.index(name) for name in names), len(groups[0]), len(groups[1]))


def view_of(text: str, ndim: int, path: str) -> View:
    """The view of a kernel with ``ndim`` axes, whose configured view is ``text`` or "".

    Raises:
        ValueError: if the kernel needs a view and has none, or one for another number of axes.
    """
    if not text:
        require(
            ndim in (2, 3),
            f"a kernel with {ndim} axes at {path}",
            "(I, O) or (L, I, O), or a kernel view",
            "add its path to kernel_views, such as 'L | D | N H'",
        )
        return View(tuple(range(ndim)), ndim - 2, 1)
    view = parse_view(text)
    require(
        len(view.order) == ndim,
        f"kernel view {text!r} for {path}, whose kernel has {ndim} axes",
        f"a view of {ndim} axes",
    )
    return view
