"""The layers of a decoder whose layers differ in shape, run section by section (``stacks.py``).

A scan over a section's periods carries the residual stream, the caches and, in a model that shares
them, the last keys and values of each kind; the section that only reads those closes over them, so
that no period keeps a copy. Linen's scan knows one stack of equal layers, so these scans are JAX's
own, over a layer as a function of its parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from smoa_jax.adapter.targets import lookup
from smoa_jax.models.attention import AttentionContext, KeysValues, LayerCaches
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.params import init_params
from smoa_jax.models.stacks import Run, Section, Stack, layer_sections, layer_stacks


class LayerSections(nn.Module):
    """All layers, in the order of ``layer_sections``.

    Args:
        config: Of the decoder.
        make_layer: The layer's class, with all but its ``shape`` and ``returns_kv`` given.
        policy: What a layer keeps for its backward pass; None is everything.
    """

    config: DecoderConfig
    make_layer: Callable[..., nn.Module]
    policy: Callable[..., Any] | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        caches: dict[str, Any],
        context: AttentionContext,
        told: Float[Array, "L B T P"] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Return the residual stream after the last layer, and the caches with what was added.

        Caches are by stack, ``LayerCaches`` each.
        """
        params = {stack.name: self._params(stack) for stack in layer_stacks(self.config)}
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        state = _State(x=x, caches=caches, kv={})
        for section in layer_sections(self.config):
            state = _Pass(self, section, context, key).run(state, params, told)
        return state.x, state.caches

    def _params(self, stack: Stack) -> Any:
        if not self.is_initializing():
            return self.get_variable("params", stack.name)  # with the adapters that lie there
        return self.param(stack.name, lambda key: lookup(init_params(self.config, key), stack.path))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """What goes from layer to layer.

    Attributes:
        x: The residual stream.
        caches: By stack.
        kv: The last keys and values of local and of global layers, where layers share them.
    """

    x: jax.Array
    caches: dict[str, LayerCaches]
    kv: dict[str, KeysValues]


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One run of a section's layers."""

    model: LayerSections
    section: Section
    context: AttentionContext
    key: jax.Array | None

    def run(self, state: _State, params: dict[str, Any], told: jax.Array | None) -> _State:
        section = self.section
        count = section.num_periods
        stop = section.first + count * section.period
        inputs = {
            "params": {name: params[name] for name in section.stacks},
            "index": {
                name: jnp.arange(len(stack.layers), dtype=jnp.int32)
                for name, stack in section.stacks.items()
            },
            "layer": jnp.arange(section.first, stop, dtype=jnp.int32),
            "told": None if told is None else told[section.first : stop],
        }
        inputs = jax.tree.map(
            lambda leaf: leaf.reshape((count, leaf.shape[0] // count, *leaf.shape[1:])), inputs
        )
        given = state.kv
        state = dataclasses.replace(state, kv=self._room(state) if self._writes else {})

        def body(state: _State, period: Any) -> tuple[_State, None]:
            start = 0
            for run in section.runs:
                state = self._run(run, start, state, given, period)
                start += run.length
            return state, None

        if count == 1:
            state, _ = body(state, jax.tree.map(lambda leaf: leaf[0], inputs))
        else:
            state, _ = jax.lax.scan(body, state, inputs)
        return state

    @property
    def _writes(self) -> bool:
        """Whether these layers' keys and values are read by later ones."""
        shares = self.model.config.num_kv_shared_layers > 0
        return shares and not any(stack.shape.shares_kv for stack in self.section.stacks.values())

    def _room(self, state: _State) -> dict[str, KeysValues]:
        """Zeros in the place of the keys and values that the layers are going to write."""
        room = {}
        for name, stack in self.section.stacks.items():
            batch, slots = state.x.shape[:2]
            if name in state.caches:
                slots = state.caches[name][0].shape[2]
            shape = (batch, slots, stack.shape.num_kv_heads, stack.shape.head_dim)
            room[stack.kind] = (jnp.zeros(shape, state.x.dtype),) * 2
        return room

    def _run(
        self, run: Run, start: int, state: _State, given: dict[str, KeysValues], period: Any
    ) -> _State:
        """Equal layers: ``start`` is the first one's place in its period."""
        stack, name = run.stack, run.stack.name
        layer = self._layer(stack, given)
        of_stack = slice(run.first, run.first + run.length)
        of_period = slice(start, start + run.length)

        def body(carry: Any, inputs: Any) -> tuple[Any, None]:
            return layer(carry, inputs), None

        inputs = {
            "params": jax.tree.map(lambda leaf: leaf[of_stack], period["params"][name]),
            "index": period["index"][name][of_stack],
            "layer": period["layer"][of_period],
            "told": None if period["told"] is None else period["told"][of_period],
        }
        carry = (state.x, state.caches.get(name), state.kv.get(stack.kind))
        if run.length == 1:
            carry = layer(carry, jax.tree.map(lambda leaf: leaf[0], inputs))
        else:
            carry, _ = jax.lax.scan(body, carry, inputs)
        x, caches, kv = carry
        return _State(
            x=x,
            caches=state.caches if caches is None else {**state.caches, name: caches},
            kv=state.kv if kv is None else {**state.kv, stack.kind: kv},
        )

    def _layer(self, stack: Stack, given: dict[str, KeysValues]) -> Callable[[Any, Any], Any]:
        """One layer of a stack: from its carry and inputs to the carry."""
        module = self.model.make_layer(shape=stack.shape, returns_kv=self._writes)
        shared = given.get(stack.kind) if stack.shape.shares_kv else None

        def apply(x: Any, caches: Any, inputs: Any) -> Any:
            rngs = None
            if self.key is not None:
                rngs = {"dropout": jax.random.fold_in(self.key, inputs["layer"])}
            return module.apply(
                {"params": inputs["params"]},
                (x, caches),
                self.context,
                inputs["index"],
                stack.local,
                inputs["told"],
                shared,
                rngs=rngs,
            )

        if self.model.policy is not None:
            scanned = self.section.num_periods > 1
            apply = jax.checkpoint(apply, policy=self.model.policy, prevent_cse=not scanned)

        def step(carry: Any, inputs: Any) -> Any:
            x, caches, kv = carry
            (x, caches), written = apply(x, caches, inputs)
            return x, caches, kv if written is None else written

        return step
