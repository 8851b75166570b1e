"""Where an adapter's tensors lie, each as its kernel does, and the operands of its product.

Rows of A and the inputs' block ids follow the kernel's input axis, rows of B and the outputs' its
output axis, bands both; ranks are whole. Forming the update then needs no communication
(docs/method.md, "Permutation-free form").
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from smoa_jax.adapter.types import TRAINABLE_FIELDS, Bands, Modulation, tensor_fields
from smoa_jax.checks import require

_I, _O = "inputs", "outputs"
#: Axes of each field of a modulation, after the kernel's layer axis.
_FIELD_AXES: dict[str, tuple[str | None, ...]] = {
    "a": (_I, None),
    "b": (_O, None),
    "in_block": (_I,),
    "out_block": (_O,),
    "bands": (None, _I, _O),
    "cuts": (None,),
    "norms": (None,),
    "ranks": (None,),
    "scale": (),
}


def modulation_specs(modulation: Modulation, layers: Any, inputs: Any, outputs: Any) -> Any:
    """The ``PartitionSpec`` of each tensor, from the mesh axes of its kernel's axes.

    A node of one layer has no axis for ``layers``.
    """
    named = {_I: inputs, _O: outputs, None: None}
    specs = {}
    for name, leaf in tensor_fields(modulation).items():
        axes = _FIELD_AXES[name]
        if name in TRAINABLE_FIELDS and isinstance(modulation, Bands):
            axes = (None, *axes)
        leading = (layers,) if len(leaf.shape) > len(axes) else ()
        specs[name] = PartitionSpec(*leading, *(named[axis] for axis in axes))
    return dataclasses.replace(modulation, **specs)


def modulation_shardings(modulation: Modulation, kernel: NamedSharding) -> Modulation:
    """Shardings of an adapter's tensors from that of their ``(L?, I, O)`` kernel.

    Raises:
        ValueError: for a kernel with a view, whose axes don't tell where inputs and outputs lie.
    """
    require(
        not modulation.view,
        f"an adapter whose kernel has the view {modulation.view!r}",
        "a kernel (I, O) or (L, I, O), whose sharding its adapter's can follow",
        "give the sharding of each tensor yourself",
    )
    axes = (None, *kernel.spec) if len(kernel.spec) == 2 else kernel.spec
    return jax.tree.map(
        lambda spec: NamedSharding(kernel.mesh, spec), modulation_specs(modulation, *axes)
    )


def full_spec(sharding: NamedSharding, ndim: int) -> PartitionSpec:
    """The spec with an entry for every axis; JAX lets its end be left out."""
    return PartitionSpec(*sharding.spec, *(None,) * (ndim - len(sharding.spec)))


def placed_like(kernel: Any, modulation: Modulation) -> Modulation:
    """A modulation on the mesh of its kernel; as it is if the kernel is on none, or has a view."""
    concrete = isinstance(kernel, jax.Array) and not isinstance(kernel, Tracer)
    sharding = kernel.sharding if concrete else None
    if not isinstance(sharding, NamedSharding) or modulation.view:
        return modulation
    of_kernel = NamedSharding(sharding.mesh, full_spec(sharding, kernel.ndim))
    return jax.device_put(modulation, modulation_shardings(modulation, of_kernel))


# ----------------------------------------------------------------------------------- a product


@dataclasses.dataclass(frozen=True)
class MatmulSharding:
    """Where the operands of a product lie on a mesh, so that it moves no more than a plain one.

    Each device then forms the residual by itself, from its columns (or rows) of W, gathered once,
    and from factors; the backward sums only factors across devices. Without it the compiler gathers
    W and the residual both, and sums a dense weight gradient.

    Args:
        mesh: The device mesh.
        batch: Mesh axes over which x's leading axis is divided.
        inputs: Mesh axes over which x's last axis, and the kernel's inputs in the product, are.
        outputs: Mesh axes over which the product's last axis, and the kernel's outputs, are.
    """

    mesh: jax.sharding.Mesh
    batch: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """Where a language model's head lies on a mesh, so that the loss is taken without gathering it.

    Args:
        mesh: The device mesh.
        batch: Mesh axes over which rows of hidden states are divided.
        inputs: Mesh axes over which the head's inputs, the model dim, are.
        outputs: Mesh axes over which its outputs, the vocabulary, are.
    """

    mesh: jax.sharding.Mesh
    batch: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ProductShardings:
    """Where the operands of a model's products lie, by the name of the module; hashable.

    Args:
        by_name: Name and sharding of each; the compiler chooses for those that aren't here.
    """

    by_name: tuple[tuple[str, MatmulSharding], ...] = ()

    def of(self, name: str | None) -> MatmulSharding | None:
        """That of a module; None leaves it to the compiler."""
        return next((sharding for known, sharding in self.by_name if known == name), None)


class ProductSpecs(NamedTuple):
    """How the operands of a product are divided over a mesh."""

    x: PartitionSpec
    kernel: PartitionSpec
    y: PartitionSpec
    modulation: Any


def num_parts(mesh: Any, axes: tuple[str, ...]) -> int:
    """Into how many parts these axes of a mesh divide a dimension."""
    return math.prod(mesh.shape[axis] for axis in axes)


def sum_over(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Within ``shard_map``: the sum over devices that differ in these axes, if there are any."""
    return jax.lax.psum(value, axes) if axes else value


def product_specs(sharding: MatmulSharding, ndim: int, modulation: Modulation) -> ProductSpecs:
    """The specs of a product of an ``x`` of so many axes, rows first."""
    batch, inputs, outputs = (
        axes or None for axes in (sharding.batch, sharding.inputs, sharding.outputs)
    )
    middle = (None,) * (ndim - 2)
    return ProductSpecs(
        x=PartitionSpec(batch, *middle, inputs),
        kernel=PartitionSpec(inputs, outputs),
        y=PartitionSpec(batch, *middle, outputs),
        modulation=modulation_specs(modulation, None, inputs, outputs),
    )
