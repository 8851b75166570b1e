"""A model whose coordinates have other labels, in which block ids ascend.

Base and adapter are relabelled together, in memory alone: what they compute stays the same, each
block becomes a slice (``diagonal.py``), and files keep the original order. The new order follows
from the ids themselves, so a restored adapter is relabelled as a fresh one is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from smoa_jax.adapter.diagonal import in_pieces
from smoa_jax.adapter.planning.aligned import AxisTable, SharedAxis
from smoa_jax.adapter.planning.exchange import gather_region
from smoa_jax.adapter.targets import KERNEL_KEY, lookup, replaced, walk
from smoa_jax.adapter.types import TRAINABLE_FIELDS, Blocks, Modulation, Params, is_modulation

#: New orders of the axes of a tensor, by axis after the layers', each (n,) or (L, n).
_Orders: TypeAlias = dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Relabelling:
    """In which order the coordinates of shared axes come to be.

    Args:
        table: Which axes of which tensors they are.
        orders: Old labels in their new order, of an axis or of its groups: ``(n,)``, or ``(L, n)``
            where each layer has coordinates of its own.
        sliced: Paths of the modulations whose ids then ascend.
    """

    table: AxisTable
    orders: Mapping[SharedAxis, np.ndarray]
    sliced: frozenset[tuple[str, ...]] = frozenset()

    def apply(self, params: Params, *, base: bool = True, donate: bool = False) -> Params:
        """An adapted tree under the new labels.

        Args:
            params: As ``apply_smoa`` or ``restore_adapter`` gave it.
            base: Whether to move the base's tensors too, or modulations alone.
            donate: Give up each array of the base as it is moved, so that no second base is ever
                held; the arrays of ``params`` can't be used any more.
        """
        for path, leaf in walk(params):
            if is_modulation(leaf):
                params = replaced(params, path, self._of_node(path, leaf))
            elif base and (orders := self._orders(path, leaf.shape)):
                stacked = leaf.ndim > len(self.table[path])
                params = replaced(params, path, _moved(leaf, orders, stacked, donate))
        return params

    def inverse(self) -> Relabelling:
        """The one that leads back to the original order, in which no block is a slice."""
        back = {axis: np.argsort(order, axis=-1) for axis, order in self.orders.items()}
        return Relabelling(self.table, back)

    def row_orders(self, trainable: Params) -> Params:
        """For each trained factor ``(L?, N, R_m)`` the old rows in their new order, ``(L?, N)``."""

        def visit(path: Any, node: Any) -> Any:
            if not is_modulation(node):
                return node
            orders = self._node_orders(tuple(key.key for key in path), node)
            rows = {}
            for axis, name in enumerate(TRAINABLE_FIELDS):
                shape = getattr(node, name).shape[:-1]
                order = orders[axis] if axis in orders else np.arange(shape[-1])
                rows[name] = np.broadcast_to(order, shape).astype(np.int32)
            return dataclasses.replace(node, **rows)

        return jax.tree_util.tree_map_with_path(visit, trainable, is_leaf=is_modulation)

    def _of_node(self, path: tuple[str, ...], node: Modulation) -> Modulation:
        if not isinstance(node, Blocks):
            return node
        orders, stacked = self._node_orders(path, node), node.scale.ndim > 0
        moved = {
            name: _moved(getattr(node, name), {0: orders[axis]}, stacked)
            for axis, names in enumerate((("a", "in_block"), ("b", "out_block")))
            for name in names
            if axis in orders
        }
        return dataclasses.replace(node, **moved, contiguous=path in self.sliced)

    def _node_orders(self, path: tuple[str, ...], node: Modulation) -> _Orders:
        return self._orders((*path[:-1], KERNEL_KEY), (node.a.shape[-2], node.b.shape[-2]))

    def _orders(self, path: tuple[str, ...], shape: tuple[int, ...]) -> _Orders:
        """The new orders of the axes of a tensor that have one."""
        axes = self.table.get(path, ())
        sizes = shape[len(shape) - len(axes) :]
        return {
            place: _of_coordinates(self.orders[axis], size)
            for place, (axis, size) in enumerate(zip(axes, sizes, strict=True))
            if axis is not None and axis in self.orders
        }


def relabelling_of(params: Params, table: AxisTable) -> Relabelling | None:
    """The relabelling under which the blocks of an adapted tree are slices; None if none are.

    All processes must call it.

    Args:
        params: With modulations beside kernels.
        table: Which axes share coordinates. Kernels that aren't in it, and those whose ids don't
            agree with the others', keep their products.
    """
    blocks: dict[tuple[str, ...], tuple[np.ndarray, ...]] = {}
    places: dict[SharedAxis, Any] = {}
    for path, node in walk(params):
        axes = table.get((*path[:-1], KERNEL_KEY), ())
        if not isinstance(node, Blocks) or node.view or not axes:
            continue
        blocks[path] = tuple(_on_host(ids) for ids in (node.in_block, node.out_block))
        for axis, ids in zip(axes, blocks[path], strict=True):
            if axis is not None:
                places[axis] = places.get(axis, 0) + _means(axis, ids)
    orders = {axis: np.argsort(means, axis=-1, kind="stable") for axis, means in places.items()}
    found = Relabelling(table, orders)
    sliced = set()
    for path, (in_block, out_block) in blocks.items():
        node = lookup(params, path)
        orders = found._node_orders(path, node)
        moved = [_reordered(ids, orders.get(n)) for n, ids in enumerate((in_block, out_block))]
        if in_pieces(moved[0], moved[1], node.ranks.shape[-1]):
            sliced.add(path)
    return dataclasses.replace(found, sliced=frozenset(sliced)) if sliced else None


def _on_host(ids: Any) -> np.ndarray:
    return gather_region(ids, [(0, size) for size in ids.shape])


def _means(axis: SharedAxis, ids: np.ndarray) -> np.ndarray:
    """Mean block id of each coordinate or group; over the layers too where they share it."""
    if axis.groups:
        ids = ids.reshape(*ids.shape[:-1], axis.groups, -1).mean(axis=-1, dtype=np.float64)
    return ids if axis.per_layer or ids.ndim == 1 else ids.mean(axis=0, dtype=np.float64)


def _of_coordinates(order: np.ndarray, size: int) -> np.ndarray:
    """The order of coordinates that an order of their groups means."""
    each = size // order.shape[-1]
    places = order[..., None] * each + np.arange(each)
    return places.reshape(*order.shape[:-1], size)


def _reordered(ids: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    if order is None:
        return ids
    return np.take_along_axis(ids, np.broadcast_to(order, ids.shape), axis=-1)


def _moved(leaf: jax.Array, orders: _Orders, stacked: bool, donate: bool = False) -> jax.Array:
    """A tensor with axes in other orders, where it lies."""
    sharding = getattr(leaf, "sharding", None)
    where = sharding if isinstance(sharding, NamedSharding) else None
    return _mover(stacked, where, donate)(leaf, orders)


@functools.cache
def _mover(
    stacked: bool, where: NamedSharding | None, donate: bool
) -> Callable[[jax.Array, _Orders], jax.Array]:
    """(tensor, orders) -> the tensor in those orders, of a stack a layer at a time."""

    def one(layer: jax.Array, orders: dict[int, jax.Array]) -> jax.Array:
        for axis, order in orders.items():
            layer = jnp.take(layer, order, axis=axis)
        return layer

    def every(leaf: jax.Array, orders: dict[int, jax.Array]) -> jax.Array:
        if not stacked:
            return one(leaf, orders)
        whole = {n: jnp.broadcast_to(o, (len(leaf), o.shape[-1])) for n, o in orders.items()}
        return jax.lax.map(lambda layer: one(*layer), (leaf, whole))

    return jax.jit(every, out_shardings=where, donate_argnums=0 if donate else ())
