"""Blocks that are slices: what any order gives, for 1 + 1/M of a dense product."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smoa_jax import SmoaConfig, apply_smoa, modulated_matmul
from smoa_jax.adapter.factors import used_of
from smoa_jax.adapter.placement import MatmulSharding


def layer(shape, num_subspaces, dtype=jnp.float32, **changes):
    """A kernel and its contiguous blocks, of uneven ranks and sizes, both factors drawn."""
    config = SmoaConfig(
        rank=2 * num_subspaces + 1,
        num_subspaces=num_subspaces,
        partition="contiguous_blocks",
        target_modules=["q_proj"],
        **changes,
    )
    kernel = 0.2 * jax.random.normal(jax.random.key(0), shape).astype(dtype)
    node = apply_smoa({"q_proj": {"kernel": kernel}}, config, jax.random.key(1))["q_proj"]["smoa"]
    b = 0.3 * jax.random.normal(jax.random.key(2), node.b.shape) * used_of(node, "b")
    return kernel, dataclasses.replace(node, b=b)


def values(x, kernel, node, key=None, sharding=None):
    """The product, and gradients by both factors, x and the kernel."""

    def loss(factors, x, kernel):
        adapted = dataclasses.replace(node, a=factors[0], b=factors[1])
        y = modulated_matmul(x, kernel, adapted, key, sharding)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    return gradient((node.a, node.b), x, kernel)


def assert_close(got, expected, dtype):
    tolerance = 3e-6 if dtype == jnp.float32 else 2e-2
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
        assert np.max(np.abs(left - right)) <= tolerance * max(1.0, np.max(np.abs(right)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_subspaces", [1, 2, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_slices_give_what_ids_give(num_subspaces, dropout, dtype):
    kernel, node = layer((23, 17), num_subspaces, dtype, dropout=dropout)
    assert node.contiguous
    x = jax.random.normal(jax.random.key(3), (2, 3, 23)).astype(dtype)
    key = jax.random.key(4) if dropout else None
    by_ids = dataclasses.replace(node, contiguous=False)
    assert_close(values(x, kernel, node, key), values(x, kernel, by_ids, key), dtype)


#: (rows, columns) over the mesh's tensor axis of that size; whether blocks are slices there.
DIVISIONS = [
    ((), (), 2, 3, True),  # uneven pieces are fine where no axis is divided
    ((), ("tensor",), 2, 4, True),
    (("tensor",), (), 2, 4, True),
    ((), ("tensor",), 4, 2, True),
    (("tensor",), (), 4, 2, True),
    ((), ("tensor",), 2, 3, False),
    (("tensor",), (), 4, 6, False),
]


@pytest.mark.parametrize(("rows", "columns", "tensor", "num_subspaces", "sliced"), DIVISIONS)
def test_a_mesh_in_any_proportion_to_the_blocks(rows, columns, tensor, num_subspaces, sliced):
    shape = (2, 8 // 2 // tensor, tensor)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    inputs, outputs = (26, 19) if not rows + columns else (24, 48)
    kernel, node = layer((inputs, outputs), num_subspaces, dropout=0.3)
    x = jax.random.normal(jax.random.key(3), (4, 3, inputs))
    key = jax.random.key(4)
    expected = values(x, kernel, dataclasses.replace(node, contiguous=False), key)
    batch = tuple(axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1)
    where = MatmulSharding(mesh, batch=batch, inputs=rows, outputs=columns)
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = jax.device_put((x, kernel, node, key), whole)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = values(*arguments, sharding=where)
    assert any("aren't slices" in str(warning.message) for warning in caught) != sliced
    assert_close(got, expected, jnp.float32)


def products(function, *arguments):
    """FLOPs of a compiled program."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("dtype", "floor"), [(jnp.float32, 1), (jnp.bfloat16, 2)])
@pytest.mark.parametrize("num_subspaces", [2, 4, 8])
def test_a_step_takes_two_products_and_the_diagonals(dtype, floor, num_subspaces):
    tokens, size = 512, 256
    kernel, node = layer((size, size), num_subspaces, dtype)
    x = jnp.ones((tokens, size), dtype)

    def step(a, b, x, kernel):
        def loss(factors, x):
            adapted = dataclasses.replace(node, a=factors[0], b=factors[1])
            return modulated_matmul(x, kernel, adapted)

        y, back = jax.vjp(loss, (a, b), x)
        return back(y)

    unit = 2 * tokens * size * size
    taken = products(step, node.a, node.b, x, kernel) / unit
    # What is formed and contracted of rank R_m, and entry by entry, comes on top.
    assert taken == pytest.approx(2 + floor / num_subspaces, abs=0.12)
