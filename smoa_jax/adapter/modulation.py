"""The one operation: ``y = x W'`` with ``W' = W + s * sum_m G_m * (A_m B_m^T)``.

The papers' K subspaces are M here, since K is kv heads elsewhere in this project.

Three invariants:

- *Nothing is lost in bf16.* A pretrained bf16 weight times (1 + small) rounds back to itself, so
  below float32 the frozen product and the product with the residual ``W' - W`` are separate, both
  accumulate in float32, are added there, and are rounded once. Only ``dx`` uses the rounded W'.
  In float32 the merged W' is exact enough and saves a product.
- *Nothing of a weight's size is saved.* One ``jax.custom_vjp`` keeps its inputs (x, W, the factors)
  and forms the rest again in the backward pass, whatever the remat policy around it.
- *Precision is named.* Nothing here relies on JAX's default matmul precision, which is bf16 passes
  on TPU and TF32 on GPU.

Without modulation (LoRA, MELoRA) no weight-sized residual is ever formed: the low-rank product is
applied factor by factor.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from smoa_jax.adapter.types import Bands, Blocks, Modulation
from smoa_jax.adapter.views import parse_view

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class MatmulSharding:
    """Where the operands of a product lie on a mesh, so that its backward sums only factors.

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


def modulated_matmul(
    x: jax.Array,
    kernel: jax.Array,
    modulation: Modulation,
    dropout_key: jax.Array | None = None,
    sharding: MatmulSharding | None = None,
) -> jax.Array:
    """Multiply ``x`` by a kernel as its modulation adapts it.

    >>> y = modulated_matmul(x, layer["kernel"], layer["smoa"])  # instead of x @ layer["kernel"]

    Memory: the backward keeps x, the kernel and the factors, nothing else. The residual is formed
    and dropped within the call, in both directions.

    Args:
        x: ``(..., I)``, floating; its dtype is the compute dtype.
        kernel: ``(I, O)`` of one layer, or of the shape of the modulation's view; cast to x's dtype
            for the product, while the residual is formed from it in float32.
        modulation: The node beside that kernel, without a leading layer axis.
        dropout_key: Key for dropout on the input of the adapter's path alone; None: no dropout.
        sharding: Mesh and axes of the operands (``MatmulSharding`` of this module); None leaves the
            partitioning to the compiler, which then sums a dense weight gradient across devices.

    Returns:
        ``(..., O)`` in x's dtype, both products accumulated in float32 and rounded once. Kernels
        with a view take and give their own input and output axes.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if modulation.view:
        return _viewed_matmul(x, kernel, modulation, dropout_key, sharding)
    _check_shapes(x, kernel, modulation)
    if modulation.dropout == 0.0:
        dropout_key = None
    return _product(sharding, x, kernel, modulation, dropout_key)


def dense_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x W`` in x's dtype, accumulated in float32; gradients are products in x's dtype too.

    For layers without an adapter: ``jnp.dot`` with a float32 accumulator would multiply float32
    cotangents in its backward.
    """
    return _dense(x, kernel)


def residual(kernel: jax.Array, modulation: Modulation) -> jax.Array:
    """``W' - W`` of one layer's ``(I, O)`` kernel in float32, at the highest precision."""
    if modulation.weight_modulated:
        terms = (
            _anchor(kernel, modulation, m) * _low_rank(modulation, m, _HIGHEST)
            for m in range(_num_terms(modulation))
        )
        return functools.reduce(jnp.add, terms)
    a, b = _masked_factors(modulation)
    return _f32(modulation.scale) * _dot(a, b, 1, 1, _HIGHEST)


# --------------------------------------------------------------------------------- the product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(sharding, x, kernel, modulation, dropout_key):
    dropped = _dropout(x, dropout_key, modulation.dropout)
    if not modulation.weight_modulated:
        a, b = _masked_factors(modulation)
        hidden = _dot(dropped, a.astype(x.dtype), -1, 0)
        update = _dot((hidden * _f32(modulation.scale)).astype(x.dtype), b.astype(x.dtype), -1, 1)
        return (_dot(x, kernel.astype(x.dtype), -1, 0) + update).astype(x.dtype)
    change = residual(kernel, modulation)
    if dropout_key is None and x.dtype == jnp.float32:
        return _dot(x, kernel.astype(jnp.float32) + change, -1, 0)
    frozen = _dot(x, kernel.astype(x.dtype), -1, 0)
    return (frozen + _dot(dropped, change.astype(x.dtype), -1, 0)).astype(x.dtype)


def _product_forward(sharding, x, kernel, modulation, dropout_key):
    perturbed = jax.tree.map(lambda p: p.perturbed, (x, kernel), is_leaf=_is_primal)
    values = jax.tree.map(
        lambda p: p.value, (x, kernel, modulation, dropout_key), is_leaf=_is_primal
    )
    return _product(sharding, *values), (perturbed, values)


def _product_backward(sharding, saved, cotangent):
    (x_perturbed, kernel_perturbed), (x, kernel, modulation, dropout_key) = saved
    cotangent = _instantiate(cotangent)
    dropped = _dropout(x, dropout_key, modulation.dropout)
    dx = None
    if x_perturbed:
        dx = _input_gradient(x, kernel, modulation, dropout_key, cotangent)
    if modulation.weight_modulated:
        da, db = _contract(sharding, dropped, kernel, modulation, cotangent)
    else:
        da, db = _low_rank_gradients(dropped, modulation, cotangent)
    dkernel = None
    if kernel_perturbed:
        dkernel = _kernel_gradient(x, dropped, kernel, modulation, cotangent)
    frozen = {f.name: None for f in dataclasses.fields(modulation) if not f.metadata.get("static")}
    factors = {"a": da.astype(modulation.a.dtype), "b": db.astype(modulation.b.dtype)}
    return dx, dkernel, dataclasses.replace(modulation, **(frozen | factors)), None


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _input_gradient(x, kernel, modulation, dropout_key, cotangent):
    if not modulation.weight_modulated:
        a, b = _masked_factors(modulation)
        hidden = _dot(cotangent, b.astype(x.dtype), -1, 0) * _f32(modulation.scale)
        path = _dot(hidden.astype(x.dtype), a.astype(x.dtype), -1, 1)
    elif dropout_key is None:
        merged = kernel.astype(jnp.float32) + residual(kernel, modulation)
        return _dot(cotangent, merged.astype(x.dtype), -1, 1).astype(x.dtype)
    else:
        path = _dot(cotangent, residual(kernel, modulation).astype(x.dtype), -1, 1)
    path = _dropout(path, dropout_key, modulation.dropout)
    return (_dot(cotangent, kernel.astype(x.dtype), -1, 1) + path).astype(x.dtype)


def _low_rank_gradients(dropped, modulation, cotangent):
    """Gradients of a and b without modulation: nothing weight-sized is formed."""
    a, b = _masked_factors(modulation)
    scale, dtype = _f32(modulation.scale), dropped.dtype
    da = scale * _contract_leading(dropped, _dot(cotangent, b.astype(dtype), -1, 0).astype(dtype))
    db = scale * _contract_leading(cotangent, _dot(dropped, a.astype(dtype), -1, 0).astype(dtype))
    if isinstance(modulation, Blocks):
        num_subspaces = modulation.ranks.shape[-1]
        da = _unmask(da, modulation.in_block, num_subspaces)
        db = _unmask(db, modulation.out_block, num_subspaces)
    return da, db


def _contract(sharding, dropped, kernel, modulation, cotangent):
    """dA and dB from x and dy, on each device alone when told where the operands lie."""
    if sharding is None:
        return _factor_gradients(dropped, kernel, modulation, cotangent)
    spec = jax.sharding.PartitionSpec
    batch, inputs, outputs = (
        s or None for s in (sharding.batch, sharding.inputs, sharding.outputs)
    )
    middle = (None,) * (dropped.ndim - 2)
    specs = {
        "a": spec(inputs),
        "b": spec(outputs),
        "in_block": spec(inputs),
        "out_block": spec(outputs),
        "bands": spec(None, inputs, outputs),
    }
    if isinstance(modulation, Bands):
        specs |= {"a": spec(None, inputs), "b": spec(None, outputs)}
    names = [f.name for f in dataclasses.fields(modulation) if not f.metadata.get("static")]
    node_specs = dataclasses.replace(modulation, **{n: specs.get(n, spec()) for n in names})

    def local(dropped, kernel, modulation, cotangent):
        da, db = _factor_gradients(dropped, kernel, modulation, cotangent)
        da_axes, db_axes = sharding.batch + sharding.outputs, sharding.batch + sharding.inputs
        da = jax.lax.psum(da, da_axes) if da_axes else da
        return da, jax.lax.psum(db, db_axes) if db_axes else db

    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(
            spec(batch, *middle, inputs),
            spec(inputs, outputs),
            node_specs,
            spec(batch, *middle, outputs),
        ),
        out_specs=(specs["a"], specs["b"]),
        check_vma=False,
    )(dropped, kernel, modulation, cotangent)


def _factor_gradients(dropped, kernel, modulation, cotangent):
    gradient = _contract_leading(dropped, cotangent)  # (I, O) float32, of this layer alone
    das, dbs = [], []
    for m in range(_num_terms(modulation)):
        product = _anchor(kernel, modulation, m) * gradient
        a, b = _factors(modulation, m)
        das.append(_dot(product, b, 1, 0, _HIGHEST))
        dbs.append(_dot(product, a, 0, 0, _HIGHEST))
    if isinstance(modulation, Bands):
        return jnp.stack(das), jnp.stack(dbs)
    return das[0], dbs[0]


def _kernel_gradient(x, dropped, kernel, modulation, cotangent):
    """Gradient of W, for those who differentiate the whole tree; bands W_1.. count as constants."""
    gradient = _contract_leading(x, cotangent)
    if modulation.weight_modulated:
        last = _num_terms(modulation) - 1
        ones = jnp.ones((), jnp.float32)
        factor = _anchor(ones, modulation, last) * _low_rank(modulation, last, _HIGHEST)
        path = gradient if dropped is x else _contract_leading(dropped, cotangent)
        gradient = gradient + path * factor
    return gradient.astype(kernel.dtype)


@jax.custom_vjp
def _dense(x, kernel):
    return _dot(x, kernel.astype(x.dtype), -1, 0).astype(x.dtype)


def _dense_forward(x, kernel):
    perturbed = kernel.perturbed
    return _dense(x.value, kernel.value), (
        x.perturbed,
        x.value if perturbed else None,
        kernel.value,
    )


def _dense_backward(saved, cotangent):
    x_perturbed, x, kernel = saved
    cotangent = _instantiate(cotangent)
    dtype = cotangent.dtype
    dx = _dot(cotangent, kernel.astype(dtype), -1, 1).astype(dtype) if x_perturbed else None
    dkernel = None if x is None else _contract_leading(x, cotangent).astype(kernel.dtype)
    return dx, dkernel


_dense.defvjp(_dense_forward, _dense_backward, symbolic_zeros=True)


# ------------------------------------------------------------------------- parts of the formula


def _num_terms(modulation: Modulation) -> int:
    """Dense terms of the sum over subspaces: blocks are one, since they do not overlap."""
    return modulation.ranks.shape[-1] if isinstance(modulation, Bands) else 1


def _factors(modulation: Modulation, m: int) -> tuple[jax.Array, jax.Array]:
    if isinstance(modulation, Bands):
        return modulation.a[m], modulation.b[m]
    return modulation.a, modulation.b


def _low_rank(modulation: Modulation, m: int, precision) -> jax.Array:
    a, b = _factors(modulation, m)
    return _dot(a, b, 1, 1, precision)


def _anchor(kernel: jax.Array, modulation: Modulation, m: int) -> jax.Array:
    """``s * G_m`` in float32; for blocks all G_m at once, since at most one is not zero."""
    scale = _f32(modulation.scale)
    if isinstance(modulation, Blocks):
        same = modulation.in_block[:, None] == modulation.out_block[None, :]
        return jnp.where(same, scale * _f32(kernel), 0.0)
    if isinstance(modulation, Bands):
        last = modulation.ranks.shape[-1] - 1
        if m < last:
            return scale * _f32(modulation.bands[m])
        if kernel.ndim == 0:  # derivative of the last band by the weight
            return scale * _f32(kernel)
        return scale * (_f32(kernel) - _f32(modulation.bands).sum(axis=0))
    return scale * _f32(kernel)


def _masked_factors(modulation: Modulation) -> tuple[jax.Array, jax.Array]:
    """Factors whose plain product is the update without modulation: A~, B~ of method.md."""
    if not isinstance(modulation, Blocks):
        return modulation.a, modulation.b
    num_subspaces = modulation.ranks.shape[-1]
    return (
        _mask(modulation.a, modulation.in_block, num_subspaces),
        _mask(modulation.b, modulation.out_block, num_subspaces),
    )


def _mask(factor: jax.Array, block: jax.Array, num_subspaces: int) -> jax.Array:
    """(..., n, R_m) -> (..., n, M * R_m): each row in its own block's columns, zeros elsewhere."""
    own = _membership(block, num_subspaces)
    masked = jnp.where(own[..., None], factor[..., :, None, :], 0)
    return masked.reshape(*factor.shape[:-1], num_subspaces * factor.shape[-1])


def _membership(block: jax.Array, num_subspaces: int) -> jax.Array:
    """(..., n) block ids -> (..., n, M) booleans."""
    ids = jnp.arange(num_subspaces, dtype=block.dtype)
    return block[..., None] == ids.reshape((1,) * block.ndim + (num_subspaces,))


def _unmask(gradient: jax.Array, block: jax.Array, num_subspaces: int) -> jax.Array:
    """The transpose of ``_mask``."""
    own = _membership(block, num_subspaces)
    split = gradient.reshape(gradient.shape[0], num_subspaces, -1)
    return jnp.where(own[..., None], split, 0).sum(axis=1)


def _dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def _f32(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def _instantiate(cotangent: Any) -> jax.Array:
    """A cotangent as an array: JAX hands over symbolic zeros where nothing depends on y."""
    if isinstance(cotangent, SymbolicZero):
        aval: Any = cotangent.aval
        return jnp.zeros(aval.shape, aval.dtype)
    return cotangent


def _is_primal(value: Any) -> bool:
    return hasattr(value, "perturbed")


def _dot(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int, precision=None):
    """Contract one axis of each, accumulating in float32.

    float32 operands are multiplied at the highest precision, bf16 ones exactly as they are.
    """
    if precision is None and left.dtype == jnp.float32:
        precision = _HIGHEST
    axes = (((left_axis % left.ndim,), (right_axis % right.ndim,)), ((), ()))
    return jax.lax.dot_general(
        left, right, axes, precision=precision, preferred_element_type=jnp.float32
    )


def _contract_leading(left: jax.Array, right: jax.Array) -> jax.Array:
    """``sum_t left[t, i] right[t, o]`` over all leading axes, in float32."""
    leading = tuple(range(left.ndim - 1))
    precision = _HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left,
        right,
        ((leading, leading), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


# -------------------------------------------------------------------------------- shapes and views


def _viewed_matmul(x, kernel, modulation, dropout_key, sharding):
    view = parse_view(modulation.view).of_one_layer()
    _, inputs, outputs = view.split(kernel.shape)
    leading = x.shape[: x.ndim - len(inputs)]
    if x.shape[len(leading) :] != inputs:
        raise ValueError(
            f"got x of shape {x.shape}; expected (..., {', '.join(map(str, inputs))}), the input "
            f"axes of a kernel {kernel.shape} seen as {modulation.view!r}"
        )
    plain = dataclasses.replace(modulation, view="")
    flat = x.reshape(*leading, modulation.a.shape[-2])
    y = modulated_matmul(flat, view.to_matrix(kernel), plain, dropout_key, sharding)
    return y.reshape(*leading, *outputs)


def _check_shapes(x: jax.Array, kernel: jax.Array, modulation: Modulation) -> None:
    inputs, outputs = modulation.a.shape[-2], modulation.b.shape[-2]
    expected_ndim = 3 if isinstance(modulation, Bands) else 2
    if modulation.a.ndim != expected_ndim:
        raise ValueError(
            f"got a modulation with a{modulation.a.shape}; expected {expected_ndim} axes, one "
            "layer's; index or scan the stacked node first"
        )
    if kernel.shape != (inputs, outputs) or x.shape[-1] != inputs:
        raise ValueError(
            f"got x{x.shape} and kernel{kernel.shape} for a modulation of a ({inputs}, {outputs}) "
            f"kernel; expected x(..., {inputs}) and kernel({inputs}, {outputs})"
        )


__all__ = [
    "MatmulSharding",
    "dense_matmul",
    "modulated_matmul",
    "residual",
]
