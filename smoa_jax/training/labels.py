"""A run under other labels: aligned blocks train as slices and are stored in the original order.

Relabelling moves base and adapter once, before the first step; rows of factors and of their moments
are moved back whenever something is written. Both are exact, so a run that is resumed goes on bit
for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.relabelling import Relabelling, relabelling_of
from smoa_jax.adapter.tree import partition
from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint.native.leaves import Leaves, adapter_leaves
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.symmetry import shared_axes
from smoa_jax.training.step import State, initial_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """Under which labels a run's state is, beside those of its files.

    Attributes:
        relabelling: From the files' to the run's; None where they are the same.
        optimizer: Whose state has moments of the factors.
        adapter_leaves: The frozen leaves of the adapter, in the order of files.
    """

    relabelling: Relabelling | None
    optimizer: optax.GradientTransformation
    adapter_leaves: Leaves

    def stored(self, state: State) -> State:
        """A state in the order of files."""
        if self.relabelling is None:
            return state
        where = jax.tree.map(lambda leaf: leaf.sharding, state)
        return self._moved(state, self.relabelling.inverse(), where)

    def restored(self, state: State, trainable: Params, shardings: dict[str, Any]) -> State:
        """A state from a file in the order of the run.

        Args:
            state: As it was stored.
            trainable: The trained half of the run's own tree.
            shardings: Of its state.
        """
        if self.relabelling is None:
            return state
        moved = self._moved(state, self.relabelling, shardings)
        own = jax.eval_shape(lambda tree: initial_state(tree, self.optimizer), trainable)
        return jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(moved))

    def stored_adapter(self, params: Params) -> Params:
        """An adapted tree with its adapter in the order of files; the base stays as it is."""
        if self.relabelling is None:
            return params
        return self.relabelling.inverse().apply(params, base=False)

    def _moved(self, state: State, relabelling: Relabelling, shardings: Any) -> State:
        """A state with the rows of factors and of their moments in another order."""
        orders = relabelling.row_orders(state["trainable"])
        where = tuple(jax.tree.leaves(shardings))
        return _mover(self.optimizer, jax.tree.structure(state), where)(state, orders)


def relabelled(
    params: Params,
    adapter: SmoaConfig,
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[Params, Labels]:
    """An adapted tree as a run trains it, and its labels: aligned blocks are slices then.

    The arrays of a base that is relabelled are given up one by one for those in the new order.
    """
    found = None
    if adapter.partition == "aligned_blocks":
        found = relabelling_of(params, shared_axes(config))
    stored = adapter_leaves(partition(params)[1])
    labels = Labels(relabelling=found, optimizer=optimizer, adapter_leaves=stored)
    return params if found is None else found.apply(params, donate=True), labels


@functools.cache
def _mover(
    optimizer: optax.GradientTransformation, structure: Any, shardings: tuple[Any, ...]
) -> Callable[[State, Params], State]:
    """(state, orders) -> the state with its rows in those orders; compiled once for all saves."""

    def move(state: State, orders: Params) -> State:
        moments = optax.tree_utils.tree_map_params(optimizer, _rows, state["opt_state"], orders)
        factors = jax.tree.map(_rows, state["trainable"], orders)
        return {**state, "trainable": factors, "opt_state": moments}

    return jax.jit(move, out_shardings=jax.tree.unflatten(structure, shardings))


def _rows(leaf: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(leaf, order[..., None], axis=-2)
