"""What JAX processes tell each other while they plan one adapter together.

Everything moves through one primitive, a sum over processes of buffers of bits to which each
process contributes its own part and zeros elsewhere. So what arrives is what was sent, bit for bit,
for every dtype and sharding, and one device of each process holds one layer at a time. All
processes must call these functions in the same order; with a single process nothing is sent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from smoa_jax.adapter.views import View

_ERROR_BYTES = 1024


def spans_processes(kernel: Any) -> bool:
    """Whether part of an array lies on devices of other processes."""
    return isinstance(kernel, jax.Array) and not kernel.is_fully_addressable


def gather_layer(kernel: jax.Array | np.ndarray, view: View, layer: int) -> np.ndarray:
    """One layer of a kernel on the host, as stored but without its layer axes.

    Piece by piece from wherever they lie, so that no device ever holds more of the kernel than its
    own part. All processes must call it for a kernel that spans them.
    """
    axes = view.order[: view.num_layer_axes]
    indices = np.unravel_index(layer, [kernel.shape[axis] for axis in axes]) if axes else ()
    bounds = [(0, size) for size in kernel.shape]
    for axis, index in zip(axes, map(int, indices), strict=True):
        bounds[axis] = (index, index + 1)
    return gather_region(kernel, bounds).squeeze(tuple(axes))


def gather_region(array: jax.Array | np.ndarray, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """Part of an array on the host, from the first to before the second bound of each axis.

    Piece by piece from wherever they lie, so that no device ever holds more of the array than its
    own part. All processes must call it for an array that spans them.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)[tuple(slice(*edges) for edges in bounds)]
    own = np.zeros([stop - start for start, stop in bounds], array.dtype)
    for shard in array.addressable_shards:
        held = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True)]
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, held, strict=True)]
        if shard.replica_id != 0 or any(start >= stop for start, stop in common):
            continue
        within = [begin for begin, _ in held]
        starts = [start - begin for (start, _), begin in zip(common, within, strict=True)]
        sizes = [stop - start for start, stop in common]
        part = jax.lax.dynamic_slice(shard.data, starts, sizes)  # one program for all layers
        target = tuple(
            slice(start - begin, stop - begin)
            for (start, stop), (begin, _) in zip(common, bounds, strict=True)
        )
        own[target] = np.asarray(part)
    return _sum_over_processes(own) if spans_processes(array) else own


def share_result(
    result: Mapping[str, np.ndarray] | None, like: Mapping[str, jax.ShapeDtypeStruct], source: int
) -> dict[str, np.ndarray]:
    """The arrays that process ``source`` holds, on all; ``like`` says what they look like."""
    shared = {}
    for name, struct in like.items():
        if jax.process_index() == source:
            assert result is not None
            shared[name] = _sum_over_processes(np.asarray(result[name], struct.dtype))
        else:
            shared[name] = _sum_over_processes(np.zeros(struct.shape, struct.dtype))
    return shared


def raise_together(error: Exception | None) -> None:
    """Raise in every process if one of them failed, so that none waits for it forever.

    Raises:
        ValueError: with the message of the first process that failed, in the others; a process
            that failed raises its own error.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    rows = np.zeros((jax.process_count(), _ERROR_BYTES), np.uint8)
    if error is not None:
        text = str(error) or type(error).__name__
        message = np.frombuffer(text.encode()[:_ERROR_BYTES], np.uint8)
        rows[jax.process_index(), : len(message)] = message
    rows = _sum_over_processes(rows)
    if error is not None:
        raise error
    for row in rows:
        if row.any():
            raise ValueError(row.tobytes().rstrip(b"\0").decode(errors="replace"))


def _sum_over_processes(own: np.ndarray) -> np.ndarray:
    """The array whose bits are the sum of every process's; at most one may be nonzero in each."""
    if jax.process_count() == 1:
        return own
    mesh, add = _adder()
    flat = np.ascontiguousarray(own).reshape(-1).view(np.uint8)
    words = np.zeros(-(-flat.size // 4), np.uint32)
    words.view(np.uint8)[: flat.size] = flat
    everyone = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("process")), words[None], (mesh.size, words.size)
    )
    summed = np.asarray(add(everyone)).view(np.uint8)[: flat.size]
    return summed.view(own.dtype).reshape(own.shape)


@functools.cache
def _adder() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    """One device of each process, and the sum over them."""
    devices = [jax.local_devices(process_index=n)[0] for n in range(jax.process_count())]
    mesh = Mesh(np.asarray(devices), ("process",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    return mesh, jax.jit(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), out_shardings=whole)
