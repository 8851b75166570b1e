"""Floating-point operations of a traced function, with the length of every loop applied.

A compiler's own count takes the body of a loop once. Here products are counted where JAX has
written them down, ``2 x results x contracted`` each; what is elementwise isn't counted.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core

from smoa_jax.checks import refuse


def count_flops(traced: core.ClosedJaxpr) -> float:
    """Of all devices together, for a function that ``jax.make_jaxpr`` or ``trace`` has traced.

    Raises:
        ValueError: for a loop whose length isn't known, a ``while``, that holds products.
    """
    return _count(traced.jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name, settings = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = settings["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    inner = [_count(jaxpr) for jaxpr in _inner(settings)]
    if not any(inner):
        return 0.0
    if name == "while":
        refuse("products in a loop of unknown length", "scans, whose length is known")
    if name == "cond":
        return max(inner)
    return sum(inner) * _times(name, settings)


def _times(name: str, settings: dict[str, Any]) -> int:
    """How often an equation runs what it holds."""
    if name == "scan":
        return settings["length"]
    if name == "shard_map":  # its shapes are one device's
        return settings["mesh"].size
    if name == "pallas_call":
        return math.prod(settings["grid_mapping"].grid)
    return 1


def _inner(settings: dict[str, Any]) -> list[Any]:
    """The functions that an equation holds and runs; not the rules of its derivatives."""
    found = []
    for key, value in settings.items():
        if key.endswith("_thunk") or key in ("fwd", "bwd", "jvp_jaxpr_fun"):
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                found.append(item)
            elif hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
                found.append(item.jaxpr)
    return found
