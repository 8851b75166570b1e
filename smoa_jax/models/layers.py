"""The two building blocks that hold parameters: ``Linear`` and ``RMSNorm``.

``Linear`` is where an adapter meets the model: when the params collection holds a modulation under
``smoa`` beside ``kernel``, the product goes through ``modulated_matmul``; otherwise it is a plain
dot. Precision is named in both, so nothing depends on JAX's global default (bf16 passes for
float32 on TPU, TF32 on GPU), and a kernel stored in another dtype is never kept twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from smoa_jax.adapter.modulation import modulated_matmul
from smoa_jax.adapter.placement import ProductShardings
from smoa_jax.adapter.products import dense_matmul
from smoa_jax.adapter.types import SMOA_KEY

#: Name under which every projection's output is known to ``jax.checkpoint``'s policies.
PROJECTION = "projection"

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """``cap * tanh(x / cap)`` (Gemma 2, arXiv 2408.00118, section 2); ``x`` itself for cap 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def wide_matmul(
    x: Float[Array, "... I"],
    kernel: Float[Array, "I O"] | Float[Array, "O I"],
    *,
    transposed: bool = False,
) -> Float[Array, "... O"]:
    """Multiply in x's dtype and return the float32 accumulator, not rounded: for logits.

    ``transposed`` takes a kernel (O, I) without copying it. A kernel of another dtype is cast once
    in each direction; the cast copy, as large as the weight, is not kept in between.
    """

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x,
            kernel.astype(x.dtype),
            (((x.ndim - 1,), (1 if transposed else 0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    if kernel.dtype != x.dtype:
        product = jax.checkpoint(product, prevent_cse=False)
    return product(x, kernel)


class Linear(nn.Module):
    """``y = x W``, adapted when a modulation lies beside the kernel.

    The product is in x's dtype, and so is the result, unless ``wide`` asks for the float32
    accumulator. ``bias`` adds one, which no adapter touches. Dropout on the adapter's path happens
    when the modulation asks for it and the caller gives a ``dropout`` key. On a mesh ``products``
    says where the operands lie.
    """

    input_dim: int
    output_dim: int
    wide: bool = False
    bias: bool = False
    products: ProductShardings = ProductShardings()

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (self.input_dim, self.output_dim)
        )
        if self.has_variable("params", SMOA_KEY):
            modulation = self.get_variable("params", SMOA_KEY)
            dropping = modulation.dropout > 0 and self.has_rng("dropout")
            key = self.make_rng("dropout") if dropping else None
            x = x.astype(jnp.float32) if self.wide else x
            where = self.products.of(self.name)
            result = modulated_matmul(x, kernel, modulation, dropout_key=key, sharding=where)
        else:
            result = wide_matmul(x, kernel) if self.wide else dense_matmul(x, kernel)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.output_dim,))
            result = result + bias.astype(result.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return checkpoint_name(result, PROJECTION)


def unit_rms(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    """Scale to unit root mean square (arXiv 1910.07467); float32 comes back."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)


class RMSNorm(nn.Module):
    """Scale to unit root mean square (arXiv 1910.07467), in float32; x's dtype comes back.

    Gemma stores w and scales by ``offset + w`` with offset 1, so that decay pulls towards one.
    """

    dim: int
    epsilon: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        start = nn.initializers.constant(1.0 - self.offset)
        scale = self.offset + self.param("scale", start, (self.dim,)).astype(jnp.float32)
        scale = scale.reshape((1,) * (x.ndim - 1) + (self.dim,))
        return (unit_rms(x, self.epsilon) * scale).astype(x.dtype)
