"""Products that accumulate in float32 and say their precision; a plain kernel's product.

float32 operands are multiplied at the highest precision, bf16 ones exactly as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


def dense_matmul(x: Float[Array, "... I"], kernel: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """``x W`` in x's dtype, accumulated in float32; gradients are products in x's dtype too.

    For layers without an adapter: ``jnp.dot`` with a float32 accumulator would multiply float32
    cotangents in its backward.
    """
    return _dense(x, kernel)


@jax.custom_vjp
def _dense(x, kernel):
    return contract(x, kernel.astype(x.dtype), -1, 0).astype(x.dtype)


def _dense_forward(x, kernel):
    perturbed = kernel.perturbed
    saved = x.perturbed, x.value if perturbed else None, kernel.value
    return _dense(x.value, kernel.value), saved


def _dense_backward(saved, cotangent):
    x_perturbed, x, kernel = saved
    dy = instantiate(cotangent)
    dx = contract(dy, kernel.astype(dy.dtype), -1, 1).astype(dy.dtype) if x_perturbed else None
    dkernel = None if x is None else contract_leading(x, dy).astype(kernel.dtype)
    return dx, dkernel


_dense.defvjp(_dense_forward, _dense_backward, symbolic_zeros=True)


def contract(
    left: jax.Array, right: jax.Array, left_axis: int, right_axis: int, precision: Any = None
) -> jax.Array:
    """Contract one axis of each, in float32."""
    if precision is None and left.dtype == jnp.float32:
        precision = HIGHEST
    axes = (((left_axis % left.ndim,), (right_axis % right.ndim,)), ((), ()))
    return jax.lax.dot_general(
        left, right, axes, precision=precision, preferred_element_type=jnp.float32
    )


def contract_leading(
    left: Float[Array, "... I"], right: Float[Array, "... O"]
) -> Float[Array, "I O"]:
    """``sum_t left[t, i] right[t, o]`` over all leading axes, in float32."""
    leading = tuple(range(left.ndim - 1))
    precision = HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left,
        right,
        ((leading, leading), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def instantiate(cotangent: Any) -> jax.Array:
    """A cotangent as an array: JAX hands over symbolic zeros where nothing depends on y."""
    if isinstance(cotangent, SymbolicZero):
        aval: Any = cotangent.aval
        return jnp.zeros(aval.shape, aval.dtype)
    return cotangent
