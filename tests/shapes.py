"""What the import hook in ``conftest.py`` checks: the annotations that say a shape, no others.

Beartype on every annotation would refuse a wrong value before the package's own refusal, which
tests want to read. An array may be NumPy's wherever it may be JAX's.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """``beartype`` with all annotations but jaxtyping's left out.

    A dataclass of arrays is a pytree node, and unflattening makes it of masks, specs or None.
    """
    hints = function.__annotations__
    shapes = {name: _with_numpy(hint) for name, hint in hints.items() if _says_a_shape(hint)}
    if not shapes or function.__name__ == "__init__":
        return function
    function.__annotations__ = shapes
    return beartype(function)


def _says_a_shape(hint: Any) -> bool:
    return _is_shape(hint) or any(_says_a_shape(part) for part in get_args(hint))


def _with_numpy(hint: Any) -> Any:
    """The hint with NumPy's arrays as good as JAX's, in tuples and unions too."""
    if _is_shape(hint):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str]
    parts = tuple(_with_numpy(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return tuple[parts]
    return Union[parts] if get_origin(hint) in (Union, types.UnionType) else hint  # noqa: UP007


def _is_shape(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)
