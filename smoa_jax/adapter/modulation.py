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
from jaxtyping import Array, Float, Key

from smoa_jax.adapter.diagonal import Division, assembled
from smoa_jax.adapter.dropout import dropout
from smoa_jax.adapter.factors import gather_spread, spread_factors
from smoa_jax.adapter.placement import MatmulSharding, num_parts, product_specs, sum_over
from smoa_jax.adapter.products import HIGHEST, contract, contract_leading, instantiate
from smoa_jax.adapter.residual import (
    Part,
    adapted_weight,
    anchor,
    f32,
    factors_of,
    low_rank,
    num_terms,
    parts_of,
)
from smoa_jax.adapter.types import Bands, Blocks, Modulation, tensor_fields
from smoa_jax.adapter.views import parse_view
from smoa_jax.checks import require


def modulated_matmul(
    x: jax.Array,
    kernel: jax.Array,
    modulation: Modulation,
    dropout_key: Key[Array, ""] | None = None,
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
        sharding: Mesh and axes of the operands (``MatmulSharding``); None leaves the
            partitioning to the compiler.

    Returns:
        ``(..., O)`` in x's dtype, both products accumulated in float32 and rounded once. Kernels
        with a view take and give their own input and output axes.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if modulation.view:
        return _viewed_matmul(x, kernel, modulation, dropout_key, sharding)
    _check_shapes(x, kernel, modulation)
    if sharding is not None:
        _check_rows(x, sharding)
    if modulation.dropout == 0.0:
        dropout_key = None
    return _product(sharding, x, kernel, modulation, dropout_key)


# --------------------------------------------------------------------------------- the product
#
# Letters: x (T, I) with T for all leading axes, W (I, O), A (I, R), B (O, R), y and dy (T, O);
# x~ is x after dropout on the adapter's path. Where G is ones, A and B are spread (``factors.py``).


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    sharding: MatmulSharding | None,
    x: Float[Array, "... I"],
    kernel: Float[Array, "I O"],
    modulation: Modulation,
    dropout_key: Key[Array, ""] | None,
) -> Float[Array, "... O"]:
    """``y = x W + x~ (W' - W)``."""
    dropped = dropout(x, dropout_key, modulation.dropout)
    if not modulation.weight_modulated:  # y = x W + s (x~ A) B^T
        a, b = spread_factors(modulation)
        hidden = contract(dropped, a.astype(x.dtype), -1, 0)
        scaled = (hidden * f32(modulation.scale)).astype(x.dtype)
        update = contract(scaled, b.astype(x.dtype), -1, 1)
        return (contract(x, kernel.astype(x.dtype), -1, 0) + update).astype(x.dtype)
    inputs = (x,) if dropout_key is None else (x, dropped)
    if sharding is None:
        return _weight_modulated(inputs, kernel, modulation, Division()).astype(x.dtype)
    return _product_on_mesh(sharding, inputs, kernel, modulation)


def _weight_modulated(
    inputs: tuple[Float[Array, "... I"], ...],
    kernel: Float[Array, "I O"],
    modulation: Modulation,
    division: Division,
) -> Float[Array, "... O"]:
    """``x W + x~ (W' - W)`` in float32; ``inputs`` are x and, where it differs, x~."""
    x, dropped = inputs[0], inputs[-1]
    if len(inputs) == 1 and x.dtype == jnp.float32:  # y = x W'
        return contract(x, adapted_weight(kernel, modulation, division, x.dtype), -1, 0)
    frozen = contract(x, kernel.astype(x.dtype), -1, 0)
    parts, axis = parts_of(kernel, modulation, division), x.ndim - 1
    products = [
        contract(part.rows.of(dropped, axis), part.change().astype(x.dtype), -1, 0)
        for part in parts
    ]
    columns = [part.columns for part in parts]
    return frozen + assembled(products, columns, kernel.shape[1], axis)


def _product_forward(sharding, x, kernel, modulation, dropout_key):
    perturbed = jax.tree.map(lambda p: p.perturbed, (x, kernel), is_leaf=_is_primal)
    values = jax.tree.map(
        lambda p: p.value, (x, kernel, modulation, dropout_key), is_leaf=_is_primal
    )
    return _product(sharding, *values), (perturbed, values)


def _product_backward(sharding, saved, cotangent):
    (x_perturbed, kernel_perturbed), (x, kernel, modulation, dropout_key) = saved
    dy = instantiate(cotangent)
    dropped = dropout(x, dropout_key, modulation.dropout)
    if modulation.weight_modulated and sharding is not None:
        num_paths = 0 if not x_perturbed else 1 if dropout_key is None else 2
        paths, da, db = _gradients_on_mesh(sharding, dropped, kernel, modulation, dy, num_paths)
        dx = _joined(paths, dropout_key, modulation, dy.dtype) if x_perturbed else None
    else:
        dx = _input_gradient(kernel, modulation, dropout_key, dy) if x_perturbed else None
        if modulation.weight_modulated:
            da, db = _factor_gradients(dropped, kernel, modulation, dy, Division())
        else:
            da, db = _low_rank_gradients(dropped, modulation, dy)
    dkernel = None
    if kernel_perturbed:
        dkernel = _kernel_gradient(x, dropped, kernel, modulation, dy)
    frozen = dict.fromkeys(tensor_fields(modulation))
    factors = {"a": da.astype(modulation.a.dtype), "b": db.astype(modulation.b.dtype)}
    return dx, dkernel, dataclasses.replace(modulation, **(frozen | factors)), None


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _input_gradient(
    kernel: Float[Array, "I O"],
    modulation: Modulation,
    dropout_key: Key[Array, ""] | None,
    dy: Float[Array, "... O"],
) -> Float[Array, "... I"]:
    """``dx = dy W^T + dropout(dy (W' - W)^T)``, in dy's dtype."""
    dtype = dy.dtype
    if not modulation.weight_modulated:  # dy (W' - W)^T = s (dy B) A^T
        a, b = spread_factors(modulation)
        hidden = contract(dy, b.astype(dtype), -1, 0) * f32(modulation.scale)
        path = contract(hidden.astype(dtype), a.astype(dtype), -1, 1)
        paths = (contract(dy, kernel.astype(dtype), -1, 1), path)
    else:
        num_paths = 1 if dropout_key is None else 2
        paths = _weight_modulated_paths(kernel, modulation, dy, num_paths, Division())
    return _joined(paths, dropout_key, modulation, dtype)


def _joined(
    paths: tuple[Float[Array, "... I"], ...],
    dropout_key: Key[Array, ""] | None,
    modulation: Modulation,
    dtype: Any,
) -> Float[Array, "... I"]:
    """dx of its one path, or of the frozen weight's and the adapter's."""
    if len(paths) > 1:
        paths = (paths[0], dropout(paths[1], dropout_key, modulation.dropout))
    return functools.reduce(jnp.add, paths).astype(dtype)


def _weight_modulated_paths(
    kernel: Float[Array, "I O"],
    modulation: Modulation,
    dy: Float[Array, "... O"],
    num_paths: int,
    division: Division,
) -> tuple[Float[Array, "... I"], ...]:
    """Of dx in float32: none, ``(dy W'^T,)``, or ``(dy W^T, dy (W' - W)^T)``."""
    if not num_paths:
        return ()
    dtype = dy.dtype
    if num_paths == 1:
        return (contract(dy, adapted_weight(kernel, modulation, division, dtype), -1, 1),)
    parts, axis = parts_of(kernel, modulation, division), dy.ndim - 1
    products = [
        contract(part.columns.of(dy, axis), part.change().astype(dtype), -1, 1) for part in parts
    ]
    path = assembled(products, [part.rows for part in parts], kernel.shape[0], axis)
    return contract(dy, kernel.astype(dtype), -1, 1), path


def _low_rank_gradients(
    dropped: Float[Array, "... I"], modulation: Modulation, dy: Float[Array, "... O"]
) -> tuple[Float[Array, "I R"], Float[Array, "O R"]]:
    """``dA = s x~^T (dy B)``, ``dB = s dy^T (x~ A)``: nothing weight-sized is formed."""
    a, b = spread_factors(modulation)
    scale, dtype = f32(modulation.scale), dropped.dtype
    da = scale * contract_leading(dropped, contract(dy, b.astype(dtype), -1, 0).astype(dtype))
    db = scale * contract_leading(dy, contract(dropped, a.astype(dtype), -1, 0).astype(dtype))
    if isinstance(modulation, Blocks):
        num_subspaces = modulation.ranks.shape[-1]
        da = gather_spread(da, modulation.in_block, num_subspaces)
        db = gather_spread(db, modulation.out_block, num_subspaces)
    return da, db


def _factor_gradients(
    dropped: Float[Array, "... I"],
    kernel: Float[Array, "I O"],
    modulation: Modulation,
    dy: Float[Array, "... O"],
    division: Division,
) -> tuple[Float[Array, "*M I R"], Float[Array, "*M O R"]]:
    """``P_m = s G_m * (x~^T dy)``, ``dA_m = P_m B_m``, ``dB_m = P_m^T A_m``."""
    parts, axis = parts_of(kernel, modulation, division), dy.ndim - 1
    gradients = [
        _part_gradients(
            part, contract_leading(part.rows.of(dropped, axis), part.columns.of(dy, axis))
        )
        for part in parts
    ]
    das, dbs = zip(*gradients, strict=True)
    axis = modulation.a.ndim - 2
    return (
        assembled(das, [part.rows for part in parts], kernel.shape[0], axis),
        assembled(dbs, [part.columns for part in parts], kernel.shape[1], axis),
    )


def _part_gradients(
    part: Part, gradient: Float[Array, "I O"]
) -> tuple[Float[Array, "*M I R"], Float[Array, "*M O R"]]:
    """Those of a part of W, of the dense gradient there, which is this layer's alone."""
    das, dbs = [], []
    for m in range(num_terms(part.modulation)):
        product = anchor(part.kernel, part.modulation, m) * gradient
        a, b = factors_of(part.modulation, m)
        das.append(contract(product, b, 1, 0, HIGHEST))
        dbs.append(contract(product, a, 0, 0, HIGHEST))
    if isinstance(part.modulation, Bands):
        return jnp.stack(das), jnp.stack(dbs)
    return das[0], dbs[0]


def _kernel_gradient(
    x: Float[Array, "... I"],
    dropped: Float[Array, "... I"],
    kernel: Float[Array, "I O"],
    modulation: Modulation,
    dy: Float[Array, "... O"],
) -> Float[Array, "I O"]:
    """``dW = x^T dy + (x~^T dy) * dG/dW * s (A B^T)``, for those who differentiate the whole tree.

    G is W, or for the last band W less the others, which count as constants.
    """
    gradient = contract_leading(x, dy)
    if modulation.weight_modulated:
        last = num_terms(modulation) - 1
        ones = jnp.ones((), jnp.float32)
        factor = anchor(ones, modulation, last) * low_rank(modulation, last)
        path = gradient if dropped is x else contract_leading(dropped, dy)
        gradient = gradient + path * factor
    return gradient.astype(kernel.dtype)


# ----------------------------------------------------------------------------------- on a mesh
#
# Each device multiplies its own rows by its own columns (or rows) of W. What a product sums over is
# then summed across devices in float32: y over W's inputs, dx over its outputs, dA over the batch
# and W's outputs, dB over the batch and W's inputs.


def _product_on_mesh(
    sharding: MatmulSharding,
    inputs: tuple[Float[Array, "... I"], ...],
    kernel: Float[Array, "I O"],
    modulation: Modulation,
) -> Float[Array, "... O"]:
    """``_weight_modulated`` of each device's part, in x's dtype."""
    specs = product_specs(sharding, inputs[0].ndim, modulation)
    dtype = inputs[0].dtype

    def local(inputs, kernel, modulation):
        y = _weight_modulated(inputs, kernel, modulation, _division(sharding))
        return sum_over(y, sharding.inputs).astype(dtype)

    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=((specs.x,) * len(inputs), specs.kernel, specs.modulation),
        out_specs=specs.y,
        check_vma=False,
    )(inputs, kernel, modulation)


def _gradients_on_mesh(
    sharding: MatmulSharding,
    dropped: Float[Array, "... I"],
    kernel: Float[Array, "I O"],
    modulation: Modulation,
    dy: Float[Array, "... O"],
    num_paths: int,
) -> tuple[tuple[Float[Array, "... I"], ...], Float[Array, "*M I R"], Float[Array, "*M O R"]]:
    """The paths of dx (``_weight_modulated_paths``), dA and dB, of W gathered once for all."""
    specs = product_specs(sharding, dropped.ndim, modulation)

    def local(dropped, kernel, modulation, dy):
        division = _division(sharding)
        paths = _weight_modulated_paths(kernel, modulation, dy, num_paths, division)
        da, db = _factor_gradients(dropped, kernel, modulation, dy, division)
        paths = tuple(sum_over(path, sharding.outputs) for path in paths)
        da = sum_over(da, sharding.batch + sharding.outputs)
        return paths, da, sum_over(db, sharding.batch + sharding.inputs)

    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(specs.x, specs.kernel, specs.modulation, specs.y),
        out_specs=((specs.x,) * num_paths, specs.modulation.a, specs.modulation.b),
        check_vma=False,
    )(dropped, kernel, modulation, dy)


def _division(sharding: MatmulSharding) -> Division:
    """Of the kernel's two axes, as a device within ``shard_map`` sees it."""
    inputs, outputs = (
        num_parts(sharding.mesh, axes) for axes in (sharding.inputs, sharding.outputs)
    )
    axes = sharding.inputs + sharding.outputs
    return Division(inputs, outputs, jax.lax.axis_index(axes) if axes else 0)


def _is_primal(value: Any) -> bool:
    return hasattr(value, "perturbed")


# -------------------------------------------------------------------------------- shapes and views


def _viewed_matmul(x, kernel, modulation, dropout_key, sharding):
    view = parse_view(modulation.view).of_one_layer()
    _, inputs, outputs = view.split(kernel.shape)
    leading = x.shape[: x.ndim - len(inputs)]
    require(
        x.shape[len(leading) :] == inputs,
        f"x of shape {x.shape}",
        f"(..., {', '.join(map(str, inputs))}), the input axes of a kernel {kernel.shape} seen as "
        f"{modulation.view!r}",
    )
    plain = dataclasses.replace(modulation, view="")
    flat = x.reshape(*leading, modulation.a.shape[-2])
    y = modulated_matmul(flat, view.to_matrix(kernel), plain, dropout_key, sharding)
    return y.reshape(*leading, *outputs)


def _check_rows(x: jax.Array, sharding: MatmulSharding) -> None:
    parts = num_parts(sharding.mesh, sharding.batch)
    require(
        x.ndim >= 2 and x.shape[0] % parts == 0,
        f"x{x.shape} over {'+'.join(sharding.batch)}={parts}",
        f"rows first, a multiple of {parts}",
        "fill the batch up, or give no sharding",
    )


def _check_shapes(x: jax.Array, kernel: jax.Array, modulation: Modulation) -> None:
    inputs, outputs = modulation.a.shape[-2], modulation.b.shape[-2]
    ndim = 3 if isinstance(modulation, Bands) else 2
    require(
        modulation.a.ndim == ndim,
        f"a modulation with a{modulation.a.shape}",
        f"{ndim} axes, one layer's",
        "index or scan the stacked node first",
    )
    require(
        kernel.shape == (inputs, outputs) and x.shape[-1] == inputs,
        f"x{x.shape} and kernel{kernel.shape} for a modulation of a ({inputs}, {outputs}) kernel",
        f"x(..., {inputs}) and kernel({inputs}, {outputs})",
    )
