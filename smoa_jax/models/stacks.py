"""How a decoder's layers are stacked: which have one shape, and in which order they run.

Layers whose kernels have the same shapes lie in one *stack*, arrays with a leading axis L'. Nearly
every family has a single one::

    layers/self_attn/q_proj/kernel                 [L, D, N*H]

A Gemma 4 has up to four, since its global layers have larger heads than its local ones, and the
last layers of its small models read keys and values of earlier ones (and have none)::

    layers/local/self_attn/q_proj/kernel           [L', D, N*256]
    layers/global/self_attn/q_proj/kernel          [L', D, N*512]
    layers/local_shared/self_attn/q_proj/kernel    [L', D, N*256]      no k_proj, v_proj, k_norm
    layers/global_shared/self_attn/q_proj/kernel   [L', D, N*512]      likewise

An entry's place in its stack says nothing of its place in the model: ``Stack.layers`` does.

The model runs *sections* of whole periods, E2B's 35 layers as these two::

    3 x (4 local, 1 global)   then, with the last keys and values of each kind closed over,
    4 x (4 local_shared, 1 global_shared)

so that a scan over periods, and within one over each run of equal layers, compiles every shape
once, however deep the model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from smoa_jax.models.config import DecoderConfig

LAYERS_KEY = "layers"
_KINDS = ("global", "local")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What the layers of a stack have in common.

    Args:
        head_dim: H.
        num_kv_heads: K.
        mlp_dim: F.
        keys_as_values: Whether there is no projection of values.
        shares_kv: Whether there are no keys and values at all: those of an earlier layer are read.
    """

    head_dim: int
    num_kv_heads: int
    mlp_dim: int
    keys_as_values: bool
    shares_kv: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers of one shape.

    Args:
        path: Of its arrays in the params tree.
        layers: Indices of its entries among the model's layers, ascending.
        shape: Of each.
        local: Whether they are local layers; None where this differs within the stack.
    """

    path: tuple[str, ...]
    layers: tuple[int, ...]
    shape: LayerShape
    local: bool | None

    @property
    def name(self) -> str:
        """The last key of its path."""
        return self.path[-1]

    @property
    def kind(self) -> str:
        """Layers that share keys and values do so with those of their kind."""
        return _KINDS[bool(self.local)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Equal layers that follow each other.

    Args:
        stack: Theirs.
        first: Index in the stack of the first one, in the first period.
        length: How many.
    """

    stack: Stack
    first: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Periods of runs; layers ``first`` to ``first + num_periods * len(period)`` of the model."""

    runs: tuple[Run, ...]
    num_periods: int
    first: int

    @property
    def period(self) -> int:
        """Layers in a period."""
        return sum(run.length for run in self.runs)

    @property
    def stacks(self) -> dict[str, Stack]:
        """Those that run here, by name; each runs in one section alone."""
        return {run.stack.name: run.stack for run in self.runs}


@functools.cache
def layer_stacks(config: DecoderConfig) -> tuple[Stack, ...]:
    """The stacks of a decoder, in the order in which they first run."""
    kinds = [_kind(config, layer) for layer in range(config.num_layers)]
    shapes = {kind: _shape(config, *kind) for kind in dict.fromkeys(kinds)}
    if len(set(shapes.values())) == 1:
        local = None if len(shapes) > 1 else kinds[0][0]
        every = tuple(range(config.num_layers))
        return (Stack(path=(LAYERS_KEY,), layers=every, shape=shapes[kinds[0]], local=local),)
    return tuple(
        Stack(
            path=(LAYERS_KEY, _KINDS[kind[0]] + "_shared" * kind[1]),
            layers=tuple(layer for layer, other in enumerate(kinds) if other == kind),
            shape=shape,
            local=kind[0],
        )
        for kind, shape in shapes.items()
    )


@functools.cache
def layer_sections(config: DecoderConfig) -> tuple[Section, ...]:
    """How the stacks run: the layers with keys and values of their own, then those without."""
    names = {layer: stack for stack in layer_stacks(config) for layer in stack.layers}
    order = [names[layer] for layer in range(config.num_layers)]
    own = config.num_layers - config.num_kv_shared_layers
    return tuple(
        _section(tuple(order[first:stop]), first)
        for first, stop in ((0, own), (own, config.num_layers))
        if first < stop
    )


def _kind(config: DecoderConfig, layer: int) -> tuple[bool, bool]:
    """Whether a layer is local, and whether it reads keys and values of another."""
    local = bool(config.local_layers) and config.local_layers[layer]
    return local, layer >= config.num_layers - config.num_kv_shared_layers


def _shape(config: DecoderConfig, local: bool, shared: bool) -> LayerShape:
    head_dim, kv_heads = config.head_dim, config.num_kv_heads
    if not local:
        head_dim = config.global_head_dim or head_dim
        kv_heads = config.num_global_kv_heads or kv_heads
    return LayerShape(
        head_dim=head_dim,
        num_kv_heads=kv_heads,
        mlp_dim=(shared and config.shared_mlp_dim) or config.mlp_dim,
        keys_as_values=config.global_keys_as_values and not local,
        shares_kv=shared,
    )


def _section(order: tuple[Stack, ...], first: int) -> Section:
    """The shortest period that makes up ``order``, in runs of equal layers."""
    length = next(
        length
        for length in range(1, len(order) + 1)
        if len(order) % length == 0 and order == order[:length] * (len(order) // length)
    )
    runs, seen = [], dict.fromkeys((stack.name for stack in order), 0)
    for stack, equal in itertools.groupby(order[:length]):
        count = len(list(equal))
        runs.append(Run(stack=stack, first=seen[stack.name], length=count))
        seen[stack.name] += count
    return Section(runs=tuple(runs), num_periods=len(order) // length, first=first)
